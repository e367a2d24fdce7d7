"""`espalier TASK [overrides]`: verb, compose, check, run, exit code.

The verb is sugar for `task=TASK` and stays in `sys.argv` in that form, because DDP children run the command line again.
Torch and Lightning are imported inside `job.carry_out`, after the configuration has composed.
"""

import logging
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import metadata

from espalier.cli import help_pages, job
from espalier.config import conf_dir, redaction
from espalier.errors import ConfigError, EspalierError
from espalier.processes import launch, launchers, signals
from espalier.reporting import terminal
from espalier.trust import archive

TAKES_VALUE = frozenset(
    {"--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn", "--info", "-i"}
)
FLAGS = TAKES_VALUE | {"--multirun", "-m", "--run", "-r", "--resolve", "--hydra-help", "--version"}
NAME = "espalier"  # of the command and of the package that is installed


def main() -> None:
    """Run the console command.

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
            job.print_traceback()
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
    """Return the version of this package, and of what decides its numbers most; nothing is imported."""
    python = ".".join(map(str, sys.version_info[:3]))
    versions = (f"{name} {metadata.version(name)}" for name in ("torch", "lightning"))
    return f"{NAME} {metadata.version(NAME)} ({', '.join(versions)}, Python {python})"


def compose_and_run() -> int:
    """Run what `sys.argv` says and return the exit code; `job.last_ended` knows the folder.

    Raises:
        EspalierError: it cannot work, failed, diverged or was stopped.
    """
    import hydra

    from espalier.cli import folders
    from espalier.config import compose, overrides

    archive.refuse_unsafe_loading()
    flags, words = _split_flags(sys.argv[1:])
    redaction.refuse(words)
    if ("resume", "auto") in map(overrides.pair, words) and {"-m", "--multirun"} & set(flags):
        raise ConfigError(
            "resume=auto: goes on with one run, and -m starts several; use one command per trial, each with its own "
            "hydra.run.dir=FOLDER resume=auto"
        )
    task = _task_of(words)
    words = folders.settle(words, task)
    sys.argv[1:] = [*flags, *words]  # argparse takes no overrides on both sides of a flag
    multirun = bool({"-m", "--multirun"} & set(flags))
    if multirun:
        if shown := {"--cfg", "-c", "--info", "-i"} & {flag.partition("=")[0] for flag in flags}:
            raise ConfigError(
                f"{shown.pop()}: shows the configuration of one run; drop -m, and say one value of each key"
            )
        _check_trials(words, task)
    folders.require_unused(words, task, multirun=multirun)
    job.ended.clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print and exit 1; we translate and choose the code
    application = hydra.main(config_path=str(conf_dir.CONF), config_name="config", version_base="1.3")(job.carry_out)
    try:
        application()
    except compose.NOT_COMPOSED as error:
        raise ConfigError(*compose.diagnose(words, error)) from error
    except OSError as error:
        raise ConfigError(f"hydra.run.dir={error.filename}: cannot be written: {error.strerror}") from error
    if multirun:
        return job.report_trials()
    if job.ended and job.ended[-1].error:
        raise job.ended[-1].error
    return 0


def _split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return flags with their values, and overrides, wherever they stand.

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


def _check_trials(words: Sequence[str], task: str) -> None:
    """Compose every value of a sweep before the first trial starts."""
    from espalier.config import compose, overrides

    problems: dict[str, None] = {}
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


def _complete(tasks: Sequence[str]) -> int:
    """Answer the shell for tab completion: Hydra's code (`-sc install=bash`), our words (`-sc query=bash`)."""
    line = os.environ.get("COMP_LINE")
    if line is None:
        import hydra

        hydra.main(config_path=str(conf_dir.CONF), config_name="config", version_base="1.3")(job.carry_out)()
        return 0
    *typed, word = line.split(" ")[1:]
    print(*help_pages.candidates([text for text in typed if text], word, tasks))
    return 0
