"""Samples changed as little as possible so that a network errs: white-box attacks within a largest change per value.

A change is bounded in each value (L-infinity), in the unit of the samples: the pixel range [0, 1] for images, standard
deviations for tables. Every function takes `loss`, from samples and targets to one number, and follows its gradient.
Letters: B batch, N numbers per sample.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from espalier import seeding

START_STREAM = 103  # keeps the random starts apart from other users of (seed, sample)
PIXEL_EPSILON = 16 / 255  # 16 levels of 8 bits: the largest of Kurakin et al. 2016, arxiv.org/abs/1611.01236
TABLE_EPSILON = 0.5  # standard deviations; no benchmark states any
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the largest change, per severity: 1, 2, 4, 8 and 16 of 255
PGD_STEPS = 20  # as Madry et al. 2017 attack networks for CIFAR-10, table 2, arxiv.org/abs/1706.06083
PGD_STRIDE = 2.5  # times epsilon, over all steps: enough to reach any border from any start; the same paper

NAMES: Sequence[str] = ("fgsm", "pgd")
Loss = Callable[[Tensor, Tensor], Tensor]  # samples (B, ...) and targets (B,) to a scalar
Range = tuple[float, float]  # what a value may be


def epsilon(largest: float, severity: int) -> float:
    """Return the change that an attack may make at a severity from 1 to 5."""
    return largest * SHARES[severity - 1]


def fgsm(loss: Loss, x: Tensor, y_B: Tensor, epsilon: float, limits: Range) -> Tensor:
    """One step up the sign of the gradient (Goodfellow et al. 2014, section 4, arxiv.org/abs/1412.6572)."""
    return (x + epsilon * _gradient(loss, x, y_B).sign()).clamp(*limits)


def pgd(loss: Loss, x: Tensor, y_B: Tensor, epsilon: float, limits: Range, seed: int, index_B: Tensor) -> Tensor:
    """`PGD_STEPS` such steps from a random start, each brought back to within `epsilon` of the sample.

    Madry et al. 2017, section 2.1, arxiv.org/abs/1706.06083. The start depends on seed and sample alone.
    """
    low, high = (x - epsilon).clamp(*limits), (x + epsilon).clamp(*limits)
    start_BN = seeding.uniform(seed, 0, index_B, x[0].numel(), START_STREAM)
    moved = low + (high - low) * start_BN.view_as(x).to(x.dtype)
    for _ in range(PGD_STEPS):
        ahead = moved + PGD_STRIDE * epsilon / PGD_STEPS * _gradient(loss, moved, y_B).sign()
        moved = torch.minimum(torch.maximum(ahead, low), high)
    return moved


def attack(
    name: str, loss: Loss, x: Tensor, y_B: Tensor, epsilon: float, limits: Range, seed: int, index_B: Tensor
) -> Tensor:
    """`fgsm` or `pgd`, by name."""
    if name == "fgsm":
        return fgsm(loss, x, y_B, epsilon, limits)
    return pgd(loss, x, y_B, epsilon, limits, seed, index_B)


def _gradient(loss: Loss, x: Tensor, y_B: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(loss(x, y_B), x)
    return found
