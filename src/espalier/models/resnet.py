"""Residual networks: each block adds a correction to its input, so depth does not block the gradient.

He et al. 2015, arXiv 1512.03385: section 4.2 and its 6n+2 layers for small images (`stem: cifar`), table 1 for large
ones (`stem: imagenet`). Shortcuts are identities, and 1x1 convolutions where the shape changes (option B there).
The stride of a bottleneck is in its 3x3 convolution, as in most later code, which costs no parameters.
Letters: B batch, C channels, H height, W width, K outputs.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from espalier.config.ranges import Count, Rate
from espalier.models.blocks import (
    STEM_STRIDE,
    Activation,
    ConvNorm,
    ConvNormAct,
    Norm,
    Residual,
    Stem,
    average_pool,
    conv_stem,
    initialise,
    make_activation,
    make_dropout,
    require_image,
    sequence,
)

Block = Literal["basic", "bottleneck"]

EXPANSION: dict[Block, int] = {"basic": 1, "bottleneck": 4}  # channels out of a block per channel inside
FOUR_STAGES: dict[int, tuple[Block, list[int]]] = {  # table 1
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
    101: ("bottleneck", [3, 4, 23, 3]),
    152: ("bottleneck", [3, 8, 36, 3]),
}


class ResNet(nn.Module):
    """A ResNet: a published one, or one with any list of blocks per stage.

    `depth` counts layers with weights, or lists blocks per stage. The first stage has `width` channels inside its
    blocks, each next one twice as many at half the resolution. A `block` or `width` of None is the published one.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: Count,
        depth: Count | Sequence[Count],
        stem: Stem,
        block: Block | None,
        width: Count | None,
        activation: Activation,
        norm: Norm,
        dropout: Rate,
    ) -> None:
        super().__init__()
        block, stages = plan(depth, stem, block)
        if width is None:
            width = 64 if len(stages) == 4 else 16
        shrink = STEM_STRIDE[stem] * 2 ** (len(stages) - 1)
        min_side = 2 * shrink if norm == "instance" else shrink  # one pixel has no variance
        remedy = "use model.stem=cifar" if stem == "imagenet" else "list fewer stages, such as model.depth=[3,3]"
        in_channels = require_image("resnet", input_shape, min_side, remedy)[0]
        self.stem = conv_stem(stem, in_channels, width, norm, activation)
        self.stages = nn.Sequential()
        in_channels = width
        for stage, num_blocks in enumerate(stages):
            channels = width * 2**stage
            strides = [2 if stage else 1] + [1] * (num_blocks - 1)
            blocks = nn.Sequential()
            for stride in strides:
                blocks.append(residual_block(block, in_channels, channels, stride, norm, activation))
                in_channels = channels * EXPANSION[block]
            self.stages.append(blocks)
        self.pool = average_pool()
        self.dropout = make_dropout(dropout)
        self.head = nn.Linear(in_channels, num_outputs)
        initialise(self, self.head)
        if norm == "none":
            damp_branches(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, K)."""
        return self.head(self.dropout(self.pool(self.stages(self.stem(x_BCHW)))))


def plan(depth: int | Sequence[int], stem: Stem, block: Block | None) -> tuple[Block, list[int]]:
    """Return the kind of block and the number of blocks per stage.

    Depths 50 and 152 exist in both families: the stem decides, or `block`.

    Raises:
        ValueError: no published network has this depth.
    """
    if not isinstance(depth, int):
        if not depth:
            raise ValueError("model.depth=[] has no stage; list the blocks of each, such as model.depth=[3,3,3]")
        return block or "basic", list(depth)
    published: list[tuple[Block, list[int]]] = []
    if stem == "cifar" and depth >= 8 and depth % 6 == 2:
        published.append(("basic", [depth // 6] * 3))
    if depth in FOUR_STAGES:
        published.append(FOUR_STAGES[depth])
    fitting = [network for network in published if block in (None, network[0])]
    if not fitting:
        small = "8, 14, 20, 26 and so on (6n+2), " if stem == "cifar" and block != "bottleneck" else ""
        large = ", ".join(str(known) for known, (kind, _) in FOUR_STAGES.items() if block in (None, kind))
        raise ValueError(
            f"model.depth={depth} is no published ResNet with stem={stem} and {block or 'any'} blocks; "
            f"use {small}{large}, or list the blocks of each stage, such as model.depth=[3,3,3]"
        )
    return fitting[0]


def residual_block(
    block: Block, in_channels: int, channels: int, stride: int, norm: Norm, activation: Activation
) -> Residual:
    """Return a block of two 3x3 convolutions (basic), or of 1x1, 3x3, 1x1 with `4 * channels` outputs (bottleneck)."""
    out_channels = channels * EXPANSION[block]
    if block == "basic":
        branch = sequence(
            conv1=ConvNormAct(in_channels, channels, 3, stride, norm, activation),
            conv2=ConvNorm(channels, out_channels, 3, 1, norm),
        )
    else:
        branch = sequence(
            conv1=ConvNormAct(in_channels, channels, 1, 1, norm, activation),
            conv2=ConvNormAct(channels, channels, 3, stride, norm, activation),
            conv3=ConvNorm(channels, out_channels, 1, 1, norm),
        )
    changes_shape = stride != 1 or in_channels != out_channels
    shortcut = ConvNorm(in_channels, out_channels, 1, stride, norm) if changes_shape else None
    return Residual(branch, shortcut, make_activation(activation))


def damp_branches(model: nn.Module) -> None:
    """Divide the last kernel of each residual branch by the square root of the number of branches.

    Without norms each of L branches would double the signal's variance. So its growth is (1 + 1/L)**L, below e, the
    rule of Radford et al. 2019 (GPT-2, section 2.3).
    """
    branches = [module.branch for module in model.modules() if isinstance(module, Residual)]
    with torch.no_grad():
        for branch in branches:
            last = [module for module in branch.modules() if isinstance(module, nn.Conv2d)][-1]
            last.weight.div_(sqrt(len(branches)))
