"""Occlusion: how far the output falls when a window of the sample is replaced by the baseline.

Zeiler and Fergus 2013, arXiv 1311.2901, section 4.2.
"""

from typing import ClassVar

from torch import Tensor, nn

from espalier.errors import require
from espalier.explain.base import EXTRA, Explainer, Setting, by_position


class Occlusion(Explainer):
    """Covers one window after the other."""

    package: ClassVar[str] = "captum"
    by_default: ClassVar[bool] = True

    def explain(self, model: nn.Module, x: Tensor, target: int, setting: Setting) -> Tensor:
        """Return the mean fall of the output over the windows that cover each position; they overlap by half."""
        stride = max(1, setting.patch // 2)
        is_image = x.ndim == 3
        attribution = (
            require("captum.attr", EXTRA)
            .Occlusion(model)
            .attribute(
                x[None],
                sliding_window_shapes=(len(x), setting.patch, setting.patch) if is_image else (1,),
                strides=(len(x), stride, stride) if is_image else (1,),
                baselines=setting.baseline[None],
                target=target,
                perturbations_per_eval=setting.batch_size,
            )
        )
        return by_position(attribution[0]) / (len(x) if is_image else 1)
