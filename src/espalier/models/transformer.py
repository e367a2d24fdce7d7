"""A transformer encoder over tokens.

Vaswani et al. 2017, arXiv 1706.03762; norms before the branches: Xiong et al. 2020, arXiv 2002.04745. Letters: B batch,
T tokens, D features, K outputs.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from espalier.config.ranges import Count, Rate
from espalier.models.blocks import Activation, Attention, Residual, make_dropout, make_feature_norm
from espalier.models.embedding import embedding, masked_mean, positions, require_tokens
from espalier.models.vit import feed_forward_branch
from espalier.spec import PAD, Input


class Block(nn.Module):
    """Attention between the tokens that are no padding, then two dense layers, each added to its input."""

    def __init__(self, width: int, heads: int, expansion: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.norm = make_feature_norm("layer", width)
        self.attention = Attention(width, heads)
        self.dropout = make_dropout(dropout)
        self.mlp = Residual(feed_forward_branch(width, expansion, activation, "layer", dropout))

    def forward(self, x_BTD: Tensor, is_there_B11T: Tensor) -> Tensor:
        """Return tokens of the same shape, (B, T, D)."""
        return self.mlp(x_BTD + self.dropout(self.attention(self.norm(x_BTD), is_there_B11T)))


class Transformer(nn.Module):
    """`depth` blocks of `heads` heads; the mean over the tokens is classified. Padding changes nothing."""

    def __init__(
        self,
        inputs: Sequence[Input],
        num_outputs: Count,
        width: Count,
        depth: Count,
        heads: Count,
        expansion: Count,
        activation: Activation,
        dropout: Rate,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"model.width={width} is no multiple of model.heads={heads}; each head gets an equal part")
        self.embedding = embedding(require_tokens("transformer", inputs), width)
        self.dropout = make_dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, expansion, activation, dropout) for _ in range(depth))
        self.norm = make_feature_norm("layer", width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x_BTD = self.embedding(ids_BT)
        x_BTD = self.dropout(x_BTD + positions(ids_BT.shape[1], x_BTD.shape[2], x_BTD))
        is_there_B11T = (ids_BT != PAD)[:, None, None]
        for block in self.blocks:
            x_BTD = block(x_BTD, is_there_B11T)
        return self.head(masked_mean(self.norm(x_BTD), ids_BT))
