"""A `Report` as a file, as a table on the terminal and as Markdown: one set of numbers, one way to round them.

`trials` is the table of a multirun: what each trial changed and what came of it.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from espalier.reporting import terminal
from espalier.runs import files
from espalier.spec import Report

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"
TABLE_WIDTH = 80  # a terminal that nobody resized; wider tables are split
MAX_METRICS = 3  # in the table of a multirun, beside the overrides; the rest is in each trial's report
MISSING = "-"
DONE = "done"

Trial = tuple[Path, Mapping[str, str], str]  # run folder, its overrides, DONE or why it failed


def write(report: Report, folder: Path, made: str = "") -> None:
    """Write `report.md`, then `report.json`, which marks a run as finished; each whole or not at all.

    `made` is a paragraph of `report.md` that says by which command, and on what, the numbers were made.
    """
    text = json.dumps(finite(report.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)
    files.write_text(folder / MARKDOWN_NAME, markdown(report, made))
    files.write_text(folder / JSON_NAME, text + "\n")


def read(folder: Path) -> Report:
    """Return the report that `write` left in `folder`.

    Raises:
        FileNotFoundError: there is none, so the run did not finish.
        ValueError: it was written by another version of this format.
    """
    stored = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    if stored.get("schema") != 1:
        raise ValueError(f"{folder / JSON_NAME} has schema {stored.get('schema')}; this version reads schema 1")
    return Report(**stored)


def table(report: Report, width: int = TABLE_WIDTH) -> RenderableType:
    """Return a table of artifacts by metrics and costs; several tables if one would be wider than `width`."""
    metrics, costs = columns_of(report)
    names = {"": metrics.pop("")}
    is_split = _width({**names, **metrics, **costs}) > width  # then metrics and costs do not share a table
    grids: list[Columns] = [{}]
    for header, cells in [*metrics.items(), *costs.items()]:
        starts_costs = header in costs and not grids[-1].keys() & costs.keys() and is_split
        of_others = bool(grids[-1]) and not any(_filled(cells) & _filled(other) for other in grids[-1].values())
        if starts_costs or of_others or _width({**names, **grids[-1], header: cells}) > width:
            grids.append({})
        grids[-1][header] = cells
    remarks = [Text(terminal.printable(line), style="dim") for line in _remarks(report)]
    return Group(*[grid_of(_without_empty_rows(names, columns)) for columns in grids if columns], *remarks)


def markdown(report: Report, made: str = "") -> str:
    """Return the same table and remarks, for `report.md` and for pull requests."""
    metrics, costs = columns_of(report)
    columns = {**metrics, **costs}
    lines = [f"# {report.task}: {Path(report.run).name}", ""]
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("| " + " | ".join("---" if name == "" else "---:" for name in columns) + " |")
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    lines += ["", f"Seed {report.seed}." + (f" Source: `{report.source}`." if report.source else "")]
    lines += [f"* {line}" for line in _remarks(report)]
    return "\n".join([*lines, *(["", made] if made else [])]) + "\n"


def trials(finished: Sequence[Trial]) -> Table:
    """Return a table with a row per trial: the overrides that differ, key metrics, and how it ended."""
    folders = [folder for folder, _, _ in finished]
    overrides = [chosen for _, chosen, _ in finished]
    reports = [read(folder) if (folder / JSON_NAME).exists() else None for folder in folders]
    changing = [key for key in _keys(overrides) if len({chosen.get(key) for chosen in overrides}) > 1]
    measured = [done.rows[-1].get("metrics", {}) if done and done.rows else {} for done in reports]
    columns: Columns = {"trial": [folder.name for folder in folders]}
    columns |= {key: [chosen.get(key, MISSING) for chosen in overrides] for key in changing}
    metrics = _keys(measured)[:MAX_METRICS]
    for metric in metrics:
        columns[_short(metric, metrics)] = [_cell(values.get(metric), number) for values in measured]
    columns["state"] = [outcome for _, _, outcome in finished]
    grid = grid_of(columns)
    for column in grid.columns[:-1]:
        column.no_wrap = True  # a long reason takes more lines, not the width of the numbers
    return grid


def si(value: float) -> str:
    """Write a number with three digits and a prefix: 272474 is `272 k`, 40551808 is `40.6 M`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:  # 999,950 reads better as 1.00 M than as 1000 k
            return f"{_digits(value / size)} {prefix}"
    return f"{value:g}"


def bytes_(value: float) -> str:
    """Write bytes in decimal units, as disks and networks do: 1141000 is `1.14 MB`."""
    number, _, prefix = si(value).partition(" ")
    return f"{number} {prefix}B"


def duration(seconds: float) -> str:
    """Write seconds as `12.3 s`, `2 min 05 s` or `3 h 07 min`."""
    if seconds < 99.95:
        return f"{_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float) -> str:
    """Write integers and thousands in full, shares with four decimals: `12`, `5,210`, `0.9889`, `1.0000`, `12.35`."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if 0.001 <= abs(value) <= 1 or value == 0 else f"{value:.4g}"


COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "params": ("params", si),
    "nonzero": ("non-zero", si),
    "macs": ("MACs", si),
    "size_bytes": ("size", bytes_),
    "seconds": ("time", duration),
    "samples_per_second": ("samples/s", number),
    "peak_bytes": ("peak memory", bytes_),
}
NOT_COSTS = {"name", "runtime", "metrics", "latency_ms"}

Columns = dict[str, list[str]]  # header -> one cell per row; the header of the names is empty


def columns_of(report: Report) -> tuple[Columns, Columns]:
    """Return the metric columns, headed by the names of the rows, and the cost columns."""
    rows = report.rows
    metrics: Columns = {"": [str(row["name"]) for row in rows]}
    if len({row.get("runtime") for row in rows}) > 1:
        metrics["runtime"] = [str(row.get("runtime", MISSING)) for row in rows]
    names = _keys(row.get("metrics", {}) for row in rows)
    for key in names:
        metrics[_short(key, names)] = [_cell(row.get("metrics", {}).get(key), number) for row in rows]
    costs: Columns = {}
    for key in [*COSTS, *_keys({key: 0 for key in row if key not in {*COSTS, *NOT_COSTS}} for row in rows)]:
        header, rounded = COSTS.get(key, (key.replace("_", " "), number))
        cells = [_cell(row.get(key), rounded) for row in rows]
        is_news = key != "nonzero" or cells != costs.get("params")
        if is_news and set(cells) != {MISSING}:
            costs[header] = cells
    for batch in _keys(row.get("speedup", {}) for row in rows):
        costs[f"speed, batch {batch}"] = [_cell(row.get("speedup", {}).get(batch), "{:.2f}x".format) for row in rows]
    for batch in _keys(row.get("latency_ms", {}) for row in rows):
        quantiles = [row.get("latency_ms", {}).get(batch, {}) for row in rows]
        costs[f"ms, batch {batch}"] = [_cell(quantile.get("p50"), _three_digits) for quantile in quantiles]
    return metrics, costs


def _remarks(report: Report) -> list[str]:
    ratios = ", ".join(f"{name} {value:.3g}x" for name, value in report.ratios.items())
    return [*([f"Ratios: {ratios}"] if ratios else []), *report.notes]


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return every key once, in order of appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _short(metric: str, metrics: Sequence[str]) -> str:
    """Return the metric without its split if all metrics are of the same split."""
    same_split = len({name.partition("/")[0] for name in metrics}) == 1
    return metric.partition("/")[2] or metric if same_split else metric


def _filled(cells: Sequence[str]) -> set[int]:
    """Return the rows that have a value in this column."""
    return {place for place, cell in enumerate(cells) if cell != MISSING}


def _without_empty_rows(names: Columns, columns: Columns) -> Columns:
    """Return a table without the rows that have a name and no value, unless all are so."""
    filled = set().union(*map(_filled, columns.values())) or set(range(len(names[""])))
    return {header: [cells[place] for place in sorted(filled)] for header, cells in {**names, **columns}.items()}


def _cell(value: Any, rounded: Callable[[float], str]) -> str:
    if isinstance(value, bool | str):
        return str(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING
    return rounded(value)


def _digits(value: float) -> str:
    """Write three significant digits with their zeros: 1.00, 40.6, 272."""
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


def _three_digits(value: float) -> str:
    """Write three significant digits, also of numbers below 1: 0.0448."""
    return f"{value:#.3g}" if 0 < abs(value) < 0.9995 else _digits(value)


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    """Return the number of characters per line of a table of box style SIMPLE_HEAD."""
    return sum(2 + max(map(len, [header, *cells])) for header, cells in columns.items()) + len(columns) + 1


def grid_of(columns: Mapping[str, Sequence[str]]) -> Table:
    """Return a table for the terminal; numbers are right-aligned, and the column without a header holds names."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for header, cells in columns.items():
        is_numeric = header != "" and all(cell == MISSING or cell.lstrip("-")[:1].isdigit() for cell in cells)
        title, style = Text(terminal.printable(header)), "bold" if header == "" else ""
        grid.add_column(title, justify="right" if is_numeric else "left", style=style)
    for cells in zip(*columns.values(), strict=True):
        grid.add_row(*(Text(terminal.printable(cell)) for cell in cells))
    return grid


def finite(value: Any) -> Any:
    """Replace NaN and infinities by None, as JSON has neither."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
