"""Too much light, as in CIFAR-10-C and ImageNet-C. Letters: B batch, C channels, H height, W width."""

import torch
from torch import Tensor

from espalier.robustness.base import Corruption, Setting, strength

SMALL = (0.05, 0.1, 0.15, 0.2, 0.3)  # added to the value of HSV, of the pixel range
LARGE = (0.1, 0.2, 0.3, 0.4, 0.5)


class Brightness(Corruption):
    """Exposes images for too long."""

    applies_to = ("images",)

    def corrupt(self, x: Tensor, index_B: Tensor, severity: int, setting: Setting) -> Tensor:
        """Return brighter images."""
        return brightness(x, strength(x, severity, SMALL, LARGE))


def brightness(x_BCHW: Tensor, amount: float) -> Tensor:
    """Add `amount` to the value of HSV, which is the largest channel; hue and saturation stay, white is the limit."""
    value_B1HW = x_BCHW.amax(dim=1, keepdim=True)
    brighter_B1HW = (value_B1HW + amount).clamp(0, 1)
    is_black = value_B1HW == 0  # it has no colour to keep, and becomes grey
    return torch.where(is_black, brighter_B1HW, x_BCHW * (brighter_B1HW / torch.where(is_black, 1.0, value_B1HW)))
