"""Figures of attributions: maps beside the picture they explain, bars for the features of a table.

Colours: blue speaks for the output, red against it, white is neutral. Each map has its own scale, because methods
measure in different units. Letters: S samples, C channels, H height, W width, F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from espalier.reporting.figures import BLUE, GREY, ORANGE, STYLE, save

SIGNED = "RdBu"
CELL = 1.45  # inches a side of a picture
LABEL = 1.75  # inches of the text before a row
SMALL = 64  # pixels: a picture below is drawn pixel by pixel
CLIP = 99.5  # percentile of absolute values at which the colour is full: one pixel must not pale a large map
MAX_BARS = 12  # features of a table that are drawn


@dataclass(frozen=True)
class Explained:
    """One sample with its label and its maps, ready to be drawn."""

    label: str  # what it is and what the network says, in a few short lines
    picture: NDArray[Any]  # (C, H, W) in [0, 1], or (F,)
    maps: Mapping[str, NDArray[Any]]  # by method, (H, W) or (F,)


def pictures(samples: Sequence[Explained], title: str, target: Path) -> None:
    """Draw one row per sample: its label, the picture, a map per method."""
    methods = list(samples[0].maps)
    columns, rows = len(methods) + 1, len(samples)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(LABEL + CELL * columns, 1.35 + CELL * rows), layout="constrained")
        cells = figure.subplots(rows, columns, squeeze=False)
        for sample, line in zip(samples, cells, strict=True):
            _show_picture(line[0], sample.picture)
            line[0].set_ylabel(sample.label, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
            for axes, attribution in zip(line[1:], sample.maps.values(), strict=True):
                _show_map(axes, attribution)
        for axes, name in zip(cells[0], ["input", *methods], strict=True):
            axes.set_title(name.replace("_", "\n"), fontsize=10, loc="center")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        _scale(figure, cells)
        save(figure, target)


def bars(samples: Sequence[Explained], title: str, target: Path) -> None:
    """Draw one panel per method: the mean over the samples for the features that matter most, a dot for each sample.

    Features are ranked by their mean share of all methods' absolute attributions, and keep their place in all panels.
    """
    methods = list(samples[0].maps)
    values_MSF = np.stack([[sample.maps[name] for sample in samples] for name in methods])
    total_M11 = np.maximum(np.abs(values_MSF).sum(axis=(1, 2), keepdims=True), 1e-30)
    shown = (np.abs(values_MSF) / total_M11).sum(axis=(0, 1)).argsort()[::-1][:MAX_BARS]
    rest = values_MSF.shape[2] - len(shown)
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(0.9 + 2.6 * len(methods), 1.6 + 0.27 * len(shown)), layout="constrained")
        for axes, name, values_SF in zip(
            figure.subplots(1, len(methods), sharey=True, squeeze=False)[0],
            methods,
            values_MSF[:, :, shown],
            strict=True,
        ):
            _draw_bars(axes, values_SF, [f"x{feature}" for feature in shown])
            axes.set_title(name.replace("_", " "), fontsize=11)
        remark = f"; {rest} features that matter less left out" if rest else ""
        figure.suptitle(f"{title}{remark}", x=0.01, ha="left", fontsize=12)
        save(figure, target)


def _show_picture(axes: Axes, picture: NDArray[Any]) -> None:
    image = picture[0] if len(picture) == 1 else picture[:3].transpose(1, 2, 0)
    axes.imshow(image.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation=_interpolation(picture.shape[-1]))
    _frame(axes)


def _show_map(axes: Axes, attribution: NDArray[Any]) -> None:
    limit = float(np.percentile(np.abs(attribution), CLIP)) or float(np.abs(attribution).max()) or 1.0
    axes.imshow(attribution, cmap=SIGNED, vmin=-limit, vmax=limit, interpolation=_interpolation(attribution.shape[-1]))
    _frame(axes)


def _interpolation(width: int) -> str:
    return "nearest" if width < SMALL else "antialiased"


def _frame(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(visible=True, color="#C8C8C8", linewidth=0.8)


def _scale(figure: Figure, cells: NDArray[Any]) -> None:
    scale = ScalarMappable(Normalize(-1, 1), SIGNED)
    bar = figure.colorbar(scale, ax=cells.ravel().tolist(), location="bottom", shrink=0.55, aspect=40, pad=0.02)
    bar.set_ticks([-1, 0, 1], labels=["against", "neutral", "for the output"])
    bar.ax.tick_params(labelsize=9, length=0)
    bar.outline.set_visible(False)


def _draw_bars(axes: Axes, values_SF: NDArray[Any], names: Sequence[str]) -> None:
    mean_F = values_SF.mean(axis=0)
    axes.barh(range(len(names)), mean_F, color=[BLUE if value >= 0 else ORANGE for value in mean_F], height=0.7)
    if len(values_SF) > 1:
        for row in values_SF:
            axes.plot(row, range(len(names)), "o", color="black", markersize=2.5, alpha=0.5, linestyle="none")
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
