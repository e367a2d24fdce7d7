"""One run, or one trial of a sweep, once its words are composed: its folder, its processes, its errors."""

import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.config import conf_dir, redaction
from espalier.errors import ConfigError, EspalierError, StoppedError
from espalier.processes import launch, launchers, signals
from espalier.reporting import terminal
from espalier.runs import run_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from espalier.run import Run

NOT_RESULTS = frozenset({"run.log", "config.yaml", "overrides.yaml", "provenance.json"})
TRIALS_FAILED = 3


@dataclass(frozen=True)
class Ended:
    """A run of this process that is over; `error` says why it failed."""

    folder: Path
    words: list[str]
    error: Exception | None

    @property
    def outcome(self) -> str:
        return "done" if self.error is None else redaction.scrub(str(self.error)).splitlines()[0]


ended: list[Ended] = []


def last_ended() -> Path:
    """Return the folder of the run that this process has ended last."""
    return ended[-1].folder


def carry_out(cfg: "DictConfig") -> float | None:
    """Carry out one run, or one trial of a sweep; return what a sweep optimises.

    Errors are kept for `entry.py`: Hydra would print them in its own way, and what it raises itself is then
    about composing alone. Launchers that run trials in other processes hand errors over themselves.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from espalier.cli import folders

    job = HydraConfig.get()
    is_trial = job.mode == RunMode.MULTIRUN
    folder = Path(job.runtime.output_dir)
    words: Any = OmegaConf.to_container(job.overrides.task)  # as typed: `${oc.env:NAME}` stays what it is
    run: Run | None = None
    objective: float | None = None
    error: Exception | None = None
    task = str(job.runtime.choices["task"])
    if launchers.rank() == 0:
        terminal.say_when_closed(f"espalier: nobody reads what is printed any more; {task} goes on in {folder}")
    try:
        with folders.owned(folder, task, is_resumed=bool(cfg.resume), is_trial=is_trial):
            _announce(cfg, task, job.runtime.choices, folder)
            num_ranks = 1 if is_trial or launchers.find() else _num_cpus(cfg, task)
            if num_ranks == 1:
                from espalier.validate import check_trial, num_processes, prepare

                run = prepare(cfg, words, folder, task)
                if is_trial:
                    check_trial(run.cfg.trainer, run.task)  # resume= may have brought devices along
                num_ranks = num_processes(run)
            if num_ranks > 1:
                run = None  # may hold weights
                launch.launch(_words_for_ranks(folder), num_ranks)
            elif run:
                with launchers.taken_back():
                    objective = run.perform()
    except signals.Signalled as signalled:
        signalled.has_trained = run is not None and run.has_trained
        if not signalled.has_trained:
            _discard_if_empty(folder)
        raise
    except EspalierError as reason:
        error = reason
        if is_trial:
            print(f"espalier: trial {folder.name}: {redaction.scrub(str(reason))}", file=sys.stderr)
        elif isinstance(reason, ConfigError) and not cfg.resume:  # whose folder was there before
            _discard_if_empty(folder)
    except Exception as reason:
        error = reason
        if is_trial:
            print_traceback()
    if is_trial and isinstance(error, StoppedError):
        sys.exit(error.exit_code)  # an exception would only end this trial
    if error and "basic_launcher" not in str(job.launcher.get("_target_")):
        raise error
    ended.append(Ended(folder, words, error))
    return objective


def _announce(cfg: "DictConfig", task: str, choices: Mapping[str, Any], folder: Path) -> None:
    """Say what is asked for, before the seconds that importing torch takes; `Run` names the folder once all is checked.

    A resumed run has its folder already.
    """
    if task not in conf_dir.TRAINS or launchers.rank() > 0 or launch.is_rank():
        return
    what = f"{task} {choices['model']} on {choices['data']}"
    if cfg.resume:
        what = "going on"
    elif cfg.source:
        what = f"{task} from {cfg.source}"
    recipe = f", {' and '.join(map(str, cfg.compression))}" if cfg.compression and not cfg.resume else ""
    place = f": {run_folder.from_here(folder)}" if cfg.resume else ""
    print(redaction.scrub(f"{what}{recipe}, seed {cfg.seed}{place}"), flush=True)


def _num_cpus(cfg: "DictConfig", task: str) -> int:
    """Return how many processes a training on CPUs takes, where that can be told without importing torch: else 1.

    Each of them checks its input then, and what all of them find is said once.
    """
    trainer = cfg.trainer
    is_told = trainer.accelerator == "cpu" and trainer.num_nodes == 1 and isinstance(trainer.devices, int)
    num_devices: int = trainer.devices if is_told and task in conf_dir.TRAINS else 1
    return num_devices if 1 < num_devices <= max(2, os.cpu_count() or 1) else 1


def _words_for_ranks(folder: Path) -> list[str]:
    """Return the command line as this process has settled it, and the folder that all of them share."""
    from espalier.config import overrides

    shared = overrides.quoted(str(folder.resolve()))
    return [*sys.argv[1:], f"hydra.run.dir={shared}", *({"--traceback"} & set(sys.orig_argv))]


def _discard_if_empty(folder: Path) -> None:
    """Remove the folder of a run that never started."""
    is_ours = folder.exists() and folder.resolve() not in (Path.cwd(), *Path.cwd().parents)
    if launchers.rank() == 0 and is_ours and {path.name for path in folder.iterdir()} <= NOT_RESULTS:
        shutil.rmtree(folder)


def report_trials() -> int:
    """Print the table of a sweep; return its exit code."""
    from espalier.config import overrides
    from espalier.reporting import report

    finished = [(trial.folder, dict(map(overrides.pair, trial.words)), trial.outcome) for trial in ended]
    terminal.console().print(report.trials(finished))
    return TRIALS_FAILED if any(trial.error for trial in ended) else 0


def print_traceback() -> None:
    """Print the present error with all of its lines, without secrets."""
    print(redaction.scrub(traceback.format_exc()), end="", file=sys.stderr)
