"""Vision transformer: an image as a sequence of patches.

Dosovitskiy et al. 2020, arXiv 2010.11929. The mean over tokens instead of the class token, and small networks on small
images: Beyer et al. 2022, arXiv 2205.01580. Letters: B batch, C channels, H height, W width, N tokens, D features,
K outputs.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from espalier.config.ranges import Count, Rate
from espalier.models.blocks import (
    HEAD_STD,
    Activation,
    Attention,
    Residual,
    feed_forward,
    make_dropout,
    make_feature_norm,
    require_image,
    sequence,
)

TokenNorm = Literal["layer", "rms"]

# As large as the sine-cosine embeddings of Beyer et al. With the usual 0.02 the mean over tokens hardly sees positions:
# 0.93 instead of 0.98 on digits after 20 epochs (AdamW, lr 3e-3, depth 4).
POSITION_STD = 0.7


class ViT(nn.Module):
    """A transformer of `depth` blocks, attention then feed-forward, each normalised first, `width` features per token.

    Feed-forward layers have `expansion` times `width` features inside. `dropout` follows the position embedding and
    every dense layer but the one that makes queries, keys and values (appendix B.1).
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: Count,
        patch: Count,
        width: Count,
        depth: Count,
        heads: Count,
        expansion: Count,
        pool: Literal["mean", "token"],
        activation: Activation,
        norm: TokenNorm,
        dropout: Rate,
    ) -> None:
        super().__init__()
        channels, image_height, image_width = require_image("vit", input_shape, patch, "use a smaller model.patch")
        if image_height % patch or image_width % patch:
            raise ValueError(
                f"model.patch={patch} does not divide an image of {image_height} x {image_width} pixels; "
                "use a divisor of both sides"
            )
        if width % heads:
            raise ValueError(f"model.width={width} is no multiple of model.heads={heads}; each head gets an equal part")
        num_tokens = (image_height // patch) * (image_width // patch) + (pool == "token")
        self.pool = pool
        self.patches = nn.Conv2d(channels, width, patch, patch)
        if pool == "token":
            self.token_11D = nn.Parameter(torch.zeros(1, 1, width))
        self.position_1ND = nn.Parameter(torch.empty(1, num_tokens, width))
        self.dropout = make_dropout(dropout)
        self.layers = nn.Sequential()
        for _ in range(depth):
            self.layers.append(Residual(attention_branch(width, heads, norm, dropout)))
            self.layers.append(Residual(feed_forward_branch(width, expansion, activation, norm, dropout)))
        self.norm = make_feature_norm(norm, width)
        self.head = nn.Linear(width, num_outputs)
        initialise(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x_BND = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        if self.pool == "token":
            x_BND = torch.cat((self.token_11D.expand(x_BND.shape[0], -1, -1), x_BND), dim=1)
        x_BND = self.norm(self.layers(self.dropout(x_BND + self.position_1ND)))
        return self.head(x_BND[:, 0] if self.pool == "token" else x_BND.mean(1))


def attention_branch(width: int, heads: int, norm: TokenNorm, dropout: float) -> nn.Sequential:
    """Return the attention branch, whose output is added to the tokens; (B, N, D) to (B, N, D)."""
    return sequence(
        norm=make_feature_norm(norm, width), attention=Attention(width, heads), dropout=make_dropout(dropout)
    )


def feed_forward_branch(
    width: int, expansion: int, activation: Activation, norm: TokenNorm, dropout: float
) -> nn.Sequential:
    """Return the branch of two dense layers, whose output is added to each token; (B, N, D) to (B, N, D)."""
    return sequence(
        norm=make_feature_norm(norm, width), mlp=feed_forward(width, expansion * width, activation, dropout)
    )


def initialise(model: ViT) -> None:
    """Draw dense weights Xavier-uniform and set biases to zero, as the authors do (google-research/vision_transformer).

    Queries, keys and values are three layers that share a tensor. Positions start large, the head small.
    """
    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear):
            for part in module.weight.chunk(3 if name.endswith("qkv") else 1):
                nn.init.xavier_uniform_(part)
    nn.init.normal_(model.patches.weight, std=1 / sqrt(model.patches.weight[0].numel()))
    nn.init.normal_(model.position_1ND, std=POSITION_STD)
    nn.init.normal_(model.head.weight, std=HEAD_STD)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
