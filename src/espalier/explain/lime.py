"""LIME: a linear model of the network around one sample, fitted to perturbed copies that are weighted by nearness.

Ribeiro, Singh and Guestrin 2016, arXiv 1602.04938. Images: square pieces, switched off to the baseline. Tables:
features are drawn around the sample with the spread of the training samples; what a feature added is its weight times
its distance from the training mean. Letters: B batch, C channels, H height, W width, F features.
"""

from contextlib import redirect_stderr
from io import StringIO
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.errors import require
from espalier.explain.base import EXTRA, Explainer, Setting, pieces, scores, spread


class LIME(Explainer):
    """Fits a linear model to the network around one sample."""

    package: ClassVar[str] = "lime"

    def explain(self, model: nn.Module, x: Tensor, target: int, setting: Setting) -> Tensor:
        """Return the contributions of the linear model; they need not add up to the output."""
        return (_of_image if x.ndim == 3 else _of_table)(model, x, target, setting)


def _of_image(model: nn.Module, x_CHW: Tensor, target: int, setting: Setting) -> Tensor:
    piece_HW = pieces(x_CHW.shape, setting.patch)

    def output(image_BHWC: NDArray[Any]) -> NDArray[Any]:
        x_BCHW = torch.from_numpy(np.asarray(image_BHWC)).movedim(-1, 1).to(x_CHW)
        return scores(model, x_BCHW, target, setting.batch_size)[:, None].cpu().numpy()

    explainer = require("lime.lime_image", EXTRA).LimeImageExplainer(
        feature_selection="none", random_state=setting.seed % 2**32
    )
    with redirect_stderr(StringIO()):  # a progress bar per sample, which no argument switches off
        found = explainer.explain_instance(
            _channels_last(x_CHW),
            output,
            labels=(0,),
            top_labels=None,
            hide_color=_channels_last(setting.baseline),
            num_samples=setting.evaluations,
            batch_size=setting.batch_size,
            segmentation_fn=lambda _: piece_HW.numpy(),
        )
    return spread(_in_order(found.local_exp[0]), piece_HW)


def _of_table(model: nn.Module, x_F: Tensor, target: int, setting: Setting) -> Tensor:
    def output(x_BF: NDArray[Any]) -> NDArray[Any]:
        return scores(model, torch.from_numpy(x_BF).to(x_F), target, setting.batch_size).cpu().numpy()

    explainer = require("lime.lime_tabular", EXTRA).LimeTabularExplainer(
        setting.background.double().cpu().numpy(),
        mode="regression",
        discretize_continuous=False,
        feature_selection="none",
        sample_around_instance=True,
        random_state=setting.seed % 2**32,
    )
    num_features = len(x_F)
    row_F = x_F.double().cpu().numpy()
    found = explainer.explain_instance(row_F, output, num_features=num_features, num_samples=setting.evaluations)
    distance_F = (row_F - explainer.scaler.mean_) / explainer.scaler.scale_
    return _in_order(found.local_exp[1]) * torch.from_numpy(distance_F)


def _channels_last(x_CHW: Tensor) -> NDArray[Any]:
    return x_CHW.movedim(0, -1).double().cpu().numpy()


def _in_order(weights: list[tuple[int, float]]) -> Tensor:
    """Return the weights in the order of their pieces; LIME sorts them by size."""
    return torch.tensor([weight for _, weight in sorted(weights)], dtype=torch.float64)
