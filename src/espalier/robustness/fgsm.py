"""The fast gradient sign method (Goodfellow et al. 2014, section 4, arxiv.org/abs/1412.6572)."""

from torch import Tensor

from espalier.data.loaders import Batch
from espalier.robustness.base import Attack, Loss, Range, Setting, gradient


class FGSM(Attack):
    """Makes one step, which is the worst where the network is linear."""

    def attack(self, loss: Loss, batch: Batch, epsilon: float, setting: Setting) -> Tensor:
        """Return the samples after the step."""
        return fgsm(loss, batch.x, batch.y, epsilon, setting.limits)


def fgsm(loss: Loss, x: Tensor, y_B: Tensor, epsilon: float, limits: Range) -> Tensor:
    """Step up the sign of the gradient by `epsilon`."""
    return (x + epsilon * gradient(loss, x, y_B).sign()).clamp(*limits)
