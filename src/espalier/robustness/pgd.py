"""Projected gradient descent from a random start (Madry et al. 2017, section 2.1, arxiv.org/abs/1706.06083).

Letters: B batch, N numbers per sample.
"""

import torch
from torch import Tensor

from espalier import seeding
from espalier.data.loaders import Batch
from espalier.robustness.base import Attack, Loss, Range, Setting, gradient

STREAM = 103  # keeps the random starts apart from other users of (seed, sample)
STEPS = 20  # as the paper attacks networks for CIFAR-10, table 2
STRIDE = 2.5  # times epsilon, over all steps: enough to reach any border from any start; the same paper


class PGD(Attack):
    """Makes many small steps, each towards a higher loss."""

    def attack(self, loss: Loss, batch: Batch, epsilon: float, setting: Setting) -> Tensor:
        """Return the samples after the last step."""
        return pgd(loss, batch.x, batch.y, epsilon, setting.limits, setting.seed, batch.index)


def pgd(loss: Loss, x: Tensor, y_B: Tensor, epsilon: float, limits: Range, seed: int, index_B: Tensor) -> Tensor:
    """Make `STEPS` steps up the sign of the gradient, each brought back to within `epsilon` of the sample.

    The start depends on seed and sample alone.
    """
    low, high = (x - epsilon).clamp(*limits), (x + epsilon).clamp(*limits)
    start_BN = seeding.uniform(seed, 0, index_B, x[0].numel(), STREAM)
    moved = low + (high - low) * start_BN.view_as(x).to(x.dtype)
    for _ in range(STEPS):
        ahead = moved + STRIDE * epsilon / STEPS * gradient(loss, moved, y_B).sign()
        moved = torch.minimum(torch.maximum(ahead, low), high)
    return moved
