"""Augmentations of pixel values: pure functions of a batch in [0, 1] first, then the option `colour_jitter`.

Letters: B batch, C channels, H height, W width. Factors have shape (B,); 1 leaves an image as it is, 0 removes
the property altogether. `equalize`, `auto_contrast`, `posterize` and `solarize` agree with Pillow on 8-bit images.
"""

from math import pi, sqrt
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from espalier.config.ranges import Share
from espalier.data.augment import Augmentation

HueTurn = Annotated[float, Ge(0), Le(0.5)]
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"
LEVELS = 256


def luma(x_BCHW: Tensor) -> Tensor:
    """Return the brightness as the eye weighs it, shape (B, 1, H, W).

    Raises:
        ValueError: the images have neither one channel nor three.
    """
    if x_BCHW.shape[1] == 1:
        return x_BCHW
    if x_BCHW.shape[1] != 3:
        raise ValueError(f"colour needs 1 or 3 channels, the data has {x_BCHW.shape[1]}; drop it from data.augment")
    red, green, blue = x_BCHW.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def blend(base_BCHW: Tensor, x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Return `base` at factor 0, `x` at 1, and the line through both beyond 1; clipped to [0, 1]."""
    return (base_BCHW + factor_B[:, None, None, None] * (x_BCHW - base_BCHW)).clamp_(0, 1)


def brightness(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Scale the brightness of each image; factor 0 gives black."""
    return (x_BCHW * factor_B[:, None, None, None]).clamp_(0, 1)


def contrast(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Scale the contrast of each image; factor 0 gives its mean brightness everywhere."""
    return blend(luma(x_BCHW).mean(dim=(1, 2, 3), keepdim=True), x_BCHW, factor_B)


def saturation(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Scale the saturation of each image; factor 0 gives grey, and grey images stay as they are."""
    return blend(luma(x_BCHW), x_BCHW, factor_B)


def sharpness(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Scale the sharpness of each image; factor 0 gives Pillow's SMOOTH (a 3x3 blur), and the outermost pixels stay."""
    blur = x_BCHW.clone()
    around = F.avg_pool2d(x_BCHW, kernel_size=3, stride=1, padding=1) * 9
    blur[:, :, 1:-1, 1:-1] = ((around + 4 * x_BCHW) / 13)[:, :, 1:-1, 1:-1]
    return blend(blur, x_BCHW, factor_B)


def hue(x_BCHW: Tensor, turn_B: Tensor) -> Tensor:
    """Turn colours around the grey axis by `turn_B` of a full circle; grey pixels stay (Rodrigues' formula).

    A third of a circle moves red to green, green to blue and blue to red. Clipped to [0, 1].
    """
    if x_BCHW.shape[1] == 1:
        return x_BCHW
    angle_B111 = (2 * pi * turn_B)[:, None, None, None]
    along = x_BCHW.mean(dim=1, keepdim=True)  # the part of a colour on the axis (1, 1, 1) / sqrt(3)
    across = (x_BCHW.roll(1, dims=1) - x_BCHW.roll(-1, dims=1)) / sqrt(3)  # axis x colour
    turned = along + (x_BCHW - along) * angle_B111.cos() + across * angle_B111.sin()
    return turned.clamp_(0, 1)


def posterize(x_BCHW: Tensor, bits_B: Tensor) -> Tensor:
    """Keep the `bits_B` highest of 8 bits."""
    step = torch.exp2(8.0 - bits_B)[:, None, None, None]
    return (to_levels(x_BCHW) / step).floor() * step / (LEVELS - 1)


def solarize(x_BCHW: Tensor, threshold_B: Tensor) -> Tensor:
    """Invert values of at least `threshold_B`."""
    return torch.where(x_BCHW >= threshold_B[:, None, None, None], 1 - x_BCHW, x_BCHW)


def auto_contrast(x_BCHW: Tensor) -> Tensor:
    """Stretch each channel so that its darkest value is 0 and its brightest 1; constant channels stay."""
    low, high = x_BCHW.amin(dim=(2, 3), keepdim=True), x_BCHW.amax(dim=(2, 3), keepdim=True)
    is_constant = high <= low
    return torch.where(is_constant, x_BCHW, (x_BCHW - low) / torch.where(is_constant, 1.0, high - low))


def equalize(x_BCHW: Tensor) -> Tensor:
    """Flatten the histogram of 256 levels of each channel, by one table per channel."""
    level = to_levels(x_BCHW).long().flatten(2)  # (B, C, H * W)
    counts = x_BCHW.new_zeros(*level.shape[:2], LEVELS).scatter_add_(
        2, level, torch.ones_like(level, dtype=x_BCHW.dtype)
    )
    brightest = counts.gather(2, level.amax(dim=2, keepdim=True))
    step = ((level.shape[2] - brightest) / (LEVELS - 1)).floor()
    below = counts.cumsum(dim=2) - counts
    table = (((step / 2).floor() + below) / step.clamp(min=1)).floor().clamp_(max=LEVELS - 1) / (LEVELS - 1)
    return torch.where(step[..., None] > 0, table.gather(2, level).view_as(x_BCHW), x_BCHW)


def to_levels(x_BCHW: Tensor) -> Tensor:
    """Return the 8-bit value of each pixel, still float."""
    return (x_BCHW * (LEVELS - 1)).round()


class ColourJitter(Augmentation):
    """Changes brightness, contrast, saturation and hue at random, in this order.

    The first three are multiplied by a factor in [1 - v, 1 + v]; hue turns by up to `hue` of the colour circle.
    """

    num_draws = 4

    def __init__(self, brightness: Share, contrast: Share, saturation: Share, hue: HueTurn) -> None:
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue

    def __call__(self, x_BCHW: Tensor, y: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        signed_BN = 2 * u_BN - 1
        if self.brightness:
            x_BCHW = brightness(x_BCHW, 1 + self.brightness * signed_BN[:, 0])
        if self.contrast:
            x_BCHW = contrast(x_BCHW, 1 + self.contrast * signed_BN[:, 1])
        if self.saturation:
            x_BCHW = saturation(x_BCHW, 1 + self.saturation * signed_BN[:, 2])
        if self.hue:
            x_BCHW = hue(x_BCHW, self.hue * signed_BN[:, 3])
        return x_BCHW, y
