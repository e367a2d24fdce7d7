"""`espalier TASK [overrides]`: verb, compose, check, run, exit code.

The verb is sugar for `task=TASK` and stays in `sys.argv` in that form, because DDP children run the command line again.
Torch and Lightning are imported inside `_job`, after the configuration has composed.
"""

import logging
import os
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.cli import help_pages
from espalier.config import conf_dir, redaction
from espalier.errors import ConfigError, EspalierError, StoppedError
from espalier.processes import launch, launchers, signals
from espalier.reporting import terminal

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from espalier.run import Run

TAKES_VALUE = frozenset(
    {"--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn", "--info", "-i"}
)
FLAGS = TAKES_VALUE | {"--multirun", "-m", "--run", "-r", "--resolve", "--hydra-help", "--version"}
NOT_RESULTS = frozenset({"run.log", "config.yaml", "overrides.yaml", "provenance.json"})
NAME = "espalier"  # of the command and of the package that is installed
TRIALS_FAILED = 3
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def main() -> None:
    """The console command.

    Its exit code is 0 done, 1 failed, 2 bad input, 3 failed trials, 4 diverged, 75 stopped, 130 interrupted.
    """
    terminal.keep_open()
    redaction.watch_output()
    logging.raiseExceptions = False  # a log file on a full disk would cost two tracebacks
    _choose_wait_policy()
    wants_traceback = "--traceback" in sys.argv
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--traceback"]
    try:
        if launch.is_rank():
            launch.end_with_parent()
        sys.exit(_dispatch(sys.argv[1:]))
    except EspalierError as error:
        if launch.is_rank():
            launch.leave_note(error, with_traceback=wants_traceback)
            sys.exit(error.exit_code)
        if wants_traceback:
            _print_traceback()
        if launchers.rank() == 0 or isinstance(error, launchers.LeftOverError):
            print(
                *(f"espalier: {line}" for line in redaction.scrub(str(error)).splitlines()), sep="\n", file=sys.stderr
            )
        sys.exit(error.exit_code)
    except Exception as error:
        if not launch.is_rank():
            redaction.watch_output()  # again: wandb and torch.distributed print the traceback in their own way
            raise
        launch.leave_note(error, with_traceback=True)
        sys.exit(1)


def _choose_wait_policy() -> None:
    """Let torch's threads sleep while they wait, if other work fills half of this machine already.

    They spin otherwise: for small networks 2.5 times quicker on a quiet machine, 1.6 times slower beside two busy
    processes and worse beside more (docs/training.md). OpenMP reads the variable when torch is imported.
    """
    if hasattr(os, "getloadavg") and os.getloadavg()[0] >= (os.cpu_count() or 1) / 2:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _dispatch(words: Sequence[str]) -> int:
    tasks = conf_dir.groups()["task"]
    if "-sc" in words or "--shell-completion" in words:
        return _complete(tasks)
    if not words or words[0] in ("-h", "--help"):
        print(help_pages.overview(tasks))
        return 0
    if "--version" in words:
        print(_version())
        return 0
    verb = words[0]
    if verb == help_pages.RUNS:
        return _runs(words[1:])
    if "=" not in verb and not verb.startswith("-"):
        if verb not in tasks:
            close = get_close_matches(verb, [*tasks, help_pages.RUNS], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{verb}: no such task{hint}; a task is one of {', '.join(tasks)}, or {help_pages.RUNS}")
        sys.argv[1] = f"task={verb}"
    if "--help" in words or "-h" in words:
        print(help_pages.help_page(verb, words[-1]))
        return 0
    task = _task_of(sys.argv)
    with signals.heeded(task):
        return compose_and_run()


def _runs(words: Sequence[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(help_pages.runs_page())
        return 0
    from espalier.cli import runs

    with signals.heeded(help_pages.RUNS):
        return runs.main(words)


def _version() -> str:
    """The version of this package, and of what decides its numbers most; nothing is imported."""
    python = ".".join(map(str, sys.version_info[:3]))
    versions = (f"{name} {metadata.version(name)}" for name in ("torch", "lightning"))
    return f"{NAME} {metadata.version(NAME)} ({', '.join(versions)}, Python {python})"


def compose_and_run() -> int:
    """Run what `sys.argv` says and return the exit code; `last_ended` knows the folder.

    Raises:
        EspalierError: it cannot work, failed, diverged or was stopped.
    """
    import hydra

    from espalier.cli import folders
    from espalier.config import compose

    refuse_unsafe_loading()
    flags, words = _split_flags(sys.argv[1:])
    redaction.refuse(words)
    words = folders.settle(words, _task_of(words))
    sys.argv[1:] = [*flags, *words]  # argparse takes no overrides on both sides of a flag
    multirun = bool({"-m", "--multirun"} & set(flags))
    if multirun:
        if shown := {"--cfg", "-c", "--info", "-i"} & {flag.partition("=")[0] for flag in flags}:
            raise ConfigError(
                f"{shown.pop()}: shows the configuration of one run; drop -m, and say one value of each key"
            )
        _check_trials(words)
    folders.require_unused(words, multirun=multirun)
    _ended.clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print and exit 1; we translate and choose the code
    application = hydra.main(config_path=str(conf_dir.CONF), config_name="config", version_base="1.3")(_job)
    try:
        application()
    except compose.NOT_COMPOSED as error:
        raise ConfigError(*compose.diagnose(words, error)) from error
    except OSError as error:
        raise ConfigError(f"hydra.run.dir={error.filename}: cannot be written: {error.strerror}") from error
    if multirun:
        return _report_trials()
    if _ended and _ended[-1].error:
        raise _ended[-1].error
    return 0


def refuse_unsafe_loading() -> None:
    """Raise `ConfigError` if the environment tells torch to run whatever a checkpoint holds."""
    value = os.environ.get(UNSAFE, "")
    if value.lower() in ("1", "y", "yes", "true"):  # as torch reads it
        raise ConfigError(f"{UNSAFE}={value}: makes torch run code out of checkpoints; unset it")


def _split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides, wherever they stand.

    Raises:
        ConfigError: a flag that neither we nor Hydra have.
    """
    flags: list[str] = []
    overrides: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-") and word.partition("=")[0] not in FLAGS:
            close = get_close_matches(word, FLAGS, n=1)
            raise ConfigError(f"{word}: no such flag{f'; did you mean {close[0]}?' if close else ''}")
        (flags if word.startswith("-") or before in TAKES_VALUE else overrides).append(word)
    return flags, overrides


def _task_of(words: Sequence[str]) -> str:
    return next((word.removeprefix("task=") for word in words if word.startswith("task=")), "train")


def _check_trials(words: Sequence[str]) -> None:
    """Compose every value of a sweep before the first trial starts."""
    from espalier.config import compose, overrides

    problems: dict[str, None] = {}
    task = _task_of(words)
    for trial in overrides.trials(words):
        try:
            trainer = compose.compose(trial).trainer
        except ConfigError as error:
            problems.update(dict.fromkeys(str(error).splitlines()))
            continue
        if (trainer.devices, trainer.num_nodes) == (1, 1):
            continue  # as most; counting what "auto" means takes the import of torch
        from espalier.validate import check_trial

        try:
            check_trial(trainer, task)
        except ConfigError as error:
            problems[str(error)] = None
    if problems:
        raise ConfigError(*problems)


@dataclass(frozen=True)
class Ended:
    """A run of this process that is over; `error` says why it failed."""

    folder: Path
    words: list[str]
    error: Exception | None

    @property
    def outcome(self) -> str:
        return "done" if self.error is None else redaction.scrub(str(self.error)).splitlines()[0]


_ended: list[Ended] = []


def last_ended() -> Path:
    """Return the folder of the run that this process has ended last."""
    return _ended[-1].folder


def _job(cfg: "DictConfig") -> float | None:
    """One run, or one trial of a sweep; returns what a sweep optimises.

    Errors are kept for `compose_and_run`: Hydra would print them in its own way, and what it raises itself is then
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
            _print_traceback()
    if is_trial and isinstance(error, StoppedError):
        sys.exit(error.exit_code)  # an exception would only end this trial
    if error and "basic_launcher" not in str(job.launcher.get("_target_")):
        raise error
    _ended.append(Ended(folder, words, error))
    return objective


def _announce(cfg: "DictConfig", task: str, choices: Mapping[str, Any], folder: Path) -> None:
    """Say what trains and into which folder, before the seconds that importing torch takes."""
    if task not in conf_dir.TRAINS or launchers.rank() > 0 or launch.is_rank():
        return
    what = f"{task} {choices['model']} on {choices['data']}"
    if cfg.resume:
        what = "going on"
    elif cfg.source:
        what = f"{task} from {cfg.source}"
    recipe = f", {' and '.join(map(str, cfg.compression))}" if cfg.compression and not cfg.resume else ""
    place = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    print(redaction.scrub(f"{what}{recipe}, seed {cfg.seed}: {place}"), flush=True)


def _num_cpus(cfg: "DictConfig", task: str) -> int:
    """How many processes a training on CPUs takes, where that can be told without importing torch here as well: else 1.

    Each of them checks its input then, and what all of them find is said once.
    """
    trainer = cfg.trainer
    is_told = trainer.accelerator == "cpu" and trainer.num_nodes == 1 and isinstance(trainer.devices, int)
    num_devices: int = trainer.devices if is_told and task in conf_dir.TRAINS else 1
    return num_devices if 1 < num_devices <= max(2, os.cpu_count() or 1) else 1


def _words_for_ranks(folder: Path) -> list[str]:
    """The command line as this process has settled it, and the folder that all of them share."""
    from espalier.config import overrides

    shared = overrides.quoted(str(folder.resolve()))
    return [*sys.argv[1:], f"hydra.run.dir={shared}", *({"--traceback"} & set(sys.orig_argv))]


def _print_traceback() -> None:
    print(redaction.scrub(traceback.format_exc()), end="", file=sys.stderr)


def _discard_if_empty(folder: Path) -> None:
    """A run that never started leaves no folder behind."""
    is_ours = folder.exists() and folder.resolve() not in (Path.cwd(), *Path.cwd().parents)
    if launchers.rank() == 0 and is_ours and {path.name for path in folder.iterdir()} <= NOT_RESULTS:
        shutil.rmtree(folder)


def _report_trials() -> int:
    from espalier.reporting import report

    terminal.console().print(report.trials([(trial.folder, trial.words, trial.outcome) for trial in _ended]))
    return TRIALS_FAILED if any(trial.error for trial in _ended) else 0


def _complete(tasks: Sequence[str]) -> int:
    """Tab completion: Hydra's shell code (`-sc install=bash`), our words (`-sc query=bash`)."""
    line = os.environ.get("COMP_LINE")
    if line is None:
        import hydra

        hydra.main(config_path=str(conf_dir.CONF), config_name="config", version_base="1.3")(_job)()
        return 0
    *typed, word = line.split(" ")[1:]
    print(*help_pages.candidates([text for text in typed if text], word, tasks))
    return 0
