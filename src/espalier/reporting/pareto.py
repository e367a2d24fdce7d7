"""Figures of speed: latency per runtime and batch size, and what accuracy costs in milliseconds and bytes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from espalier.reporting import report
from espalier.reporting.figures import ARTIFACTS, GREY, LOWER_IS_BETTER, MIN_MARGIN, STYLE, save, scale_axis

MAX_PANELS = 3  # batch sizes side by side
ONE_COLUMN = 6  # points that a legend of one column has at most
MANY_TICKS = 50  # times the left end: 1, 2 and 5 of each decade would overlap
ROOM = 0.36  # of the panel, right of the slowest dot, where the numbers stand

Row = Mapping[str, Any]  # of a report


@dataclass(frozen=True)
class Point:
    """A row of the report, reduced to the numbers that the Pareto front compares."""

    name: str
    value: float  # of the metric
    gain: float  # the same, or its negative where lower is better
    latency_ms: float | None
    size_bytes: float | None


def latency(rows: Sequence[Row], target: Path) -> None:
    """Draw milliseconds per call, a panel per batch size: a dot at the median, a line to the 95th percentile.

    Beside the dot stand the median, and how many times as fast as the first row it is.
    """
    batches = list(dict.fromkeys(batch for row in rows for batch in row["latency_ms"]))[:MAX_PANELS]
    names = [str(row["name"]) for row in rows]
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
                text = f"  {timed['p50']:#.3g}  ({row['speedup'][batch]:.2f}x)"
                axes.annotate(text, (timed["p95"], place), fontsize=9, va="center", color=GREY)
            scale_axis(axes, [*(row["latency_ms"][batch]["p50"] for row in rows), slowest], "{:g}".format)
            _leave_room(axes, slowest)
            axes.set(title=f"batch of {batch}", xlabel="milliseconds")
        panels[0].set_yticks(range(len(rows)), names)
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        panels[0].tick_params(axis="y", length=0)
        save(figure, target)


def pareto(points: Sequence[Point], metric: str, batch: str | None, target: Path) -> None:
    """Draw a metric over latency and over size, with a line through the points that no other beats in both.

    A panel is left out if no point has its cost. Points off the line are pale, numbers stand in the legend.
    """
    costs: dict[str, tuple[str, Callable[[float], str]]] = {
        "latency_ms": (f"milliseconds, batch of {batch}", "{:g}".format),
        "size_bytes": ("size of the file", report.bytes_),
    }
    shown = {cost: [point for point in points if getattr(point, cost) is not None] for cost in costs}
    shown = {cost: some for cost, some in shown.items() if some}
    columns = 2 if len(shown) > 1 and len(points) > ONE_COLUMN else 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 4.4 * len(shown), 3.8 + 0.22 * len(points) / columns), layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (cost, some) in zip(panels, shown.items(), strict=True):
            _draw_front(axes, points, some, [getattr(point, cost) for point in some])
            scale_axis(axes, [getattr(point, cost) for point in some], costs[cost][1])
            axes.set_xlabel(costs[cost][0])
        values = [point.value for point in points]
        middle, spread = (max(values) + min(values)) / 2, max(values) - min(values)
        margin = max(0.6 * spread, MIN_MARGIN * abs(middle)) or 1
        panels[0].set(
            ylabel=metric.partition("/")[2].replace("_", " ") or metric, ylim=(middle - margin, middle + margin)
        )
        panels[0].ticklabel_format(axis="y", useOffset=False)
        handles = [Line2D([], [], linestyle="none", markersize=8, **_style(place)) for place in range(len(points))]
        texts = [_numbers(point) for point in points]
        handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle="--"))
        figure.legend(handles, [*texts, "Pareto front"], loc="outside lower left", fontsize=9, ncols=columns)
        save(figure, target)


def _draw_front(axes: Axes, points: Sequence[Point], some: Sequence[Point], costs: Sequence[float]) -> None:
    best = set(front([(-point.gain, cost) for point, cost in zip(some, costs, strict=True)]))
    for place, (point, cost) in enumerate(zip(some, costs, strict=True)):
        alpha = 1.0 if place in best else 0.35
        axes.plot(cost, point.value, markersize=9, alpha=alpha, **_style(points.index(point)))
    line = sorted((costs[place], some[place].value) for place in best)
    axes.plot(*zip(*line, strict=True), color=GREY, linewidth=1, linestyle="--", zorder=0)


def _style(place: int) -> Any:
    """Return colour and marker of a point; the second eight get other pairs."""
    colour, _ = ARTIFACTS[(1 + place) % len(ARTIFACTS)]
    _, marker = ARTIFACTS[(1 + place + place // len(ARTIFACTS)) % len(ARTIFACTS)]
    return {"color": colour, "marker": marker}


def _numbers(point: Point) -> str:
    timed = [] if point.latency_ms is None else [f"{point.latency_ms:.3g} ms"]
    sized = [] if point.size_bytes is None else [report.bytes_(point.size_bytes)]
    return f"{point.name}: {', '.join([report.number(point.value), *timed, *sized])}"


def _leave_room(axes: Axes, slowest: float) -> None:
    """Extend the axis to the right of `slowest`, so that a number fits."""
    if axes.get_xscale() == "log":
        left = axes.get_xlim()[0]
        if slowest > MANY_TICKS * left:
            axes.xaxis.set_major_locator(LogLocator())
        axes.set_xlim(left, slowest * (slowest / left) ** (ROOM / (1 - ROOM)))
    else:
        axes.set_xlim(0, slowest / (1 - ROOM))


def points(rows: Sequence[Mapping[str, Any]], metric: str, batch: str | None) -> list[Point]:
    """Return a point for each row that has the metric."""
    found = []
    runtimes = {row.get("runtime") for row in rows}
    for row in rows:
        value = row.get("metrics", {}).get(metric)
        if value is not None and math.isfinite(value):
            runtime = str(row.get("runtime"))
            is_said = len(runtimes) < 2 or runtime in row["name"]
            name = row["name"] if is_said else f"{row['name']} ({runtime})"
            gain = -value if metric.endswith(LOWER_IS_BETTER) else value
            timed = row.get("latency_ms", {}).get(batch, {}).get("p50")
            found.append(Point(name, value, gain, timed, row.get("size_bytes")))
    return found


def front(costs: Sequence[Sequence[float]]) -> list[int]:
    """Return the positions of the points that no other point beats.

    A point beats another that is nowhere lower and somewhere higher; so equal points all stay.
    """
    return [
        place
        for place, own in enumerate(costs)
        if not any(
            all(a <= b for a, b in zip(other, own, strict=True)) and tuple(other) != tuple(own) for other in costs
        )
    ]


def verdicts(points: Sequence[Point], metric: str, batch: str | None) -> Iterator[str]:
    """Yield a line that names the points on the front of the metric against latency, and one against size."""
    for cost, what in (("latency_ms", f"milliseconds at batch {batch}"), ("size_bytes", "size")):
        some = [point for point in points if getattr(point, cost) is not None]
        if len(some) > 1:
            best = front([(-point.gain, getattr(point, cost)) for point in some])
            names = [some[place].name for place in sorted(best, key=lambda place: getattr(some[place], cost))]
            count = f"{len(best)} of {len(some)}"
            yield f"Pareto front of {metric} against {what}, cheapest first ({count}): {'; '.join(names)}"
