import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from helpers import forked

ROOT = Path(__file__).parents[1]
OLD = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
NEW = "pergola_nets"


def environment(folder: Path) -> dict[str, str]:
    own = {"PYTHONPATH": str(folder / "src"), "WANDB_MODE": "offline", "GIT_CONFIG_GLOBAL": os.devnull}
    return {**os.environ, "OMP_NUM_THREADS": "1", **own}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300)


def files_of(folder: Path) -> list[Path]:
    listed = run(folder, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout.split("\0")
    return [Path(name) for name in listed if name and (folder / name).is_file()]


def commit(folder: Path) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "copy")


def rename(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "scripts/rename.py", *words)


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    """A copy of this checkout, as its own repository with a clean tree."""
    folder = tmp_path / "fork"
    for path in files_of(ROOT):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    run(folder, "git", "init", "-q")
    commit(folder)
    return folder


def changes(folder: Path) -> str:
    return run(folder, "git", "status", "--porcelain").stdout


def test_a_renamed_fork_has_no_trace_of_the_old_name_and_trains(fork):
    done = rename(fork, NEW)
    assert done.returncode == 0, done.stderr
    paths = files_of(fork)
    assert len(paths) > 50
    assert [path for path in paths if OLD in str(path).lower()] == []
    traces = [path for path in paths if OLD.encode() in (fork / path).read_bytes().lower()]
    assert traces == [Path("LICENSE")]  # the licence asks to keep its copyright line

    words = ["train", "data=digits", "model=mlp", "trainer.max_epochs=1", "logger=csv"]
    trained = forked.run(["-m", f"{NEW}.cli", *words], cwd=fork, env=environment(fork), timeout=300)
    assert trained.returncode == 0, trained.stderr
    assert len(list(fork.glob("logs/train/*/report.json"))) == 1


def test_the_command_can_have_a_name_of_its_own(fork):
    done = rename(fork, NEW, "--command", "pergola-nets")
    assert done.returncode == 0, done.stderr
    project = tomllib.loads((fork / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["scripts"]) == (NEW, {"pergola-nets": f"{NEW}.cli:main"})
    listing = run(fork, sys.executable, "-m", f"{NEW}.cli")
    assert "pergola-nets train" in listing.stdout
    assert NEW not in listing.stdout


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("my-project", "not a package name"),
        ("1st", "not a package name"),
        ("lambda", "not a package name"),
        (OLD, "already called"),
        ("torch", "already finds"),
        ("json", "already finds"),
    ],
)
def test_a_name_that_cannot_work_is_refused_and_changes_nothing(fork, name, reason):
    done = rename(fork, name)
    assert (done.returncode, changes(fork)) == (2, "")
    assert reason in done.stderr.splitlines()[-1]


def test_uncommitted_work_is_refused_unless_forced_and_never_lost(fork):
    notes = fork / "notes.txt"
    notes.write_text(f"ideas for {OLD}\n")
    refused = rename(fork, NEW)
    assert (refused.returncode, changes(fork)) == (2, "?? notes.txt\n")
    assert "commit them first" in refused.stderr
    assert rename(fork, NEW, "--force").returncode == 0
    assert notes.read_text() == f"ideas for {NEW}\n"
