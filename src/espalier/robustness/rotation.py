"""A camera that is held askew."""

import math

from torch import Tensor

from espalier import seeding
from espalier.data.augment import rotate
from espalier.robustness.base import Corruption, Setting

STREAM = 102  # keeps these turns apart from other users of (seed, sample)
DEGREES = (6.0, 12.0, 18.0, 24.0, 30.0)  # in neither CIFAR-10-C nor ImageNet-C: up to RandAugment's 30


class Rotation(Corruption):
    """Turns each image to one side, which chance decides."""

    applies_to = ("images",)

    def corrupt(self, x: Tensor, index_B: Tensor, severity: int, setting: Setting) -> Tensor:
        """Return rotated images, black where nothing was."""
        return rotate(x, math.radians(DEGREES[severity - 1]) * turn(setting.seed, index_B).to(x.dtype))


def turn(seed: int, index_B: Tensor) -> Tensor:
    """Return 1 or -1 for each sample: to which side it is rotated."""
    return 1 - 2 * (seeding.uniform(seed, 0, index_B, 1, STREAM)[:, 0] < 0.5).float()
