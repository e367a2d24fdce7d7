"""Augmentations that mix a sample with its neighbour in the batch, and its target with it.

The neighbour is the batch rolled by one. The share of the own sample is drawn from Beta(alpha, alpha) through the
inverse of its distribution function at a keyed uniform number. Targets of a classification become probabilities (B, K).
Letters: B batch, C channels, H height, W width, N random numbers per sample.
"""

import torch
from scipy.special import betaincinv
from torch import Tensor

from espalier.config.ranges import Positive, Share
from espalier.data.augment import Augmentation, box, pick

GRID = 4096  # intervals of the table; the error of linear interpolation stays below 1e-3 for alpha >= 0.1


def mixup(x_BCHW: Tensor, y: Tensor, keep_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return `keep * own + (1 - keep) * neighbour`, of images and of targets.

    Zhang et al. 2017, arxiv.org/abs/1710.09412.
    """
    return mix(x_BCHW, keep_B), mix(y, keep_B)


def cutmix(x_BCHW: Tensor, y: Tensor, keep_B: Tensor, row_B: Tensor, column_B: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a box of the neighbour over `1 - keep` of the image (Yun et al. 2019, section 3, arxiv.org/abs/1905.04899).

    The box has the image's aspect ratio and its centre at (`row_B`, `column_B`); targets are mixed by the area that
    is really covered, because the border may cut the box off.
    """
    height, width = x_BCHW.shape[2:]
    side_B = (1 - keep_B).sqrt()
    box_h_B, box_w_B = (side_B * height).round().long(), (side_B * width).round().long()
    top_B, left_B = row_B - box_h_B // 2, column_B - box_w_B // 2
    box_BHW = box(x_BCHW, top_B, top_B + box_h_B, left_B, left_B + box_w_B)
    own_B = 1 - box_BHW.sum(dim=(1, 2)) / (height * width)
    return torch.where(box_BHW[:, None], x_BCHW.roll(1, dims=0), x_BCHW), mix(y, own_B)


def mix(value: Tensor, keep_B: Tensor) -> Tensor:
    """Return each value mixed with that of its neighbour, weighted by `keep_B`; any shape with the batch first."""
    return torch.lerp(value.roll(1, dims=0), value, keep_B.view(-1, *[1] * (value.ndim - 1)))  # exact where keep is 1


class BetaQuantile:
    """The inverse distribution function of Beta(alpha, alpha), as a table that follows its argument to the device."""

    def __init__(self, alpha: float) -> None:
        grid = torch.linspace(0, 1, GRID + 1, dtype=torch.float64)
        self.table = torch.from_numpy(betaincinv(alpha, alpha, grid.numpy())).float()

    def __call__(self, u_B: Tensor) -> Tensor:
        self.table = self.table.to(u_B.device)  # a copy on the first call only
        place_B = u_B * GRID
        low_B = place_B.long().clamp_(max=GRID - 1)
        low, high = self.table[low_B], self.table[low_B + 1]
        return low + (place_B - low_B) * (high - low)


class Mixup(Augmentation):
    """Blends neighbours with `probability`, in shares drawn from Beta(`alpha`, `alpha`); small `alpha` mixes little."""

    num_draws = 2
    mixes = True

    def __init__(self, alpha: Positive, probability: Share) -> None:
        self.quantile = BetaQuantile(alpha)
        self.probability = probability

    def __call__(self, x_BCHW: Tensor, y: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        keep_B = self.quantile(u_BN[:, 0])
        return mixup(x_BCHW, y, torch.where(u_BN[:, 1] < self.probability, keep_B, 1.0))


class CutMix(Augmentation):
    """Pastes a box of the neighbour with `probability`; the kept area is drawn from Beta(`alpha`, `alpha`)."""

    num_draws = 4
    mixes = True

    def __init__(self, alpha: Positive, probability: Share) -> None:
        self.quantile = BetaQuantile(alpha)
        self.probability = probability

    def __call__(self, x_BCHW: Tensor, y: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        keep_B = self.quantile(u_BN[:, 0])
        row_B, column_B = pick(u_BN[:, 2], x_BCHW.shape[2]), pick(u_BN[:, 3], x_BCHW.shape[3])
        return cutmix(x_BCHW, y, torch.where(u_BN[:, 1] < self.probability, keep_B, 1.0), row_B, column_B)
