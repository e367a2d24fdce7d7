"""Building blocks of the networks, small enough to recombine.

Every activation is a module of its own and every residual sum a plain `+`, so that quantizers, pruners and exporters
see them. Letters: B batch, C channels, H height, W width, N tokens, D features, A attention heads.
"""

from collections.abc import Callable, Sequence
from math import gcd
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "mish", "hard_swish", "tanh"]
Norm = Literal["batch", "group", "layer", "instance", "none"]
FeatureNorm = Literal["batch", "layer", "rms", "none"]
Stem = Literal["cifar", "imagenet"]

ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hard_swish": nn.Hardswish,
    "tanh": nn.Tanh,
}
STEM_STRIDE: dict[Stem, int] = {"cifar": 1, "imagenet": 4}
MAX_GROUPS = 32  # Wu and He 2018, arXiv 1803.08494
MIN_GROUP_CHANNELS = 4  # narrow networks: with one channel per group it would be instance normalisation
HEAD_STD = 0.01  # Goyal et al. 2017, arXiv 1706.02677, section 5.1


def make_activation(name: Activation) -> nn.Module:
    """Return a new elementwise activation; out of place, so that hooks and residual sums may keep its input."""
    return ACTIVATIONS[name]()


def make_norm(name: Norm, channels: int) -> nn.Module:
    """Return a normalisation of feature maps (B, C, H, W) with a learnt scale and shift per channel.

    Statistics are taken over (B, H, W) for batch (arXiv 1502.03167), over (H, W) and a group of channels for group
    (arXiv 1803.08494), over (C, H, W) for layer (arXiv 1607.06450), over (H, W) for instance (arXiv 1607.08022).
    """
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "group":
        return nn.GroupNorm(gcd(channels, max(1, min(MAX_GROUPS, channels // MIN_GROUP_CHANNELS))), channels)
    if name == "layer":
        return nn.GroupNorm(1, channels)
    if name == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.Identity()


def make_feature_norm(name: FeatureNorm, features: int) -> nn.Module:
    """Return a normalisation of vectors: batch takes (B, D), layer and rms (arXiv 1910.07467) take (..., D)."""
    if name == "batch":
        return nn.BatchNorm1d(features)
    if name == "layer":
        return nn.LayerNorm(features, eps=1e-6)
    if name == "rms":
        return nn.RMSNorm(features, eps=1e-6)
    return nn.Identity()


def make_dropout(rate: float) -> nn.Module:
    """Return dropout, or the identity if `rate` is 0."""
    return nn.Dropout(rate) if rate else nn.Identity()


def sequence(**steps: nn.Module) -> nn.Sequential:
    """Return the steps in order without identities; names stay the same when a setting removes a step."""
    chain = nn.Sequential()
    for name, step in steps.items():
        if not isinstance(step, nn.Identity):
            chain.add_module(name, step)
    return chain


class ConvNorm(nn.Sequential):
    """A square convolution that keeps the size at stride 1, then a norm; it has a bias only if there is no norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, norm: Norm) -> None:
        bias = norm == "none"
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)
        super().__init__()
        self.add_module("conv", conv)
        if not bias:
            self.add_module("norm", make_norm(norm, out_channels))


class ConvNormAct(ConvNorm):
    """`ConvNorm`, then an activation."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, norm: Norm, activation: Activation
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, norm)
        self.add_module("act", make_activation(activation))


def conv_stem(stem: Stem, in_channels: int, width: int, norm: Norm, activation: Activation) -> nn.Sequential:
    """Return the first layers: a 3x3 convolution for small images; 7x7 and max pooling, to a quarter, for others."""
    if stem == "cifar":
        return sequence(conv=ConvNormAct(in_channels, width, 3, 1, norm, activation))
    return sequence(conv=ConvNormAct(in_channels, width, 7, 2, norm, activation), pool=nn.MaxPool2d(3, 2, padding=1))


class Residual(nn.Module):
    """Computes `act(branch(x) + shortcut(x))`; no shortcut means x itself, no activation the bare sum."""

    def __init__(
        self, branch: nn.Module, shortcut: nn.Module | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.act = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762); (B, N, D) to (B, N, D).

    `qkv` holds the rows of all queries, then keys, then values, head by head. To remove a head, remove its rows there
    and its columns in `proj`, and lower `num_heads`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return mixed tokens; `mask`, which broadcasts to (B, A, N, N), is False where a query may not see a key."""
        qkv_BN3AD = self.qkv(x_BND).unflatten(2, (3, self.num_heads, self.head_width))
        q_BAND, k_BAND, v_BAND = qkv_BN3AD.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BAND = F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND, mask)
        return self.proj(mixed_BAND.transpose(1, 2).flatten(2))


def feed_forward(width: int, hidden: int, activation: Activation, dropout: float) -> nn.Sequential:
    """Return two dense layers over the last axis, dropout after each; (..., width) to (..., width)."""
    return sequence(
        linear1=nn.Linear(width, hidden),
        act=make_activation(activation),
        dropout1=make_dropout(dropout),
        linear2=nn.Linear(hidden, width),
        dropout2=make_dropout(dropout),
    )


def dense_layers(
    in_features: int, hidden: Sequence[int], activation: Activation, norm: FeatureNorm, dropout: float
) -> nn.Sequential:
    """Return linear layer, norm, activation and dropout per entry of `hidden`; (B, in_features) to (B, hidden[-1])."""
    steps: dict[str, nn.Module] = {}
    for place, features in enumerate(hidden, start=1):
        steps[f"linear{place}"] = nn.Linear(in_features, features, bias=norm in ("none", "rms"))
        steps[f"norm{place}"] = make_feature_norm(norm, features)
        steps[f"act{place}"] = make_activation(activation)
        steps[f"dropout{place}"] = make_dropout(dropout)
        in_features = features
    return sequence(**steps)


def average_pool() -> nn.Sequential:
    """Return the mean over all positions; (B, C, H, W) to (B, C)."""
    return sequence(average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())


def initialise(model: nn.Module, head: nn.Linear) -> None:
    """Draw normal weights that keep a ReLU network's mean square (He et al. 2015, arXiv 1502.01852, eq. 10).

    Biases are 0. `head` starts small, so an untrained network gives every class nearly the same probability.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(head.weight, std=HEAD_STD)


def require_image(model: str, input_shape: Sequence[int], min_side: int, remedy: str) -> tuple[int, int, int]:
    """Return (channels, height, width) of `input_shape`.

    Raises:
        ValueError: it is not the shape of an image, or a side is below `min_side`; the message ends with the `remedy`.
    """
    shape = tuple(input_shape)
    if len(shape) != 3:
        raise ValueError(
            f"{model} takes images of shape (channels, height, width), got samples of shape {shape}; use model=mlp"
        )
    channels, height, width = shape
    if min(height, width) < min_side:
        raise ValueError(
            f"{model} as configured takes images of at least {min_side} pixels a side, got {shape}; {remedy}"
        )
    return channels, height, width
