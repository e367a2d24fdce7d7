"""Convolutions over words, the strongest answer of each filter, a linear layer.

Kim 2014, arXiv 1408.5882. Letters: B batch, T tokens, D features, C channels, K outputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espalier.config.ranges import Count, Rate
from espalier.models.blocks import make_dropout
from espalier.models.embedding import embedding, require_tokens
from espalier.spec import PAD, Input


class TextCNN(nn.Module):
    """`channels` filters of each width in `kernels`, over embeddings of `width` features; padding changes nothing."""

    def __init__(
        self,
        inputs: Sequence[Input],
        num_outputs: Count,
        width: Count,
        kernels: Sequence[Count],
        channels: Count,
        dropout: Rate,
    ) -> None:
        super().__init__()
        if not kernels:
            raise ValueError("model.kernels=[]: a network without filters reads nothing; name a width, such as [3]")
        self.embedding = embedding(require_tokens("text_cnn", inputs), width)
        self.convs = nn.ModuleList(nn.Conv1d(width, channels, kernel) for kernel in kernels)
        self.pads = [((kernel - 1) // 2, kernel // 2) for kernel in kernels]
        self.act = nn.ReLU()
        self.dropout = make_dropout(dropout)
        self.head = nn.Linear(len(kernels) * channels, num_outputs)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x_BDT = self.embedding(ids_BT).transpose(1, 2)
        is_there_B1T = (ids_BT != PAD).unsqueeze(1).to(x_BDT.dtype)
        best = [
            (self.act(conv(nn.functional.pad(x_BDT, pad))) * is_there_B1T).amax(2)  # no answer is below zero
            for conv, pad in zip(self.convs, self.pads, strict=True)
        ]
        return self.head(self.dropout(torch.cat(best, dim=1)))
