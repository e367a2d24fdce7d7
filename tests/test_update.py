"""`scripts/update` merges a newer upstream into a renamed fork; only git runs, on a tree of a few files."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLD = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
NEW = "pergola_nets"
SHAPES = f"""\
from {OLD} import units


def area(width, height):
    return units.METRE * width * height


# lines that nobody changes


def volume(width, height, depth):
    return area(width, height) * depth
"""
TEST = f"""\
from {OLD}.shapes import area, volume


def test_shapes():
    assert (area(2, 3), volume(2, 3, 4)) == (6, 24)
"""
CIRCLES = f"""\
from {OLD}.units import METRE


def circle(radius):
    return 3 * METRE * radius**2
"""
NEWER = {  # what upstream does next: a new module with its test, a change of an old one
    f"src/{OLD}/circles.py": CIRCLES,
    "tests/test_circles.py": f"from {OLD}.circles import circle\n\n\ndef test_circle():\n    assert circle(2) == 12\n",
    f"src/{OLD}/shapes.py": SHAPES.replace("volume(width, height, depth)", "volume(width, height, depth=1)"),
}
PERSON = {f"GIT_{role}_{what}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, **PERSON, "GIT_CONFIG_GLOBAL": os.devnull, "PYTHONPATH": "src"}
    own["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a tenth of the time
    return subprocess.run(words, cwd=folder, env=own, capture_output=True, text=True, timeout=60, check=False)


def commit(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    run(folder, "git", "add", "-A")
    done = run(folder, "git", "commit", "-qm", "work")
    assert done.returncode == 0, done.stderr
    return run(folder, "git", "rev-parse", "HEAD").stdout.strip()


def update(fork: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(fork, sys.executable, "scripts/update", *words)


def state(folder: Path) -> tuple[str, str]:
    """Commit and changes of a checkout."""
    return run(folder, "git", "rev-parse", "HEAD").stdout, run(folder, "git", "status", "--porcelain").stdout


def rename_and_work(fork: Path) -> None:
    """Change one function, add a module."""
    done = run(fork, sys.executable, "scripts/rename.py", NEW, "--command", "pergola")
    assert done.returncode == 0, done.stderr
    shapes = (fork / f"src/{NEW}/shapes.py").read_text()
    mine = f"from {NEW}.shapes import area\n\nMINE = area(1)\n"
    changed = shapes.replace("area(width, height):", "area(width, height=3):")
    assert changed != shapes
    commit(fork, {f"src/{NEW}/shapes.py": changed, f"src/{NEW}/mine.py": mine})


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A small project that is renamed and updated by the scripts of this one."""
    folder = tmp_path / "upstream"
    (folder / "scripts").mkdir(parents=True)
    for script in ("rename.py", "update"):
        shutil.copy2(ROOT / "scripts" / script, folder / "scripts" / script)
    run(folder, "git", "init", "-qb", "main")
    pyproject = f'[project]\nname = "{OLD}"\nscripts = {{{OLD} = "{OLD}.cli:main"}}\n'
    package = {"__init__.py": "", "units.py": "METRE = 1\n", "shapes.py": SHAPES}
    files = {"pyproject.toml": pyproject, "tests/test_shapes.py": TEST, ".gitignore": "__pycache__/\n"}
    commit(folder, files | {f"src/{OLD}/{name}": text for name, text in package.items()})
    return folder


@pytest.fixture
def fork(upstream: Path, tmp_path: Path) -> Path:
    """A renamed clone with changes of its own."""
    folder = tmp_path / "fork"
    run(tmp_path, "git", "clone", "-q", "-o", "upstream", str(upstream), str(folder))
    rename_and_work(folder)
    return folder


def test_a_renamed_fork_gets_new_and_changed_files_under_its_own_names_and_keeps_its_changes(fork, upstream):
    commit(upstream, NEWER)
    done = update(fork)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (fork / "src" / NEW).glob("*.py")} == {
        *("__init__.py", "units.py", "shapes.py", "mine.py", "circles.py")
    }
    assert not (fork / "src" / OLD).exists()
    shapes = (fork / f"src/{NEW}/shapes.py").read_text()
    assert "area(width, height=3)" in shapes
    assert "volume(width, height, depth=1)" in shapes
    assert state(fork)[1] == ""
    tested = run(fork, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert "2 passed" in tested.stdout, tested.stdout


def test_a_second_update_brings_only_what_came_since_and_a_third_nothing(fork, upstream):
    commit(upstream, NEWER)
    assert update(fork).returncode == 0
    commit(fork, {"tests/test_circles.py": f"from {NEW} import circles\n\nassert circles\n"})  # ours from now on
    commit(upstream, {f"src/{OLD}/units.py": "METRE = 1\nINCH = 0.0254\n"})
    assert update(fork).returncode == 0
    assert "INCH" in (fork / f"src/{NEW}/units.py").read_text()
    assert (fork / "tests/test_circles.py").read_text().endswith("assert circles\n")
    before = state(fork)
    again = update(fork)
    assert (again.returncode, state(fork)) == (0, before)
    assert "in this project already" in again.stdout


def test_where_both_changed_the_same_line_the_update_says_where_and_can_be_taken_back(fork, upstream):
    both = SHAPES.replace("area(width, height):", "area(width, height=9):")
    commit(upstream, {f"src/{OLD}/shapes.py": both})
    done = update(fork)
    assert done.returncode == 1
    assert f"both sides changed src/{NEW}/shapes.py;" in done.stdout
    assert run(fork, "git", "merge", "--abort").returncode == 0
    assert "area(width, height=3)" in (fork / f"src/{NEW}/shapes.py").read_text()


def test_a_copy_without_history_is_updated_once_it_knows_which_commit_it_was(upstream, tmp_path):
    copied = run(upstream, "git", "rev-parse", "HEAD").stdout.strip()
    fork = tmp_path / "copy"
    shutil.copytree(upstream, fork, ignore=shutil.ignore_patterns(".git"))
    run(fork, "git", "init", "-qb", "main")
    commit(fork, {"notes.txt": "ours\n"})
    rename_and_work(fork)
    commit(upstream, NEWER)
    before = state(fork)
    refused = update(fork, str(upstream))
    assert (refused.returncode, state(fork)) == (2, before)
    assert "--since COMMIT" in refused.stderr
    assert update(fork, str(upstream), "--since", copied).returncode == 0
    assert "depth=1" in (fork / f"src/{NEW}/shapes.py").read_text()
    assert "height=3" in (fork / f"src/{NEW}/shapes.py").read_text()


def test_an_update_is_refused_before_anything_has_changed(fork, upstream):
    assert "cannot fetch v9 from upstream" in update(fork, "--version", "v9").stderr
    run(fork, "git", "remote", "rename", "upstream", "origin")
    assert "no remote is called upstream" in update(fork).stderr
    (fork / "pyproject.toml").write_text((fork / "pyproject.toml").read_text() + "\n")
    before = state(fork)
    refused = update(fork, str(upstream))
    assert (refused.returncode, state(fork)) == (2, before)
    assert "commit them first" in refused.stderr
