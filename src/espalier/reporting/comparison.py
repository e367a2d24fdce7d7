"""Compare finished runs: how they were configured, what was measured, and which are worth their cost.

A run may come from a stranger: no link in it is followed, and no text of it can control a terminal.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from espalier.errors import ConfigError
from espalier.reporting import report
from espalier.reporting.report import Columns
from espalier.reporting.terminal import printable
from espalier.spec import Report

DATED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_(\w+)")  # the folder of a run, as conf/hydra/default.yaml names it
NOT_CHOSEN = ("seed", "source", "resume")  # what runs of the same configuration may differ in
TARGET = "._target_"
NOT_SHOWN = ("resume", "task._target_")  # differences that the list of runs shows already
CELLS: dict[str, Any] = {  # of a row, where it has them; a file is not to be trusted
    "name": str,
    "runtime": str,
    "metrics": dict[str, float | None],
    "latency_ms": dict[str, dict[str, float | None]],
    "size_bytes": float | None,
}


@dataclass(frozen=True)
class Entry:
    """One run of a comparison, with its report and its configuration."""

    name: str  # short, and no other run of the comparison has it
    folder: Path
    report: Report
    config: Mapping[str, Any]  # dotted key -> value; empty where the run left none
    provenance: Mapping[str, Any]

    @property
    def data(self) -> str:
        """Return the data set that the run was measured on; empty if unknown."""
        return str(self.config.get("data._target_", "")).rpartition(".")[2]

    @property
    def hardware(self) -> str:
        """Return CPU and GPUs; empty if unknown."""
        found = self.provenance.get("hardware") or {}
        return ", ".join(str(part) for part in [found.get("cpu"), *(found.get("gpus") or [])] if part)


def read(key: str, folders: Sequence[Path]) -> list[Entry]:
    """Return the reports, configurations and provenance of run folders.

    Raises:
        ConfigError: a folder is named twice, or its report is missing, damaged, a link, or of another version.
    """
    if twice := [str(folder) for place, folder in enumerate(folders) if folder in folders[:place]]:
        raise ConfigError(*(f"{key}={folder}: named twice; a comparison shows a run once" for folder in twice))
    reports = [_report(key, folder) for folder in folders]
    names = _names(folders)
    return [
        Entry(name, folder, found, _flat(_yaml(key, folder)), _json(key, folder))
        for name, folder, found in zip(names, folders, reports, strict=True)
    ]


def name_of(folder: Path) -> str:
    """Return the name of a run in tables: `train f5bc95`, `sweep f5bc95/0` for a trial, or the user's folder name."""
    above, around, *_ = *folder.parents, Path(), Path()
    for dated_folder, task, rest in ((folder, above, ""), (above, around, f"/{folder.name}")):
        if dated := DATED.fullmatch(dated_folder.name):
            return f"{task.name} {dated[1]}{rest}"
    return folder.name


def pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the figures of a run, and the entries among them that are not its own files: links, pipes."""
    figures = folder / "figures"
    if figures.is_symlink():
        return [], [figures]
    found = sorted(figures.glob("*.png"))
    return [file for file in found if _is_own(file)], [file for file in found if not _is_own(file)]


def logs(entries: Sequence[Entry]) -> dict[str, Path]:
    """Return the metrics.csv of each run that has one."""
    return {entry.name: file for entry in entries if _is_own(file := entry.folder / "metrics.csv")}


def differences(entries: Sequence[Entry]) -> Columns:
    """Return the keys of the configuration that differ, with the value of each run; empty if none differs."""
    known = [entry for entry in entries if entry.config]
    keys = list(dict.fromkeys(key for entry in known for key in entry.config if key not in NOT_SHOWN))
    differing = [key for key in keys if len({_value(entry, key) for entry in known}) > 1]
    chosen = [key.removesuffix(TARGET) for key in differing if key.endswith(TARGET)]
    shown = [key for key in differing if not _is_setting(key, chosen, known)]
    if not shown:
        return {}
    names = [key.removesuffix(TARGET) for key in shown]
    return {"": names} | {entry.name: [_short(_value(entry, key), key) for key in shown] for entry in known}


def _is_setting(key: str, chosen: Sequence[str], entries: Sequence[Entry]) -> bool:
    """Return whether a key belongs to one of several options, such as `model.depth` if the models differ."""
    is_common = all(key in entry.config for entry in entries)
    return not is_common and any(key.startswith(f"{group}.") and key != f"{group}{TARGET}" for group in chosen)


def _short(value: str, key: str) -> str:
    """Return a configured value as a short word: `ResNet` for `espalier.models.resnet.ResNet`."""
    return value.rpartition(".")[2] if key.endswith(TARGET) else value


def rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the rows of all reports; a name that several runs use is replaced by that of the run."""
    used = [name for entry in entries for name in {str(row["name"]) for row in entry.report.rows}]
    return [
        {**row, "name": f"{row['name']}, {entry.name}" if used.count(str(row["name"])) > 1 else str(row["name"])}
        for entry in entries
        for row in entry.report.rows
    ]


def means(entries: Sequence[Entry]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row of mean metrics for each set of runs that differ in their seed alone, and a line with the ranges."""
    found: list[dict[str, Any]] = []
    ranges: list[str] = []
    for group in _same_but_seed(entries):
        seeds = ", ".join(str(entry.report.seed) for entry in group)
        for same in zip(*(entry.report.rows for entry in group), strict=True):
            name = f"{same[0]['name']}: mean of seeds {seeds}"
            metrics = {metric: _measured(same, metric) for metric in same[0].get("metrics", {})}
            metrics = {metric: values for metric, values in metrics.items() if len(values) == len(group)}
            equal = {key: same[0].get(key) for key in ("params", "macs") if len({row.get(key) for row in same}) == 1}
            mean = {metric: math.fsum(values) / len(values) for metric, values in metrics.items()}
            found.append({"name": name, "runtime": same[0].get("runtime"), "metrics": mean, **equal})
            texts = (
                f"{metric} {report.number(mean[metric])} ({report.number(min(values))} to {report.number(max(values))})"
                for metric, values in metrics.items()
            )
            ranges.append(f"{name} (lowest to highest): {', '.join(texts)}")
    return found, ranges


def metric_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the first metric that is not a loss, of the first row with metrics; None if nothing was measured."""
    names = [name for row in rows for name in row.get("metrics", {})]
    return next((name for name in names if not name.endswith("loss")), names[0] if names else None)


def batch_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the batch size at which most rows were timed, the first of several; None if none was timed."""
    timed = [batch for row in rows for batch in row.get("latency_ms", {})]
    return max(timed, key=timed.count) if timed else None


def cautions(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield a line for each difference that makes the numbers of these runs hard to compare."""
    sets = {entry.data for entry in entries if entry.data}
    if len(sets) > 1:
        yield f"DIFFERENT DATA ({', '.join(sorted(sets))}): metrics of these runs cannot be compared"
    timed = [entry for entry in entries if any(row.get("latency_ms") for row in entry.report.rows)]
    if len(timed) > 1:
        yield "latencies of different runs were not taken in turns; fairer: espalier benchmark source=RUN,RUN"
    machines = {entry.hardware for entry in timed if entry.hardware}
    if len(machines) > 1:
        yield f"DIFFERENT MACHINES ({'; '.join(sorted(machines))}): milliseconds of these runs cannot be compared"
    tasks = {entry.report.task for entry in entries}
    if "train" in tasks and len(tasks) > 1:
        yield "the size of a trained run is that of its checkpoint, with the state of the optimizer"
    for entry in entries:
        if not entry.config:
            yield f"{entry.name} left no config.yaml, so its differences are not shown"
        for file in pictures(entry.folder)[1]:
            left_out = printable(str(file.relative_to(entry.folder)))
            yield f"{entry.name}: {left_out} is a link or no file, so it is left out"


def _report(key: str, folder: Path) -> Report:
    file = folder / report.JSON_NAME
    if not _is_there(key, file):
        raise ConfigError(
            f"{key}={folder}: holds no {report.JSON_NAME}, so it is no finished run; report takes the folders of runs"
        )
    try:
        stored = _printable(json.loads(file.read_bytes()))
    except (OSError, ValueError, RecursionError):
        raise ConfigError(f"{key}={file}: damaged, no JSON; run its task again") from None
    if isinstance(stored, dict) and stored.get("schema", 1) != 1:
        raise ConfigError(f"{key}={file}: a report of schema {stored['schema']!r}; this espalier reads schema 1")
    try:
        found = TypeAdapter(Report).validate_python(stored)
        for row in found.rows:
            for name in CELLS.keys() & {*row, "name"}:
                TypeAdapter(CELLS[name]).validate_python(row.get(name))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "a row"
        raise ConfigError(f"{key}={file}: not a report ({where}: {first['msg'].lower()}); run its task again") from None
    if not found.rows:
        raise ConfigError(f"{key}={file}: a report without rows, so there is nothing to compare")
    return found


def _yaml(key: str, folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    try:
        found = _printable(yaml.safe_load(file.read_bytes())) if _is_there(key, file) else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{key}={file}: damaged, no YAML; run its task again, or remove the file") from None
    return found if isinstance(found, dict) else {}


def _json(key: str, folder: Path) -> dict[str, Any]:
    """Return the content of a provenance file; empty if it is missing or damaged, as no number depends on it."""
    file = folder / "provenance.json"
    try:
        found = _printable(json.loads(file.read_bytes())) if _is_there(key, file) else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_there(key: str, file: Path) -> bool:
    """Return whether the run has this file.

    Raises:
        ConfigError: the file is a link, which may lead to a file that the page is not meant to show.
    """
    if file.is_symlink():
        raise ConfigError(f"{key}={file}: a link, and report follows none; copy the file that it means")
    return file.is_file()


def _is_own(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _printable(tree: Any) -> Any:
    """Return plain types in which each text is one line of printable characters."""
    if isinstance(tree, dict):
        return {_printable(key): _printable(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_printable(value) for value in tree]
    return printable(tree).replace("\n", " ") if isinstance(tree, str) else tree


def _names(folders: Sequence[Path]) -> list[str]:
    short = [_printable(name_of(folder)) for folder in folders]
    full = [_printable(str(folder)) for folder in folders]
    return [name if short.count(name) == 1 else path for name, path in zip(short, full, strict=True)]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Turn `{"optimizer": {"lr": 1}}` into `{"optimizer.lr": 1}`; lists are values."""
    if not isinstance(node, dict):
        return {prefix: node} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _value(entry: Entry, key: str) -> str:
    if key not in entry.config:
        return report.MISSING
    value = entry.config[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _same_but_seed(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    def chosen(entry: Entry) -> str:
        kept = {key: value for key, value in entry.config.items() if key not in NOT_CHOSEN}
        names = [(row["name"], row.get("runtime")) for row in entry.report.rows]
        return json.dumps([entry.report.task, names, kept], sort_keys=True, default=str)

    for _, group in groupby(sorted((entry for entry in entries if entry.config), key=chosen), key=chosen):
        same = list(group)
        if len(same) > 1 and len({entry.report.seed for entry in same}) == len(same):
            yield sorted(same, key=lambda entry: entry.report.seed)


def _measured(rows: Iterable[Mapping[str, Any]], metric: str) -> list[float]:
    values = (row.get("metrics", {}).get(metric) for row in rows)
    return [value for value in values if value is not None and math.isfinite(value)]
