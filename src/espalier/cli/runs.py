"""`espalier runs`: list the runs below a folder of logs, the best first if asked, and delete some of them."""

import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path

from espalier.cli.help_pages import RUNS as NAME
from espalier.cli.help_pages import RUNS_KEYS as KEYS
from espalier.cli.help_pages import YES
from espalier.config.home import at_home
from espalier.errors import ConfigError, EspalierError
from espalier.reporting import report, terminal
from espalier.runs import listing, ownership, references, run_folder
from espalier.runs.listing import Listed
from espalier.runs.states import RUNNING, STATES

UNKNOWN = report.MISSING


def main(words: Sequence[str]) -> int:
    """List or delete runs; return the exit code.

    Raises:
        ConfigError: a word is no key or flag of this command.
    """
    asked = _parsed([word for word in words if word != YES])
    logs = Path(at_home(asked.get("logs", str(run_folder.LOGS))))
    runs = listing.below(logs)
    if "delete" in asked:
        return _delete(_named(asked["delete"], runs, logs), runs, is_sure=YES in words)
    if YES in words:
        raise ConfigError(f"{YES}: deletes nothing without delete=RUN")
    shown = _sorted(_filtered(runs, asked), asked.get("sort"))
    if shown:
        _show(shown)
    size = report.bytes_(sum(run.size_bytes for run in shown))
    terminal.say(f"{len(shown)} of {len(runs)} runs below {logs}, {size}")
    return 0


def _parsed(words: Sequence[str]) -> dict[str, str]:
    asked: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in KEYS:
            close = get_close_matches(key, [*KEYS, YES], n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; {NAME} takes {', '.join(KEYS)} and {YES}"
            raise ConfigError(f"{key}: no such key{hint}")
        if not equals or not value:
            raise ConfigError(f"{word}: not of the form KEY=VALUE; {key} is: {KEYS[key]}")
        if key in asked:
            raise ConfigError(f"{word}: {key} is said twice; say it once")
        asked[key] = value
    if others := asked.keys() - {"logs", "delete"} if "delete" in asked else set():
        raise ConfigError(f"{min(others)}={asked[min(others)]}: not together with delete=, which names what goes")
    return asked


def _filtered(runs: Sequence[Listed], asked: dict[str, str]) -> list[Listed]:
    state, task = asked.get("state"), asked.get("task")
    if state is not None and state not in STATES:
        raise ConfigError(f"state={state}: no such state; it is one of {', '.join(STATES)}")
    tasks = sorted({run.task for run in runs})
    if task is not None and task not in tasks:
        raise ConfigError(f"task={task}: no run of that task; there are {', '.join(tasks) or 'none'}")
    return [run for run in runs if state in (None, run.state) and task in (None, run.task)]


def _sorted(runs: list[Listed], by: str | None) -> list[Listed]:
    """Return the runs with the best first; those without that metric last."""
    if by is None:
        return runs
    if by == "size":
        return sorted(runs, key=lambda run: run.size_bytes, reverse=True)
    known = sorted({name for run in runs for name in run.metrics})
    if by not in known:
        close = get_close_matches(by, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"sort={by}: no run has this metric{hint}; there are {', '.join(['size', *known])}")
    sign = 1 if listing.is_lower_better(by, runs) else -1
    measured = [run for run in runs if by in run.metrics]
    return [*sorted(measured, key=lambda run: sign * run.metrics[by]), *(run for run in runs if by not in run.metrics)]


def _show(runs: Sequence[Listed]) -> None:
    validation = [(run.chosen.metric, run.chosen.value) if run.chosen else None for run in runs]
    columns = {
        "run": [str(run.folder) for run in runs],
        "task": [run.task for run in runs],
        "state": [run.state for run in runs],
        "when": [f"{datetime.fromtimestamp(run.changed):%Y-%m-%d %H:%M}" for run in runs],
        **_metric("validation", validation),
        **_metric("test", [_tested(run) for run in runs]),
        "seed": [UNKNOWN if run.seed is None else str(run.seed) for run in runs],
        "size": [report.bytes_(run.size_bytes) for run in runs],
    }
    grid = report.grid_of(columns)
    for column in grid.columns:
        column.no_wrap = True
    console = terminal.console(soft_wrap=True)
    console.width = sum(2 + max(map(len, [name, *cells])) for name, cells in columns.items()) + len(columns)
    console.print(grid)


def _tested(run: Listed) -> tuple[str, float] | None:
    """Return the most important metric of a report: the one that a training is chosen by, else its first."""
    same = run.chosen and f"test/{run.chosen.metric.partition('/')[2]}"
    measured = [name for name in run.metrics if not run.chosen or name != run.chosen.metric]
    name = same if same in measured else next(iter(measured), None)
    return None if name is None else (name, run.metrics[name])


def _metric(header: str, pairs: Sequence[tuple[str, float] | None]) -> dict[str, list[str]]:
    """Return a column of metrics, named after the metric if all runs have the same; empty if no run has any."""
    names = {pair[0] for pair in pairs if pair}
    if not names:
        return {}
    is_one = len(names) == 1
    cells = [
        UNKNOWN if pair is None else report.number(pair[1]) if is_one else f"{pair[0]} {report.number(pair[1])}"
        for pair in pairs
    ]
    return {names.pop() if is_one else header: cells}


def _named(value: str, runs: Sequence[Listed], logs: Path) -> list[Listed]:
    """Return the runs that `delete=` names.

    Raises:
        ConfigError: there is no such run, it is running, or another run lies in its folder.
    """
    if value in STATES and not Path(value).exists():
        if value == RUNNING:
            raise ConfigError(f"delete={value}: what is running is not deleted; stop it first")
        return [run for run in runs if run.state == value]
    by_path = {run.folder.resolve(): run for run in runs}
    found: dict[Path, Listed] = {}
    for name in references.split(value):
        path = next((path for path in (Path(at_home(name)), logs / name) if path.resolve() in by_path), None)
        if path is None:
            raise ConfigError(f"delete={name}: no run below {logs}; espalier {NAME} logs={logs} lists them")
        found[path.resolve()] = by_path[path.resolve()]
    for path, run in found.items():
        if run.state == RUNNING:
            raise ConfigError(f"delete={run.folder}: is running; stop it first")
        if inside := next((other for other in by_path if path in other.parents and other not in found), None):
            raise ConfigError(f"delete={run.folder}: another run lies in it, {by_path[inside].folder}; name both")
    return list(found.values())


def _delete(runs: list[Listed], listed: Sequence[Listed], *, is_sure: bool) -> int:
    if not runs:
        terminal.say(f"nothing to delete among {len(listed)} runs")
        return 0
    _show(runs)
    count = "this run" if len(runs) == 1 else f"these {len(runs)} runs"
    size = report.bytes_(sum(run.size_bytes for run in runs))
    if not is_sure and not sys.stdin.isatty():
        raise ConfigError(f"delete: nobody can be asked here, so nothing was deleted; add {YES} to delete {count}")
    if not is_sure and not _is_confirmed(f"delete {count}, {size}? [y/N] "):
        terminal.say("nothing was deleted")
        return 1
    for run in sorted(runs, key=lambda run: len(run.folder.parts), reverse=True):  # what lies inside goes first
        _remove(run.folder)
        terminal.say(f"deleted {run.folder}")
    return 0


def _is_confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _remove(folder: Path) -> None:
    """Delete a folder under its lock, so that no run begins or goes on in it meanwhile."""
    with ownership.locked(folder):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise EspalierError(f"{folder}: not deleted, or not all of it: {error.strerror}") from error
