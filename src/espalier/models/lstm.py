"""A recurrent network over tokens, read in one direction or in both.

Hochreiter and Schmidhuber 1997, doi.org/10.1162/neco.1997.9.8.1735; both directions: Schuster and Paliwal 1997,
doi.org/10.1109/78.650093. Letters: B batch, T tokens, D features, K outputs.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from espalier.config.ranges import Count, Rate
from espalier.models.blocks import make_dropout
from espalier.models.embedding import embedding, masked_mean, require_tokens
from espalier.spec import PAD, Input

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class Recurrent(nn.Module):
    """`depth` layers of `width` features, after embeddings of the same width; the mean over all tokens is classified.

    A text gives the same answer however many padding tokens follow it: the direction that reads backwards starts at the
    last token of each text.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        num_outputs: Count,
        cell: Literal["lstm", "gru"],
        width: Count,
        depth: Count,
        bidirectional: bool,
        dropout: Rate,
    ) -> None:
        super().__init__()
        self.embedding = embedding(require_tokens(cell, inputs), width)
        self.dropout = make_dropout(dropout)
        self.forwards = CELLS[cell](width, width, depth, batch_first=True)
        self.backwards = CELLS[cell](width, width, depth, batch_first=True) if bidirectional else None
        self.head = nn.Linear(width * (2 if bidirectional else 1), num_outputs)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x_BTD = self.dropout(self.embedding(ids_BT))
        read_BTD, _ = self.forwards(x_BTD)
        if self.backwards is not None:
            order_BT1 = reversed_places(ids_BT).unsqueeze(2)
            turned_BTD, _ = self.backwards(x_BTD.gather(1, order_BT1.expand_as(x_BTD)))
            read_BTD = torch.cat((read_BTD, turned_BTD.gather(1, order_BT1.expand_as(turned_BTD))), dim=2)
        return self.head(self.dropout(masked_mean(read_BTD, ids_BT)))


def reversed_places(ids_BT: Tensor) -> Tensor:
    """Return the places of the tokens of each text from its last to its first, (B, T); padding keeps its place."""
    length_B1 = (ids_BT != PAD).sum(1, keepdim=True)
    place_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    return torch.where(place_BT < length_B1, length_B1 - 1 - place_BT, place_BT)
