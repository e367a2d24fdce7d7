"""Densely connected networks: each layer reads the outputs of all layers before it and adds a few channels.

Huang et al. 2016, arXiv 1608.06993, the variant with bottlenecks and compression (DenseNet-BC).
Letters: B batch, C channels, H height, W width, K outputs.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from espalier.config.ranges import Count, Rate
from espalier.models.blocks import (
    STEM_STRIDE,
    Activation,
    Norm,
    Stem,
    average_pool,
    conv_stem,
    initialise,
    make_activation,
    make_dropout,
    make_norm,
    require_image,
    sequence,
)

KeptShare = Annotated[float, Gt(0), Le(1)]

BOTTLENECK = 4  # channels of the 1x1 convolution per channel of growth, section 3
FOUR_BLOCKS = {121: [6, 12, 24, 16], 161: [6, 12, 36, 24], 169: [6, 12, 32, 32], 201: [6, 12, 48, 32]}  # table 1


class DenseNet(nn.Module):
    """A DenseNet: a published one, or one with any list of layers per dense block.

    `depth` counts layers with weights, or lists layers per block. Each layer adds `growth` channels; between blocks
    a transition keeps the share `kept` of the channels and halves the resolution. `dropout` follows each 3x3
    convolution, as in section 4.2.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: Count,
        depth: Count | Sequence[Count],
        stem: Stem,
        growth: Count,
        kept: KeptShare,
        activation: Activation,
        norm: Norm,
        dropout: Rate,
    ) -> None:
        super().__init__()
        blocks = plan(depth, stem)
        shrink = STEM_STRIDE[stem] * 2 ** (len(blocks) - 1)
        min_side = 2 * shrink if norm == "instance" else shrink  # one pixel has no variance
        remedy = "use model.stem=cifar" if stem == "imagenet" else "list fewer blocks, such as model.depth=[6,6]"
        in_channels = require_image("densenet", input_shape, min_side, remedy)[0]
        channels = 2 * growth
        self.stem = dense_stem(stem, in_channels, channels, norm, activation)
        self.blocks = nn.Sequential()
        for place, num_layers in enumerate(blocks):
            if place:
                fewer = max(1, int(channels * kept))
                self.blocks.append(transition(channels, fewer, norm, activation))
                channels = fewer
            layers = nn.Sequential()
            for _ in range(num_layers):
                layers.append(DenseLayer(channels, growth, norm, activation, dropout))
                channels += growth
            self.blocks.append(layers)
        self.norm = make_norm(norm, channels)
        self.act = make_activation(activation)
        self.pool = average_pool()
        self.head = nn.Linear(channels, num_outputs)
        initialise(self, self.head)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, K)."""
        features_BCHW = self.act(self.norm(self.blocks(self.stem(x_BCHW))))
        return self.head(self.pool(features_BCHW))


class DenseLayer(nn.Module):
    """Appends `growth` new channels to its input; (B, C, H, W) to (B, C + growth, H, W)."""

    def __init__(self, channels: int, growth: int, norm: Norm, activation: Activation, dropout: float) -> None:
        super().__init__()
        inner = BOTTLENECK * growth
        bias = norm == "none"
        self.layer = sequence(
            norm1=make_norm(norm, channels),
            act1=make_activation(activation),
            conv1=nn.Conv2d(channels, inner, 1, bias=bias),
            norm2=make_norm(norm, inner),
            act2=make_activation(activation),
            conv2=nn.Conv2d(inner, growth, 3, padding=1, bias=bias),
            dropout=make_dropout(dropout),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.cat((x_BCHW, self.layer(x_BCHW)), dim=1)


def plan(depth: int | Sequence[int], stem: Stem) -> list[int]:
    """Return the number of layers per dense block.

    Raises:
        ValueError: no published network has this depth, or the list of layers is empty.
    """
    if not isinstance(depth, int):
        if not depth:
            raise ValueError("model.depth=[] has no block; list the layers of each, such as model.depth=[6,6,6]")
        return list(depth)
    if depth in FOUR_BLOCKS:
        return FOUR_BLOCKS[depth]
    if stem == "cifar" and depth >= 10 and depth % 6 == 4:
        return [depth // 6] * 3
    small = "10, 16, 22, 28 and so on (6n+4), " if stem == "cifar" else ""
    large = ", ".join(map(str, FOUR_BLOCKS))
    raise ValueError(
        f"model.depth={depth} is no published DenseNet with stem={stem}; use {small}{large}, "
        "or list the layers of each block, such as model.depth=[6,6,6]"
    )


def dense_stem(stem: Stem, in_channels: int, channels: int, norm: Norm, activation: Activation) -> nn.Sequential:
    """Return a bare 3x3 convolution for small images; 7x7, norm, activation and max pooling for large ones."""
    if stem == "cifar":
        return sequence(conv=nn.Conv2d(in_channels, channels, 3, padding=1, bias=norm == "none"))
    return conv_stem(stem, in_channels, channels, norm, activation)


def transition(channels: int, fewer: int, norm: Norm, activation: Activation) -> nn.Sequential:
    """Return layers with fewer channels at half the resolution; (B, channels, H, W) to (B, fewer, H // 2, W // 2)."""
    return sequence(
        norm=make_norm(norm, channels),
        act=make_activation(activation),
        conv=nn.Conv2d(channels, fewer, 1, bias=norm == "none"),
        pool=nn.AvgPool2d(2),
    )
