"""List the runs below a folder of logs: how each ended, what it measured, and which is best. Never imports torch."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from espalier.errors import ConfigError
from espalier.runs import ownership
from espalier.runs.run_folder import CHECKPOINTS, NOT_THE_DATA, RunFolder
from espalier.runs.states import FAILED, FINISHED, RUNNING, STOPPED

MARKS = {"report.json", "provenance.json", "run.log", ownership.LOCK}  # files by which a folder is that of a run
INSIDE = {CHECKPOINTS, "export", "figures", "predictions", "tensorboard", "wandb"}  # folders of a run, which hold none
LOWER_IS_BETTER = re.compile(r"loss|error|rmse|mse|mae|nll|difference|perplexity")  # in a name that no run monitored


@dataclass(frozen=True)
class Chosen:
    """The validation metric that a training chose its best checkpoint by."""

    metric: str
    mode: str  # min or max
    value: float


@dataclass(frozen=True)
class Listed:
    """A run on disk: its state, and what its files say of it."""

    folder: Path
    state: str
    report: Mapping[str, Any]  # empty where it did not finish

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the stored configuration; empty if it cannot be read."""
        try:
            found = yaml.load(RunFolder(self.folder).config.read_bytes(), Loader=_LOADER)
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def task(self) -> str:
        """Return the task, or `?` if it is unknown."""
        node = self.config.get("task") if "task" not in self.report else None
        named = node.get("_target_", "?") if isinstance(node, dict) else self.report.get("task", "?")
        return str(named).rpartition(".")[2]

    @property
    def seed(self) -> int | None:
        """Return the seed, or None if it is unknown."""
        seed = self.report.get("seed", None) if self.report else self.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def chosen(self) -> Chosen | None:
        """Return the metric that its best checkpoint was chosen by, or None if the report names none."""
        said = self.report.get("monitored")
        if not isinstance(said, dict) or not _is_number(said.get("value")):
            return None
        return Chosen(str(said.get("metric")), str(said.get("mode")), float(said["value"]))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Return the metrics in the last row of its report, and the one that its best checkpoint was chosen by."""
        rows = self.report.get("rows")
        last = rows[-1] if isinstance(rows, list) and rows and isinstance(rows[-1], dict) else {}
        measured = last.get("metrics")
        found = {str(name): value for name, value in measured.items()} if isinstance(measured, dict) else {}
        if self.chosen:
            found[self.chosen.metric] = self.chosen.value
        return {name: float(value) for name, value in found.items() if _is_number(value)}

    @cached_property
    def changed(self) -> float:
        """Return when it ended, or when its folder changed last, in seconds since the epoch."""
        report = RunFolder(self.folder).report
        return (report if report.is_file() else self.folder).stat().st_mtime

    @cached_property
    def size_bytes(self) -> int:
        """Return the bytes of all files in its folder."""
        paths = (os.path.join(root, name) for root, _, names in os.walk(self.folder) for name in names)  # noqa: PTH118
        return sum(os.lstat(path).st_size for path in paths if os.path.lexists(path))


def below(logs: Path) -> list[Listed]:
    """Return the runs of a folder, the newest first.

    Raises:
        ConfigError: there is no such folder.
    """
    if not logs.is_dir():
        raise ConfigError(f"logs={logs}: no such folder")
    return sorted(_found(logs), key=lambda run: run.changed, reverse=True)


def is_lower_better(metric: str, runs: list[Listed]) -> bool:
    """Return whether lower values of a metric are better, by the runs that monitored it, else by its name."""
    name = metric.partition("/")[2] or metric
    modes = {run.chosen.metric.partition("/")[2]: run.chosen.mode for run in runs if run.chosen}
    return modes[name] == "min" if name in modes else bool(LOWER_IS_BETTER.search(name))


def best(key: str, logs: Path) -> Path:
    """Return the finished training below `logs` with the best validation metric; among equal ones the newest.

    Raises:
        ConfigError: there is none, or they were chosen by different metrics or trained on different data.
    """
    runs = below(logs) if logs.is_dir() else []
    trained = [
        (run, run.chosen)
        for run in runs
        if run.state == FINISHED and run.task == "train" and run.chosen and RunFolder(run.folder).checkpoints.is_dir()
    ]
    if not trained:
        raise ConfigError(
            f"{key}=best: no finished training below {logs.resolve()} was chosen by a validation; "
            "start one with: espalier train"
        )
    first, (metric, mode) = trained[0][0], (trained[0][1].metric, trained[0][1].mode)
    advice = "name a RUN; espalier runs lists them"
    for run, chosen in trained:
        if (chosen.metric, chosen.mode) != (metric, mode):
            raise ConfigError(
                f"{key}=best: {first.folder} was chosen by {metric} and {run.folder} by {chosen.metric}, "
                f"which do not compare; {advice}"
            )
        if differing := _differing(first.config.get("data"), run.config.get("data")):
            raise ConfigError(
                f"{key}=best: {first.folder} and {run.folder} were trained on different data, "
                f"data.{differing} differs; {advice}"
            )
    sign = -1 if mode == "min" else 1
    return max(trained, key=lambda pair: (sign * pair[1].value, pair[0].changed))[0].folder


def _found(logs: Path) -> Iterator[Listed]:
    for root, folders, names in os.walk(logs):
        if MARKS & set(names) or CHECKPOINTS in folders:
            yield _listed(Path(root))
            folders[:] = [name for name in folders if name not in INSIDE]


def _listed(folder: Path) -> Listed:
    report = _read(RunFolder(folder).report)
    if ownership.is_in_use(folder):
        return Listed(folder, RUNNING, {})  # a report is that of its earlier end
    if report:
        return Listed(folder, FINISHED, report)
    return Listed(folder, STOPPED if RunFolder(folder).can_go_on else FAILED, {})


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _differing(one: Any, other: Any) -> str | None:
    """Return a setting in which two configurations of data differ, except settings that change no sample."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return None if one == other else "_target_"
    names = [name for name in {**one, **other} if name not in NOT_THE_DATA]
    return next((name for name in names if one.get(name) != other.get(name)), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
