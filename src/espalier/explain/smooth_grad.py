"""SmoothGrad: the gradient, averaged over noisy copies of the sample.

Smilkov et al. 2017, arXiv 1706.03825, section 3. A sensitivity: it says where the output would change, and adds up to
nothing.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.errors import require
from espalier.explain.base import EXTRA, Explainer, Setting, by_position


class SmoothGrad(Explainer):
    """Averages the gradient over noisy copies."""

    package: ClassVar[str] = "captum"
    by_default: ClassVar[bool] = True

    def explain(self, model: nn.Module, x: Tensor, target: int, setting: Setting) -> Tensor:
        """Return the mean gradient with its sign; the noise follows from the seed alone."""
        captum = require("captum.attr", EXTRA)
        method = captum.NoiseTunnel(captum.Saliency(model))
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(setting.seed)
            attribution = method.attribute(
                x[None].clone().requires_grad_(),
                nt_type="smoothgrad",
                nt_samples=setting.copies,
                nt_samples_batch_size=min(setting.copies, setting.batch_size),
                stdevs=setting.noise * float(x.max() - x.min()),
                target=target,
                abs=False,
            )
        return by_position(attribution[0])
