"""Integrated gradients: the gradient, averaged on the straight path from the baseline to the sample, times their gap.

Sundararajan, Taly and Yan 2017, arXiv 1703.01365, section 3. By Gauss-Legendre quadrature, the rule of Captum that
needs fewest steps.
"""

from torch import Tensor, nn

from espalier.errors import require
from espalier.explain.base import EXTRA, Setting, by_position, scores

PACKAGE = "captum.attr"
BY_DEFAULT = True


def explain(model: nn.Module, x: Tensor, target: int, setting: Setting) -> Tensor:
    """The map adds up to the output of x minus that of the baseline (completeness), as far as the steps suffice."""
    method = require(PACKAGE, EXTRA).IntegratedGradients(model)
    attribution = method.attribute(
        x[None].clone().requires_grad_(),
        setting.baseline[None],
        target=target,
        n_steps=setting.steps,
        method="gausslegendre",
        internal_batch_size=setting.batch_size,
    )
    return by_position(attribution[0])


def reference(model: nn.Module, target: int, setting: Setting) -> Tensor:
    """The output of the baseline."""
    return scores(model, setting.baseline[None], target, setting.batch_size)
