"""Images and tables made worse on purpose, in five severities: what a network meets outside the laboratory.

The idea and the strengths are those of ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich 2019,
arxiv.org/abs/1903.12261; github.com/hendrycks/robustness, make_imagenet_c.py and make_cifar_c.py). Everything is a
pure function of images in [0, 1]; what is random is keyed by the seed and the index of the sample, so a sample is
disturbed alike in any batch.
Letters: B batch, C channels, H height, W width, N numbers per sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier import seeding
from espalier.data.augment import rotate

SEVERITIES = (1, 2, 3, 4, 5)
NOISE_STREAM, TURN_STREAM = 101, 102  # keep these numbers apart from other users of (seed, sample)
SMALL_SIDE = 64  # pixels of the shorter side; below, CIFAR-10-C's strengths stand for ImageNet-C's
FULL_SIDE = 224  # of ImageNet-C, whose blur is stated in pixels of such images
BLUR_REACH = 4  # standard deviations at which the kernel ends, as in scipy.ndimage


@dataclass(frozen=True)
class Strengths:
    """One number per severity for each way of making images worse."""

    noise: Sequence[float]  # standard deviation, of the pixel range
    blur: Sequence[float]  # standard deviation of the kernel, in pixels
    contrast: Sequence[float]  # factor on the distance from the mean
    brightness: Sequence[float]  # added to the value (HSV), of the pixel range
    rotation: Sequence[float] = (6.0, 12.0, 18.0, 24.0, 30.0)  # degrees; in neither set: up to RandAugment's 30


IMAGENET_C = Strengths(
    noise=(0.08, 0.12, 0.18, 0.26, 0.38),
    blur=(1.0, 2.0, 3.0, 4.0, 6.0),
    contrast=(0.4, 0.3, 0.2, 0.1, 0.05),
    brightness=(0.1, 0.2, 0.3, 0.4, 0.5),
)
CIFAR_C = Strengths(
    noise=(0.04, 0.06, 0.08, 0.09, 0.10),
    blur=(0.4, 0.6, 0.7, 0.8, 1.0),
    contrast=(0.75, 0.5, 0.4, 0.3, 0.15),
    brightness=(0.05, 0.1, 0.15, 0.2, 0.3),
)
TABLE_NOISE = (0.1, 0.2, 0.3, 0.4, 0.5)  # standard deviations of the feature in training; no benchmark states any


def corrupt_images(name: str, x_BCHW: Tensor, severity: int, seed: int, index_B: Tensor) -> Tensor:
    """Images in [0, 1] after one corruption, `name` of `Strengths`, in [0, 1] again."""
    side = min(x_BCHW.shape[2:])
    strength = getattr(CIFAR_C if side < SMALL_SIDE else IMAGENET_C, name)[severity - 1]
    if name == "noise":
        return noise(x_BCHW, strength, seed, index_B).clamp(0, 1)
    if name == "blur":
        return blur(x_BCHW, strength if side < SMALL_SIDE else strength * side / FULL_SIDE)
    if name == "contrast":
        return contrast(x_BCHW, strength)
    if name == "brightness":
        return brightness(x_BCHW, strength)
    return rotate(x_BCHW, math.radians(strength) * turn(seed, index_B).to(x_BCHW.dtype))


def corrupt_table(x_BN: Tensor, severity: int, seed: int, index_B: Tensor) -> Tensor:
    """Features in standard deviations, under noise of `TABLE_NOISE`."""
    return noise(x_BN, TABLE_NOISE[severity - 1], seed, index_B)


def noise(x: Tensor, deviation: float, seed: int, index_B: Tensor) -> Tensor:
    """Plus Gaussian noise, not clipped; the same noise at each severity, only larger.

    Two uniform numbers make a Gaussian one (Box and Muller 1958, doi.org/10.1214/aoms/1177706645).
    """
    num = x[0].numel()
    first_BN, second_BN = seeding.uniform(seed, 0, index_B, 2 * num, NOISE_STREAM).split(num, dim=1)
    radius_BN = (-2 * torch.log1p(-first_BN)).sqrt()  # 1 - u lies in (0, 1], so the logarithm is finite
    return x + deviation * (radius_BN * (2 * math.pi * second_BN).cos()).view_as(x)


def turn(seed: int, index_B: Tensor) -> Tensor:
    """1 or -1 for each sample: to which side it is rotated."""
    return 1 - 2 * (seeding.uniform(seed, 0, index_B, 1, TURN_STREAM)[:, 0] < 0.5).float()


def blur(x_BCHW: Tensor, deviation: float) -> Tensor:
    """Gaussian blur; the pixels at the border go on outside."""
    reach = int(BLUR_REACH * deviation + 0.5)
    place_N = torch.arange(-reach, reach + 1, dtype=x_BCHW.dtype, device=x_BCHW.device)
    weight_N = torch.exp(-0.5 * (place_N / deviation).square())
    weight_N = weight_N / weight_N.sum()
    channels = x_BCHW.shape[1]
    for down, right in ((reach, 0), (0, reach)):  # a Gaussian is a column after a row
        kernel = weight_N.view(1, 1, 2 * down + 1, 2 * right + 1).expand(channels, -1, -1, -1)
        padded = F.pad(x_BCHW, (right, right, down, down), mode="replicate")
        x_BCHW = F.conv2d(padded, kernel, groups=channels)
    return x_BCHW


def contrast(x_BCHW: Tensor, factor: float) -> Tensor:
    """Closer to the mean of the channel; 0 leaves nothing else."""
    mean_BC11 = x_BCHW.mean(dim=(2, 3), keepdim=True)
    return (mean_BC11 + factor * (x_BCHW - mean_BC11)).clamp(0, 1)


def brightness(x_BCHW: Tensor, amount: float) -> Tensor:
    """Add `amount` to the value of HSV, which is the largest channel; hue and saturation stay, white is the limit."""
    value_B1HW = x_BCHW.amax(dim=1, keepdim=True)
    brighter_B1HW = (value_B1HW + amount).clamp(0, 1)
    is_black = value_B1HW == 0  # it has no colour to keep, and becomes grey
    return torch.where(is_black, brighter_B1HW, x_BCHW * (brighter_B1HW / torch.where(is_black, 1.0, value_B1HW)))
