"""Figures of speed: latency per runtime and batch size, and what accuracy costs in milliseconds and bytes."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from espalier.measure import report
from espalier.measure.figures import ARTIFACTS, BLUE, GREY, STYLE, _save, _scale

MAX_PANELS = 3  # batch sizes side by side
NAME_WIDTH = 32  # characters of a name beside the axis
ROOM = 1.6  # the axis ends at this many times the slowest value, so that numbers fit beside the dots

Row = Mapping[str, Any]  # of a report


def latency(rows: Sequence[Row], target: Path) -> None:
    """Milliseconds of a call, a panel per batch size: a dot at the median, a line to the 95th percentile.

    The number beside it is the median and how many times as fast as the first row that is.
    """
    batches = list(dict.fromkeys(batch for row in rows for batch in row["latency_ms"]))[:MAX_PANELS]
    names = [label(row) for row in rows]
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        width = 2.2 + 0.05 * max(map(len, names)) + 3.4 * len(batches)
        figure = Figure(figsize=(width, 1.3 + 0.34 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
        for axes, batch in zip(panels, batches, strict=True):
            slowest = 0.0
            for place, row in enumerate(rows):
                timed = row["latency_ms"][batch]
                slowest = max(slowest, timed["p95"])
                colour, marker = ARTIFACTS[(1 + runtimes.index(row["runtime"])) % len(ARTIFACTS)]
                axes.plot([timed["p50"], timed["p95"]], [place, place], color=colour, linewidth=1.5, alpha=0.5)
                axes.plot([timed["p50"]], [place], marker=marker, color=colour, markersize=8)
                text = f"  {report.three_digits(timed['p50'])}  ({row['speedup'][batch]:.2f}x)"
                axes.annotate(text, (timed["p95"], place), fontsize=9, va="center", color=GREY)
            _scale(axes, [*(row["latency_ms"][batch]["p50"] for row in rows), slowest], "{:.3g}".format)
            _leave_room(axes, slowest)
            axes.set(title=f"batch of {batch}", xlabel="milliseconds")
        panels[0].set_yticks(range(len(rows)), names)
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        panels[0].tick_params(axis="y", length=0)
        _save(figure, target)
