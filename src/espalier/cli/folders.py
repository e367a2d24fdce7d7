"""The run folders that a command line names: where they are, and whether this process may write there."""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from espalier.config import conf_dir, inherit
from espalier.config.overrides import folder_word, open_to_any, pair, quoted, unquoted
from espalier.errors import ConfigError
from espalier.processes import launch, launchers
from espalier.runs import ownership, references, run_folder
from espalier.runs.run_folder import RunFolder

LEAVES_NOTHING = ("serve",)  # tasks that take over no folder
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")

_may_begin_again = False  # resume=auto: what ended before its first checkpoint is overwritten


def settle(words: Sequence[str], task: str) -> list[str]:
    """Make the paths of RUNs absolute, so that all ranks agree on them, and send a resumed run to its own folder."""
    global _may_begin_again
    said = dict(map(pair, words))
    _may_begin_again = said.get("resume") == "auto"
    if _may_begin_again:
        begun = references.begun(unquoted(said.get("hydra.run.dir", "")))
        dropped = ("resume", "source") if begun else ("resume",)  # a run that goes on has its source's weights
        words = [word for word in words if pair(word)[0] not in dropped]
        words += [f"resume={quoted(str(begun))}"] if begun else []
    settled = list(words)
    holds = (
        run_folder.BUNDLE
        if task in run_folder.TAKES_BUNDLE
        else "report.json"
        if task == "report"
        else run_folder.CHECKPOINTS
    )
    for place, (key, value) in enumerate(map(pair, words)):
        if key == "resume" and value not in ("", "null"):
            path = references.find(key, unquoted(value)).resolve()
            path = RunFolder.of(path).path if path.is_file() else path
            if "${" in str(path):
                raise ConfigError(
                    f"{key}={path}: ${{...}} in the name of a run folder is read as an interpolation; rename it"
                )
            settled[place] = f"{key}={quoted(str(path))}"
            settled.append(f"hydra.run.dir={quoted(str(path))}")
        if key == "source" and value not in ("", "null"):
            named = [unquoted(run) for run in references.split(unquoted(value))]
            paths = [str(_find(run, holds).resolve()) for run in named]
            several = [",".join(paths)] if task in run_folder.TAKES_SEVERAL else paths  # else Hydra asks for -m
            settled[place] = f"{key}={','.join(map(quoted, several))}"
        if key in FOLDERS:
            settled[place] = folder_word(key, value)
    given = {key for key, value in map(pair, words) if value not in ("", "null")}
    if "resume" in given:
        settled = open_to_any(settled, (*inherit.NETWORK, *inherit.METHODS))
    elif "source" in given and task != "report":
        settled = open_to_any(settled, inherit.NETWORK)
    if launchers.rank() > 0:
        settled.append("hydra/job_logging=none")
        if "hydra.run.dir" not in said:  # torchrun, SLURM: rank 0 owns the folder
            own = tempfile.mkdtemp(prefix="espalier_rank_")
            atexit.register(shutil.rmtree, own, ignore_errors=True)
            settled += [f"{key}={quoted(own)}" for key in FOLDERS]
    return settled


def _find(source: str, holds: str | Path) -> Path:
    if "://" not in source or holds != run_folder.CHECKPOINTS:
        return references.find("source", source, holds)
    from espalier.runs import remote

    return remote.fetch("source", source)


def require_unused(words: Sequence[str], task: str, *, multirun: bool) -> None:
    """Refuse a folder that another run has filled, before Hydra writes there; `owned` checks again under the lock."""
    said = dict(map(pair, words))
    folder = Path(unquoted(said.get(FOLDERS[multirun], "")))
    if said.get("resume", "null") not in ("", "null") or not folder.is_dir() or folder == Path():
        return
    for each in [trial for trial in folder.iterdir() if trial.is_dir()] if multirun else [folder]:
        _refuse_used(each, task, is_trial=multirun)


def owned(folder: Path, task: str, *, is_resumed: bool, is_trial: bool) -> AbstractContextManager[None]:
    """Lock the folder of a run, in the first of its processes, and check that no other run has used it meanwhile."""
    if task in LEAVES_NOTHING or launchers.rank() > 0 or launch.is_rank():
        return nullcontext()
    return ownership.locked(folder, None if is_resumed else lambda: _refuse_used(folder, task, is_trial=is_trial))


def _refuse_used(folder: Path, task: str, *, is_trial: bool) -> None:
    """Raise `ConfigError` if this run would overwrite another; the ranks of a run share one folder."""
    is_first = launchers.rank() == 0 and not launch.is_rank()
    if task not in LEAVES_NOTHING and (is_first or (task in conf_dir.TRAINS and not launch.is_rank())):
        ownership.require_unused(folder, task, may_begin_again=_may_begin_again, is_trial=is_trial)
