"""Figures of a run, drawn off screen: curves, a confusion matrix, predicted against true, what compression costs.

`Figure` objects only: pyplot keeps global state, picks a backend and would open windows.
Colours are those of Okabe and Ito (2008, jfly.uni-koeln.de/color), which colour-blind readers can tell apart.
"""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from torch import Tensor

from espalier.reporting import lettering, report

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"
COLOURS = {"train": BLUE, "val": ORANGE}
ARTIFACTS = list(  # colour and marker: dots that lie on each other can still be told apart
    zip((GREY, BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "osD^vPX*", strict=True)
)
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
MAX_LAYERS = 25  # of a sensitivity scan: the rest can be pruned or quantized without a look
MIN_MARGIN = 1e-3  # of a metric, relative: equal values look equal
LOG_FROM = 4  # times the smallest value: below, a linear axis is easier to read

Series = dict[str, list[tuple[float, float]]]  # split -> (epoch, value)


def curves(metrics_csv: Path, target: Path) -> None:
    """Draw one panel per metric, training and validation over epochs, the best validation epoch marked.

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
        save(figure, target)


def learning(logs: Mapping[str, Path], target: Path) -> bool:
    """Draw the validation curves of several runs (name -> metrics.csv) over each other; return whether there were any.

    A file that cannot be read is left out, as no number depends on it.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run, log in logs.items():
        try:
            metrics = _per_epoch(log)
        except (ValueError, AttributeError, OSError, csv.Error):
            continue
        for metric, series in metrics.items():
            if "val" in series:
                panels.setdefault(metric, {})[run] = series["val"]
    names = sorted((name for name in panels if len(panels[name]) > 1), key=lambda name: name != "loss")[:2]
    if not names:
        return False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(names), 3.4), layout="constrained")
        for place, name in enumerate(names, start=1):
            axes = figure.add_subplot(1, len(names), place)
            for number, (run, points) in enumerate(panels[name].items()):
                colour, marker = ARTIFACTS[(number + 1) % len(ARTIFACTS)]
                finite = [(epoch, value) for epoch, value in points if math.isfinite(value)]
                axes.plot(*_columns(finite), color=colour, linewidth=1.6, label=run, marker=marker, markevery=0.2)
            _finish_curve(
                axes, f"validation {name}", [value for points in panels[name].values() for _, value in points]
            )
        save(figure, target)
    return True


def confusion_matrix(matrix: Tensor | NDArray[Any], class_names: Sequence[str], target: Path) -> None:
    """Draw counts (K, K) with true classes as rows and predicted classes as columns.

    The colour is the share of the true class.
    """
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
        save(figure, target)


def predicted_vs_true(predicted: Tensor | NDArray[Any], true: Tensor | NDArray[Any], target: Path) -> None:
    """Draw predicted over true values of a regression, both (N,), in the target's unit; the diagonal is perfect."""
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
        save(figure, target)


def trade_off(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Draw a metric over latency and over size on disk, one dot per row of a report; numbers stand in the legend.

    The metric is the first that is no loss, the batch size the first that was timed; whiskers end at the 95th
    percentile.
    """
    batch_size = next(iter(rows[0]["latency_ms"]))
    metric = next(name for name in rows[0]["metrics"] if not name.endswith("loss"))
    values = [row["metrics"][metric] for row in rows]
    p50, p95 = ([row["latency_ms"][batch_size][name] for row in rows] for name in ("p50", "p95"))
    sizes = [row["size_bytes"] for row in rows]
    labels = [
        f"{row['name']}: {report.number(value)}, {ms:.3g} ms, {report.bytes_(size)}"
        for row, value, ms, size in zip(rows, values, p50, sizes, strict=True)
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.8 + 0.22 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for place, label in enumerate(labels):
            colour, marker = ARTIFACTS[place % len(ARTIFACTS)]
            style: Any = {"color": colour, "marker": marker, "markersize": 8, "alpha": 0.8, "linestyle": "none"}
            whisker = [[0], [max(0, p95[place] - p50[place])]]
            left.errorbar(p50[place], values[place], xerr=whisker, elinewidth=1, label=label, **style)
            right.plot(sizes[place], values[place], **style)
        scale_axis(left, [*p50, *p95], "{:.3g}".format)
        scale_axis(right, sizes, report.bytes_)
        left.set(xlabel=f"milliseconds, batch of {batch_size}", ylabel=metric.partition("/")[2].replace("_", " "))
        right.set(xlabel="size of the file")
        middle, spread = (max(values) + min(values)) / 2, max(values) - min(values)
        margin = max(0.6 * spread, MIN_MARGIN * abs(middle)) or 1
        left.set_ylim(middle - margin, middle + margin)
        left.ticklabel_format(axis="y", useOffset=False)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", fontsize=9)
        save(figure, target)


def sensitivity(growth: Mapping[str, float], target: Path) -> None:
    """Draw how much the loss grows when one layer is disturbed: a bar per layer, the most sensitive first."""
    shown = sorted(growth.items(), key=lambda part: part[1], reverse=True)[:MAX_LAYERS]
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(6.4, 1.2 + 0.26 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh([name for name, _ in shown], [value for _, value in shown], color=BLUE)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelsize=9)
        axes.set(xlabel="growth of the loss")
        axes.set_title(f"{len(shown)} most sensitive of {len(growth)} layers")
        save(figure, target)


def _per_epoch(metrics_csv: Path) -> dict[str, Series]:
    """Return the points of each metric by its name without split, then by split; the last row of an epoch counts."""
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
    _finish_curve(axes, name, [value for points in series.values() for _, value in points])


def _finish_curve(axes: Axes, name: str, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if name.endswith("loss") and positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    axes.set_title(name.replace("_", " "))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.legend(fontsize=9)


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]


def scale_axis(axes: Axes, values: Sequence[float], text: Callable[[float], str]) -> None:
    """Scale the axis from zero, or logarithmically if values lie far apart; `text` writes the numbers at the ticks."""
    if max(values) > LOG_FROM * min(values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.08 * max(values))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _name_classes(axes: Axes, class_names: Sequence[str]) -> None:
    places, class_names = range(len(class_names)), [lettering.plain(name) for name in class_names]
    is_long = max(map(len, class_names)) > 3
    axes.set_xticks(places, class_names, rotation=45 if is_long else 0, ha="right" if is_long else "center")
    axes.set_yticks(places, class_names)
    axes.tick_params(length=0)


def _write_counts(axes: Axes, counts_KK: Tensor, share_KK: Tensor) -> None:
    """Write the count into each cell that is not empty; white on dark cells."""
    size = 10 if len(counts_KK) <= 12 else 7
    for row, column in counts_KK.nonzero().tolist():
        colour = "white" if share_KK[row, column] > 0.55 else "black"
        text = f"{int(counts_KK[row, column])}"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def save(figure: Figure, target: Path) -> None:
    """Save a PNG; create its folder if it is missing."""
    _take_literally(figure)
    target.parent.mkdir(parents=True, exist_ok=True)
    with lettering.provided(figure):
        FigureCanvasAgg(figure).print_figure(str(target))


def _take_literally(figure: Figure) -> None:
    """Show each `$` of a name as it is: matplotlib would read a formula, as log axes have."""
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    of_ticks = [
        axis.get_ticklabels(which="both") for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)
    ]
    formulas = {label for labels in of_ticks for label in labels}
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text not in formulas:
            text.set_parse_math(False)
