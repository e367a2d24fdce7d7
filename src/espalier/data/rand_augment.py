"""RandAugment on whole batches: a few operations of one strength, drawn anew for each image.

Cubuk et al. 2019, arxiv.org/abs/1909.13719: the 14 operations of figure 2, all equally likely. Their largest
strengths are those of AutoAugment (Cubuk et al. 2018, table 6, arxiv.org/abs/1805.09501). Every operation runs on the
whole batch and each image keeps its own, so there is no Python per sample; the five that move pixels share one warp.
"""

from collections.abc import Callable
from math import radians
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from espalier.config.ranges import Count
from espalier.data import colour
from espalier.data.augment import Augmentation, matrix, pick, warp

MAX_STRENGTH = 30  # the paper's scale
MAX_SHEAR = 0.3
MAX_SHIFT = 150 / 331  # of a side: 150 pixels of 331 in table 6
MAX_ANGLE = radians(30)
MAX_CHANGE = 0.9  # factors between 0.1 and 1.9
MAX_LOST_BITS = 4

ROTATE, SHEAR_X, SHEAR_Y, SHIFT_X, SHIFT_Y = range(5)
MOVES = 5
IDENTITY = 5
VALUES: tuple[Callable[[Tensor, Tensor, float], Tensor], ...] = (  # of (images, signs, strength in [0, 1])
    lambda x_BCHW, sign_B, strength: colour.brightness(x_BCHW, 1 + MAX_CHANGE * strength * sign_B),
    lambda x_BCHW, sign_B, strength: colour.contrast(x_BCHW, 1 + MAX_CHANGE * strength * sign_B),
    lambda x_BCHW, sign_B, strength: colour.saturation(x_BCHW, 1 + MAX_CHANGE * strength * sign_B),
    lambda x_BCHW, sign_B, strength: colour.sharpness(x_BCHW, 1 + MAX_CHANGE * strength * sign_B),
    lambda x_BCHW, sign_B, strength: colour.posterize(
        x_BCHW, torch.full_like(sign_B, 8 - round(MAX_LOST_BITS * strength))
    ),
    lambda x_BCHW, sign_B, strength: colour.solarize(x_BCHW, torch.full_like(sign_B, 1 - strength)),
    lambda x_BCHW, sign_B, strength: colour.auto_contrast(x_BCHW),
    lambda x_BCHW, sign_B, strength: colour.equalize(x_BCHW),
)
NUM_OPERATIONS = IDENTITY + 1 + len(VALUES)


def apply_operation(x_BCHW: Tensor, operation_B: Tensor, sign_B: Tensor, strength: float) -> Tensor:
    """Apply to each image its own operation, an integer in [0, NUM_OPERATIONS), with a `strength` in [0, 1]."""
    out = torch.where((operation_B < MOVES)[:, None, None, None], move(x_BCHW, operation_B, sign_B * strength), x_BCHW)
    for number, change in enumerate(VALUES, start=IDENTITY + 1):
        out = torch.where((operation_B == number)[:, None, None, None], change(x_BCHW, sign_B, strength), out)
    return out


def move(x_BCHW: Tensor, operation_B: Tensor, amount_B: Tensor) -> Tensor:
    """Rotate, shear or shift by `amount_B` in [-1, 1] of the largest strength; other operations change nothing."""
    height, width = x_BCHW.shape[2:]

    def only(operation: int, largest: float) -> Tensor:
        return amount_B * largest * (operation_B == operation)

    angle_B = only(ROTATE, MAX_ANGLE)
    cos, sin = angle_B.cos(), angle_B.sin()
    turn_B22 = matrix(cos, only(SHEAR_X, MAX_SHEAR) - sin, only(SHEAR_Y, MAX_SHEAR) + sin, cos)
    return warp(x_BCHW, turn_B22, torch.stack([only(SHIFT_X, MAX_SHIFT * width), only(SHIFT_Y, MAX_SHIFT * height)], 1))


class RandAugment(Augmentation):
    """Applies `num_operations` random operations per image, one after the other, all of strength `magnitude` of 30."""

    def __init__(self, num_operations: Count, magnitude: Annotated[int, Ge(0), Le(MAX_STRENGTH)]) -> None:
        self.num_draws = 2 * num_operations
        self.strength = magnitude / MAX_STRENGTH

    def __call__(self, x_BCHW: Tensor, y: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        for layer in range(0, self.num_draws, 2):
            operation_B = pick(u_BN[:, layer], NUM_OPERATIONS)
            sign_B = 1 - 2 * (u_BN[:, layer + 1] < 0.5).to(x_BCHW.dtype)
            x_BCHW = apply_operation(x_BCHW, operation_B, sign_B, self.strength)
        return x_BCHW, y
