"""Tokens as vectors. Letters: B batch, T tokens, D features."""

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor, nn

from espalier.spec import FIRST, PAD, Input

BASE = 10_000.0  # of the wavelengths of `positions`


def require_tokens(model: str, inputs: Sequence[Input]) -> int:
    """Return the number of different ids of the only input.

    Raises:
        ValueError: the network reads something other than one sequence of tokens.
    """
    if len(inputs) != 1 or not inputs[0].is_tokens:
        kinds = " and ".join(each.kind for each in inputs)
        raise ValueError(f"{model} reads tokens, and a sample is {kinds}; choose a model for that, such as model=mlp")
    return len(inputs[0].vocabulary) + FIRST


def embedding(num_ids: int, width: int) -> nn.Embedding:
    """Return a vector of `width` features per id, drawn from a normal distribution; that of padding is zero."""
    return nn.Embedding(num_ids, width, padding_idx=PAD)


def positions(num_tokens: int, width: int, like: Tensor) -> Tensor:
    """Return sines and cosines of the position, (T, D) (Vaswani et al. 2017, section 3.5, arXiv 1706.03762)."""
    place_T1 = torch.arange(num_tokens, device=like.device, dtype=like.dtype).unsqueeze(1)
    rate_D = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=like.dtype) * (-log(BASE) / width))
    angle_TD = place_T1 * rate_D
    return torch.stack((angle_TD.sin(), angle_TD.cos()), dim=2).flatten(1)[:, :width]


def masked_mean(x_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the mean over the tokens that are no padding, (B, D)."""
    is_there_BT1 = (ids_BT != PAD).unsqueeze(2).to(x_BTD.dtype)
    return (x_BTD * is_there_BT1).sum(1) / is_there_BT1.sum(1)
