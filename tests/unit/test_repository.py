"""Files that GitHub reads: forms, workflows, the release."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [file for file in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if file.name != "config.yml"]


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.name)
def test_a_form_has_what_github_asks_for(file):
    form = yaml.safe_load(file.read_text())
    assert {"name", "description", "body"} <= form.keys()
    names = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(names) == len(set(names)) >= 2
    assert {field["type"] for field in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_runs_scripts_that_exist_with_few_rights(file):
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    commands = [step["run"] for job in workflow["jobs"].values() for step in job.get("steps", []) if "run" in step]
    scripts = {path for command in commands for path in re.findall(r"(?:^|\s)((?:scripts|\.ci)/[\w.]+)", command)}
    assert scripts
    assert [path for path in scripts if not (ROOT / path).exists()] == []
    installed = {word for command in commands for word in re.findall(r"-c constraints\.txt (\S+)", command)}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert installed <= pinned


def test_every_supported_python_is_in_the_workflow_and_a_mac():
    matrix = yaml.safe_load((GITHUB / "workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    first, last = map(int, re.findall(r"3\.(\d+)", bounds))
    assert matrix["python"] == [f"3.{minor}" for minor in range(first, last)]
    assert "macos-latest" in [extra["os"] for extra in matrix["include"]]


def test_the_changelog_says_what_is_coming():
    text = (ROOT / "CHANGELOG.md").read_text()
    [first, *_] = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert first == "Unreleased"
    kinds = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the script beside a changelog with one version."""
    (tmp_path / "scripts").mkdir()
    shutil.copy2(ROOT / "scripts/release_notes.py", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.2.0"\n')
    parts = ("# Changes", "## Unreleased", "soon", "## 0.2.0 - 2026-12-01", "* new", "## 0.1.0", "old")
    (tmp_path / "CHANGELOG.md").write_text("\n\n".join(parts))
    return tmp_path


def notes(folder: Path, tag: str) -> tuple[int, str]:
    words = [sys.executable, "-S", "scripts/release_notes.py", tag]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_notes_of_a_release_are_its_part_of_the_changelog(release):
    assert notes(release, "v0.2.0") == (0, "* new\n")


def test_a_tag_that_is_not_the_version_or_not_in_the_changelog_is_refused(release):
    code, text = notes(release, "v0.3.0")
    assert code == 1
    assert "the version in pyproject.toml 0.2.0" in text
    (release / "pyproject.toml").write_text('[project]\nversion = "0.3.0"\n')
    code, text = notes(release, "v0.3.0")
    assert code == 1
    assert "nothing under 0.3.0" in text
