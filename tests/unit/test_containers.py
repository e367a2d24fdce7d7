"""Containers, as far as they can be checked without Docker: they copy, install and start what exists."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "scripts").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(file: Path) -> list[tuple[str, str]]:
    """Each with its words; lines that end in a backslash go on in the next."""
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", file.read_text())).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def copied(file: Path) -> list[str]:
    """Paths that COPY takes from the checkout."""
    words = [rest.split() for word, rest in instructions(file) if word == "COPY"]
    return [source for *sources, _ in words if not sources[0].startswith("--from=") for source in sources]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_a_container_copies_exists_and_is_in_git(file):
    assert len(copied(file)) >= 2
    for path in copied(file):
        listed = subprocess.run(["git", "ls-files", path], cwd=ROOT, capture_output=True, text=True, check=True)
        assert listed.stdout, path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_a_container_installs_has_a_pinned_version(file):
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    installed = [
        word
        for instruction, rest in instructions(file)
        if instruction == "RUN" and "pip install" in rest
        for word in rest.partition("constraints.txt")[2].split()
    ]
    assert set(installed) <= pinned
    assert installed or "scripts/bootstrap" in file.read_text()


def test_the_training_container_can_install_before_the_sources_are_there_and_starts_the_command(tmp_path):
    file = ROOT / "scripts" / "train.Dockerfile"
    sources = [path for path in copied(file) if path not in ("src", "conf")]
    for path in sources:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / path, tmp_path / path)
    package = tmp_path / "src" / PROJECT["name"]
    assert f"touch src/{PROJECT['name']}/__init__.py" in file.read_text()
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "conf").mkdir()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel:editable", "-d", "wheel"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [path] = [name for name in archive.namelist() if name.endswith(".pth")]
        assert str(tmp_path / "src") in archive.read(path).decode()  # so the sources that are copied later are the ones
    [entry] = [json.loads(rest) for word, rest in instructions(file) if word == "ENTRYPOINT"]
    assert entry == [f"/project/.venv/bin/{next(iter(PROJECT['scripts']))}"]


def test_the_container_of_the_editor_builds_from_a_stage_that_exists():
    folder = ROOT / ".devcontainer"
    settings = json.loads((folder / "devcontainer.json").read_text())
    file = folder / settings["build"]["dockerfile"]
    stages = [rest.split(" AS ")[1] for word, rest in instructions(file) if word == "FROM"]
    assert settings["build"]["target"] in stages
    assert (folder / settings["build"]["context"]).resolve() == ROOT
    assert (ROOT / settings["postCreateCommand"]).exists()
    assert f"useradd --create-home --uid 1000 --shell /bin/bash {settings['remoteUser']}" in file.read_text()
