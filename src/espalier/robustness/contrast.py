"""Low contrast, as in CIFAR-10-C and ImageNet-C. Letters: B batch, C channels, H height, W width."""

from torch import Tensor

from espalier.robustness.base import Corruption, Setting, strength

SMALL = (0.75, 0.5, 0.4, 0.3, 0.15)  # factor on the distance from the mean
LARGE = (0.4, 0.3, 0.2, 0.1, 0.05)


class Contrast(Corruption):
    """Sees images through fog or in bad light."""

    applies_to = ("images",)

    def corrupt(self, x: Tensor, index_B: Tensor, severity: int, setting: Setting) -> Tensor:
        """Return fainter images."""
        return contrast(x, strength(x, severity, SMALL, LARGE))


def contrast(x_BCHW: Tensor, factor: float) -> Tensor:
    """Move each pixel closer to the mean of its channel; 0 leaves nothing else."""
    mean_BC11 = x_BCHW.mean(dim=(2, 3), keepdim=True)
    return (mean_BC11 + factor * (x_BCHW - mean_BC11)).clamp(0, 1)
