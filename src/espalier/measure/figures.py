"""Figures of a run, drawn off screen: curves, a confusion matrix, predicted against true.

`Figure` objects only: pyplot keeps global state, picks a backend and would open windows.
Colours are those of Okabe and Ito (2008, jfly.uni-koeln.de/color), which colour-blind readers can tell apart.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"
COLOURS = {"train": BLUE, "val": ORANGE}
STYLE: Any = {  # matplotlib types the keys as one Literal of 300 names
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
}
LOWER_IS_BETTER = ("loss", "error", "rmse", "mse", "mae", "perplexity")
MAX_PANELS = 4  # loss and the first metrics; the rest is in metrics.csv
MAX_NAMED_CLASSES = 30  # names and cell numbers of a larger confusion matrix would not be readable
MAX_POINTS = 5_000  # of a scatter plot: more only makes it darker

Series = dict[str, list[tuple[float, float]]]  # split -> (epoch, value)


def curves(metrics_csv: Path, target: Path) -> None:
    """One panel per metric, training and validation over epochs, the best validation epoch marked.

    Raises:
        ValueError: no metric was logged per epoch.
    """
    panels = _per_epoch(metrics_csv)
    if not panels:
        raise ValueError(f"{metrics_csv} holds no train/ or val/ metric with an epoch; nothing to draw")
    names = sorted(panels, key=lambda name: (name != "loss", len(panels[name]) < 2))[:MAX_PANELS]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * min(len(names), 2), 3.4 * math.ceil(len(names) / 2)), layout="constrained")
        for place, name in enumerate(names, start=1):
            axes = figure.add_subplot(math.ceil(len(names) / 2), min(len(names), 2), place)
            _draw_curve(axes, name, panels[name])
        _save(figure, target)


def confusion_matrix(matrix: Tensor | NDArray[Any], class_names: Sequence[str], target: Path) -> None:
    """Rows are true classes, columns predicted ones, shape (K, K) of counts; colour is the share of the true class."""
    num_classes = len(class_names)
    counts_KK = torch.as_tensor(matrix).detach().cpu().double()
    share_KK = counts_KK / counts_KK.sum(dim=1, keepdim=True).clamp(min=1)
    accuracy = counts_KK.diagonal().sum() / counts_KK.sum().clamp(min=1)
    is_named = num_classes <= MAX_NAMED_CLASSES
    side = min(max(4.2, 0.42 * num_classes + 2.2), 12) if is_named else 7
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(share_KK.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        if is_named:
            _name_classes(axes, class_names)
            _write_counts(axes, counts_KK, share_KK)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"accuracy {accuracy:.2%} over {int(counts_KK.sum()):,} samples")
        figure.colorbar(image, ax=axes, shrink=0.75, label="share of the true class")
        _save(figure, target)


def predicted_vs_true(predicted: Tensor | NDArray[Any], true: Tensor | NDArray[Any], target: Path) -> None:
    """Scatter of a regression, both shape (N,), in the unit of the target; a perfect model lies on the diagonal."""
    predicted_N, true_N = (torch.as_tensor(values).detach().cpu().double().flatten() for values in (predicted, true))
    rmse = (predicted_N - true_N).square().mean().sqrt()
    stride = math.ceil(len(true_N) / MAX_POINTS)
    low = float(min(predicted_N.min(), true_N.min()))
    high = float(max(predicted_N.max(), true_N.max()))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 4.8), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--")
        axes.scatter(true_N[::stride].numpy(), predicted_N[::stride].numpy(), s=14, alpha=0.6, color=BLUE, linewidths=0)
        axes.set(xlabel="true", ylabel="predicted", aspect="equal")
        axes.set_title(f"RMSE {rmse:.4g} over {len(true_N):,} samples")
        _save(figure, target)


def _per_epoch(metrics_csv: Path) -> dict[str, Series]:
    """Metric name without its split -> split -> points; of several rows of an epoch the last counts."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    with metrics_csv.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for column, text in row.items():
                split, _, name = column.partition("/")
                if split in COLOURS and text and row.get("epoch"):
                    epoch = int(float(row["epoch"])) + 1
                    values.setdefault(name, {}).setdefault(split, {})[epoch] = float(text)
    return {
        name: {split: sorted(points.items()) for split, points in sorted(splits.items())}
        for name, splits in values.items()
    }


def _draw_curve(axes: Axes, name: str, series: Series) -> None:
    for split, points in series.items():
        finite = [(epoch, value) for epoch, value in points if math.isfinite(value)]
        marker = "o" if len(finite) < 2 else ""
        axes.plot(*_columns(finite), color=COLOURS[split], linewidth=1.8, label=split, marker=marker)
        if split == "val" and finite:
            pick = min if name.endswith(LOWER_IS_BETTER) else max
            epoch, value = pick(finite, key=lambda point: point[1])
            label = f"best {value:.4g}, epoch {epoch}"
            axes.plot([epoch], [value], "o", color=COLOURS[split], markersize=7, markeredgecolor="white", label=label)
    positive = [value for points in series.values() for _, value in points if value > 0]
    if name == "loss" and positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    axes.set_title(name.replace("_", " "))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.legend(fontsize=9)


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]


def _name_classes(axes: Axes, class_names: Sequence[str]) -> None:
    places = range(len(class_names))
    is_long = max(map(len, class_names)) > 3
    axes.set_xticks(places, class_names, rotation=45 if is_long else 0, ha="right" if is_long else "center")
    axes.set_yticks(places, class_names)
    axes.tick_params(length=0)


def _write_counts(axes: Axes, counts_KK: Tensor, share_KK: Tensor) -> None:
    """The count in each cell that holds one; white on dark cells."""
    size = 10 if len(counts_KK) <= 12 else 7
    for row, column in counts_KK.nonzero().tolist():
        colour = "white" if share_KK[row, column] > 0.55 else "black"
        text = f"{int(counts_KK[row, column])}"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _save(figure: Figure, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(str(target))
