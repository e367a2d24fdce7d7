"""Runs the command line inside the test process, in a folder of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from espalier import cli
from helpers import forked

QUICK = ("logger=[csv]", "callbacks=[checkpoint,monitor]")


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str
    folder: Path  # where logs/ lies

    @property
    def run(self) -> Path:
        """The newest run folder."""
        return max(self.folder.glob("logs/*/*/report.json"), key=lambda report: report.stat().st_mtime).parent


Command = Callable[..., Outcome]


@pytest.fixture
def espalier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`espalier("train", "model=mlp")` as a user would type it, with tmp_path as the current folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Outcome:
        return command(words, tmp_path, capfd)

    return run


def command(words: Sequence[str], folder: Path, capfd: pytest.CaptureFixture[str] | None = None) -> Outcome:
    before, sys.argv = sys.argv, ["espalier", *words]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    out, err = capfd.readouterr() if capfd else ("", "")
    return Outcome(code, out, err, folder)


def launch(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m WORDS` in the folder, with the modules of the tests at hand.

    A copy of the fork server, unless a variable says something that is read while a program starts (`can_fork`).
    """
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **environment}
    return forked.run(["-m", *words], cwd=folder, env=own, timeout=120)


def launch_anew(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`launch` in interpreters of their own, for what happens while a program starts."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **environment}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=own, capture_output=True, text=True, timeout=120
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if sys.platform == "linux" and forked.ADDRESS not in os.environ:  # the workers of pytest-xdist share one
        server = forked.server()
        server.__enter__()
        config.add_cleanup(lambda: server.__exit__(None, None, None))


def run_in(folder: Path) -> Path:
    """The only run folder."""
    [run] = folder.glob("logs/*/*")
    return run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
