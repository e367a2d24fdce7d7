"""Gaussian blur, as in CIFAR-10-C and ImageNet-C.

Letters: B batch, C channels, H height, W width, N weights of the kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.robustness.base import Corruption, Setting, is_small, strength

SMALL = (0.4, 0.6, 0.7, 0.8, 1.0)  # standard deviation of the kernel, in pixels
LARGE = (1.0, 2.0, 3.0, 4.0, 6.0)  # the same, of images whose shorter side has 224
FULL_SIDE = 224
REACH = 4  # standard deviations at which the kernel ends, as in scipy.ndimage


class Blur(Corruption):
    """Sees images out of focus."""

    applies_to = ("images",)

    def corrupt(self, x: Tensor, index_B: Tensor, severity: int, setting: Setting) -> Tensor:
        """Return blurred images; the blur of large ones grows with their size."""
        deviation = strength(x, severity, SMALL, LARGE)
        return blur(x, deviation if is_small(x) else deviation * min(x.shape[2:]) / FULL_SIDE)


def blur(x_BCHW: Tensor, deviation: float) -> Tensor:
    """Convolve with a Gaussian; the pixels at the border go on outside."""
    reach = int(REACH * deviation + 0.5)
    place_N = torch.arange(-reach, reach + 1, dtype=x_BCHW.dtype, device=x_BCHW.device)
    weight_N = torch.exp(-0.5 * (place_N / deviation).square())
    weight_N = weight_N / weight_N.sum()
    channels = x_BCHW.shape[1]
    for down, right in ((reach, 0), (0, reach)):  # a Gaussian is a column after a row
        kernel = weight_N.view(1, 1, 2 * down + 1, 2 * right + 1).expand(channels, -1, -1, -1)
        padded = F.pad(x_BCHW, (right, right, down, down), mode="replicate")
        x_BCHW = F.conv2d(padded, kernel, groups=channels)
    return x_BCHW
