"""Gaussian noise, as in CIFAR-10-C and ImageNet-C."""

import math

import torch
from torch import Tensor

from espalier import seeding
from espalier.robustness.base import Corruption, Setting, strength

STREAM = 101  # keeps this noise apart from other users of (seed, sample)
SMALL = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation, of the pixel range
LARGE = (0.08, 0.12, 0.18, 0.26, 0.38)
TABLE = (0.1, 0.2, 0.3, 0.4, 0.5)  # standard deviations of the feature in training; no benchmark states any


class Noise(Corruption):
    """Measures each value with an error."""

    applies_to = ("images", "tables")

    def corrupt(self, x: Tensor, index_B: Tensor, severity: int, setting: Setting) -> Tensor:
        """Return samples with noise; what leaves the limits is clipped."""
        deviation = strength(x, severity, SMALL, LARGE) if setting.kind == "images" else TABLE[severity - 1]
        return noise(x, deviation, setting.seed, index_B).clamp(*setting.limits)


def noise(x: Tensor, deviation: float, seed: int, index_B: Tensor) -> Tensor:
    """Add Gaussian noise, not clipped; the same noise at each severity, only larger.

    Two uniform numbers make a Gaussian one (Box and Muller 1958, doi.org/10.1214/aoms/1177706645).
    Letters: B batch, N numbers per sample.
    """
    num = x[0].numel()
    first_BN, second_BN = seeding.uniform(seed, 0, index_B, 2 * num, STREAM).split(num, dim=1)
    radius_BN = (-2 * torch.log1p(-first_BN)).sqrt()  # 1 - u lies in (0, 1], so the logarithm is finite
    return x + deviation * (radius_BN * (2 * math.pi * second_BN).cos()).view_as(x)
