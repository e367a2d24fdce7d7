"""A recurrent network over tokens, read from the first to the last.

LSTM: Hochreiter and Schmidhuber 1997, doi.org/10.1162/neco.1997.9.8.1735; GRU: Cho et al. 2014, arXiv 1406.1078.
Letters: B batch, T tokens, D features, K outputs.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from espalier.config.ranges import Count, Rate
from espalier.models.blocks import make_dropout
from espalier.models.embedding import embedding, masked_mean, require_tokens
from espalier.spec import Input

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class Recurrent(nn.Module):
    """`depth` layers of `width` features, after embeddings of the same width; the mean over all tokens is classified.

    A text answers alike however many padding tokens follow it, as no token sees those behind it. Reading in both
    directions would need the length of each text, for which torch.export has no graph.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        num_outputs: Count,
        cell: Literal["lstm", "gru"],
        width: Count,
        depth: Count,
        dropout: Rate,
    ) -> None:
        super().__init__()
        self.embedding = embedding(require_tokens(cell, inputs), width)
        self.dropout = make_dropout(dropout)
        self.layers = CELLS[cell](width, width, depth, batch_first=True)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits (B, K)."""
        read_BTD, _ = self.layers(self.dropout(self.embedding(ids_BT)))
        return self.head(self.dropout(masked_mean(read_BTD, ids_BT)))
