"""Figures that show where a network errs: calibration, its most confident errors, residuals, harm over severity.

Drawn as those in `figures.py`. Letters: N samples, K bins, E errors.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from espalier.reporting import report
from espalier.reporting.figures import ARTIFACTS, BLUE, GREY, MAX_POINTS, ORANGE, STYLE, save
from espalier.reporting.lettering import short

ERROR_COLUMNS = 6  # pictures in a row
MAX_ERRORS = 24
SHORT_NAME = 12  # letters of a class name below a picture; the rest would run into the next one


class Calibration(Protocol):
    """The findings of `targets.metrics.calibration`; each of shape (K,), `error` scalar."""

    @property
    def count(self) -> Tensor: ...
    @property
    def confidence(self) -> Tensor: ...
    @property
    def accuracy(self) -> Tensor: ...
    @property
    def error(self) -> Tensor: ...


def reliability(found: Calibration, target: Path) -> None:
    """Accuracy over confidence, with the diagonal of a perfect network, above the number of samples in each bin.

    Guo et al. 2017, figure 1, arxiv.org/abs/1706.04599.
    """
    num_bins = len(found.count)
    left_K = torch.arange(num_bins) / num_bins
    bar: dict[str, Any] = {"width": 0.92 / num_bins, "align": "edge"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 5.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.bar(left_K, found.accuracy.nan_to_num(), color=BLUE, alpha=0.75, label="accuracy", **bar)
        right_K = left_K + bar["width"]
        upper.hlines(found.confidence, left_K, right_K, color=ORANGE, linewidth=3, label="mean probability")
        upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
        upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        upper.set_title(f"calibration error {float(found.error):.4f} over {int(found.count.sum()):,} samples")
        upper.legend(loc="upper left", fontsize=9)
        lower.bar(left_K, found.count, color=GREY, **bar)
        lower.set_yscale("symlog", linthresh=1)  # a good network puts nearly all samples into the last bin
        lower.set(xlabel="probability of the predicted class", ylabel="samples", ylim=(0, None))
        save(figure, target)


def errors(
    x_BCHW: Tensor, true: Sequence[str], predicted: Sequence[str], confidence_B: Sequence[float], target: Path
) -> None:
    """Draw a grid of images in [0, 1], each with its true class, the predicted one and the probability of that."""
    columns = min(ERROR_COLUMNS, len(true))
    rows = math.ceil(len(true) / columns)
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.titlelocation": "center"}):
        figure = Figure(figsize=(max(3.2, 1.6 * columns), 1.95 * rows + 0.3), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid:
            axes.axis("off")
        for axes, x_CHW, is_class, said_class, confidence in zip(
            grid, x_BCHW, true, predicted, confidence_B, strict=False
        ):
            picture_HWC = x_CHW.clamp(0, 1).movedim(0, -1)
            axes.imshow(picture_HWC.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(
                f"is {short(is_class, SHORT_NAME)}\nsaid {short(said_class, SHORT_NAME)}, {confidence:.0%}", fontsize=8
            )
        figure.suptitle(f"most confident errors: {len(true)}", x=0.02, ha="left", fontsize=12)
        save(figure, target)


def residuals(predicted_N: Tensor, true_N: Tensor, target: Path) -> None:
    """Predicted minus true over predicted, and how often each size occurs; in the unit of the target."""
    residual_N = (predicted_N - true_N).double()
    stride = math.ceil(len(true_N) / MAX_POINTS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        left.axhline(0, color=GREY, linewidth=1, linestyle="--")
        left.scatter(predicted_N[::stride], residual_N[::stride], s=14, alpha=0.6, color=BLUE, linewidths=0)
        left.set(xlabel="predicted", ylabel="predicted - true")
        left.set_title(f"mean {residual_N.mean():.3g}, spread {residual_N.std(correction=0):.4g}")
        right.hist(residual_N.numpy(), bins="auto", orientation="horizontal", color=BLUE, alpha=0.7)
        right.axhline(0, color=GREY, linewidth=1, linestyle="--")
        right.set(xlabel="samples")
        right.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        save(figure, target)


def robustness(clean: float, harmed: Mapping[str, Sequence[float]], metric: str, target: Path) -> None:
    """Draw a metric over severity, a line per way of harming the samples; severity 0 is none."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(clean, color=GREY, linewidth=1, linestyle="--")
        for place, (name, values) in enumerate(harmed.items()):
            colour, marker = ARTIFACTS[1:][place % len(ARTIFACTS[1:])]
            axes.plot(range(len(values) + 1), [clean, *values], color=colour, marker=marker, linewidth=1.6, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="severity", ylabel=metric.replace("_", " "))
        axes.set_title(f"unharmed {report.number(clean)}")
        if metric == "accuracy":
            axes.set_ylim(0, 1.02)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
        save(figure, target)
