"""Augmentations that move or hide pixels: pure functions of a batch first, options of `data.augment` below.

Images are float in [0, 1]. Letters: B batch, C channels, H height, W width, N random numbers per sample.
An augmentation draws nothing itself: it receives uniform numbers that are keyed by (seed, epoch, sample), so the same
sample looks the same in any batch, on any rank and after a resume.
"""

from abc import ABC, abstractmethod
from math import log, radians
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor

from espalier.config.ranges import Share

Degrees = Annotated[float, Gt(0), Le(180)]
PartOfWhole = Annotated[float, Gt(0), Le(1)]


class Augmentation(ABC):
    """Changes the images of a batch, and its targets if it `mixes` samples; a pure function of its arguments."""

    num_draws: int  # columns of `u_BN` that it reads
    mixes: ClassVar[bool] = False  # combines neighbours in the batch; runs after all others

    @abstractmethod
    def __call__(self, x_BCHW: Tensor, y: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return changed images and targets; `u_BN` is uniform in [0, 1), float32, shape (B, num_draws)."""


def pick(u_B: Tensor, num: int) -> Tensor:
    """Return integers in [0, num), equally likely for uniform `u_B`."""
    return (u_B * num).long().clamp_(max=num - 1)  # 0.99999994 * 9 rounds to 9.0 in float32


def flip(x_BCHW: Tensor, is_flipped_B: Tensor) -> Tensor:
    """Mirror left and right those images for which `is_flipped_B` is true."""
    return torch.where(is_flipped_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)


def crop(x_BCHW: Tensor, top_B: Tensor, left_B: Tensor, pad_h: int, pad_w: int) -> Tensor:
    """Pad with black, then cut the original size out at (`top_B`, `left_B`), given in [0, 2 * pad]; one gather."""
    num, channels, height, width = x_BCHW.shape
    padded = F.pad(x_BCHW, (pad_w, pad_w, pad_h, pad_h))
    row_BH = top_B[:, None] + torch.arange(height, device=x_BCHW.device)
    column_BW = left_B[:, None] + torch.arange(width, device=x_BCHW.device)
    pixel = (row_BH[:, :, None] * (width + 2 * pad_w) + column_BW[:, None, :]).view(num, 1, height * width)
    return padded.flatten(2).gather(2, pixel.expand(-1, channels, -1)).view_as(x_BCHW)


def cutout(x_BCHW: Tensor, top_B: Tensor, left_B: Tensor, height: int, width: int) -> Tensor:
    """Black out a `height` x `width` box, whose upper left corner may lie outside the image."""
    box_BHW = box(x_BCHW, top_B, top_B + height, left_B, left_B + width)
    return x_BCHW.masked_fill(box_BHW[:, None], 0.0)


def box(x_BCHW: Tensor, top_B: Tensor, bottom_B: Tensor, left_B: Tensor, right_B: Tensor) -> Tensor:
    """Return a mask (B, H, W), True inside the box; `bottom_B` and `right_B` are exclusive."""
    row_H = torch.arange(x_BCHW.shape[2], device=x_BCHW.device)
    column_W = torch.arange(x_BCHW.shape[3], device=x_BCHW.device)
    in_row_BH = (row_H >= top_B[:, None]) & (row_H < bottom_B[:, None])
    in_column_BW = (column_W >= left_B[:, None]) & (column_W < right_B[:, None])
    return in_row_BH[:, :, None] & in_column_BW[:, None, :]


def warp(x_BCHW: Tensor, matrix_B22: Tensor, shift_B2: Tensor) -> Tensor:
    """Resample images by an affine map, bilinear and black outside: pixel p shows input position `matrix @ p + shift`.

    Positions are (right, down) in pixels from the centre of the image. One grid_sample for the whole batch.
    """
    height, width = x_BCHW.shape[2:]
    right_W = torch.arange(width, device=x_BCHW.device) + (0.5 - width / 2)
    down_H1 = (torch.arange(height, device=x_BCHW.device) + (0.5 - height / 2))[:, None]
    (a, b), (c, d) = ((cell[:, None, None] for cell in row.unbind(1)) for row in matrix_B22.unbind(1))
    shift_right, shift_down = (cell[:, None, None] for cell in shift_B2.unbind(1))
    from_right_BHW = a * right_W + b * down_H1 + shift_right
    from_down_BHW = c * right_W + d * down_H1 + shift_down
    grid_BHW2 = torch.stack([from_right_BHW * (2 / width), from_down_BHW * (2 / height)], dim=3)
    return F.grid_sample(x_BCHW, grid_BHW2.to(x_BCHW.dtype), mode="bilinear", align_corners=False)


def matrix(a_B: Tensor, b_B: Tensor, c_B: Tensor, d_B: Tensor) -> Tensor:
    """Return [[a, b], [c, d]] for each sample, shape (B, 2, 2)."""
    return torch.stack([a_B, b_B, c_B, d_B], dim=1).view(-1, 2, 2)


def rotate(x_BCHW: Tensor, angle_B: Tensor) -> Tensor:
    """Turn counter-clockwise by `angle_B` radians around the centre."""
    cos, sin = angle_B.cos(), angle_B.sin()
    return warp(x_BCHW, matrix(cos, -sin, sin, cos), angle_B.new_zeros(len(angle_B), 2))


def resized_crop(x_BCHW: Tensor, height_B: Tensor, width_B: Tensor, down_B: Tensor, right_B: Tensor) -> Tensor:
    """Enlarge a window to the full image; its size and the shift of its centre are shares of the image's sides."""
    height, width = x_BCHW.shape[2:]
    zero = torch.zeros_like(height_B)
    return warp(x_BCHW, matrix(width_B, zero, zero, height_B), torch.stack([right_B * width, down_B * height], dim=1))


class Crop(Augmentation):
    """Shifts images by whole pixels at random, up to `padding` of each side (0.125: 1 of 8 pixels, 4 of 32)."""

    num_draws = 2

    def __init__(self, padding: PartOfWhole) -> None:
        self.padding = padding

    def __call__(self, x_BCHW: Tensor, y: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        pad_h, pad_w = (round(self.padding * side) for side in x_BCHW.shape[2:])
        top_B, left_B = pick(u_BN[:, 0], 2 * pad_h + 1), pick(u_BN[:, 1], 2 * pad_w + 1)
        return crop(x_BCHW, top_B, left_B, pad_h, pad_w), y


class Flip(Augmentation):
    """Mirrors images left and right with `probability`."""

    num_draws = 1

    def __init__(self, probability: Share) -> None:
        self.probability = probability

    def __call__(self, x_BCHW: Tensor, y: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        return flip(x_BCHW, u_BN[:, 0] < self.probability), y


class Rotation(Augmentation):
    """Turns images by an angle between -`degrees` and `degrees`, all equally likely."""

    num_draws = 1

    def __init__(self, degrees: Degrees) -> None:
        self.limit = radians(degrees)

    def __call__(self, x_BCHW: Tensor, y: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(x_BCHW, (2 * u_BN[:, 0] - 1) * self.limit), y


class ResizedCrop(Augmentation):
    """Enlarges a random window of at least `min_area` of the image; aspect ratio between 3/4 and 4/3.

    The Inception crop (Szegedy et al. 2014, section 6, arxiv.org/abs/1409.4842), here of the image at training size.
    """

    num_draws = 4
    max_log_aspect = log(4 / 3)

    def __init__(self, min_area: PartOfWhole) -> None:
        self.min_area = min_area

    def __call__(self, x_BCHW: Tensor, y: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        area_B = self.min_area + (1 - self.min_area) * u_BN[:, 0]
        aspect_B = ((2 * u_BN[:, 1] - 1) * self.max_log_aspect).exp()
        height_B = (area_B / aspect_B).sqrt().clamp_(max=1)
        width_B = (area_B * aspect_B).sqrt().clamp_(max=1)
        down_B, right_B = (u_BN[:, 2] - 0.5) * (1 - height_B), (u_BN[:, 3] - 0.5) * (1 - width_B)
        return resized_crop(x_BCHW, height_B, width_B, down_B, right_B), y


class Cutout(Augmentation):
    """Blacks out a box with sides of `size` of the image's sides, centred on any pixel.

    The box is cut off at the border (DeVries and Taylor 2017, section 3, arxiv.org/abs/1708.04552).
    """

    num_draws = 2

    def __init__(self, size: PartOfWhole) -> None:
        self.size = size

    def __call__(self, x_BCHW: Tensor, y: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        height, width = (max(1, round(self.size * side)) for side in x_BCHW.shape[2:])
        top_B = pick(u_BN[:, 0], x_BCHW.shape[2]) - height // 2
        left_B = pick(u_BN[:, 1], x_BCHW.shape[3]) - width // 2
        return cutout(x_BCHW, top_B, left_B, height, width), y
