"""What a fresh machine installs is pinned, hashed, complete, and ships its configuration."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = PROJECT["name"]
LOCK = (ROOT / "requirements.lock").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
SCRIPTS = ("audit", "bootstrap", "demo", "docs", "lint", "lock", "rename.py", "test", "update")


def requirements(text: str) -> list[Requirement]:
    """One for each line; a package whose newest version differs between platforms has several, with markers."""
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    return [Requirement(line.removesuffix("\\")) for line in lines]


def pins(text: str) -> dict[str, Version]:
    """Version of each package, on this platform where they differ; fails on a line that pins nothing or again."""
    found: dict[str, Version] = {}
    ours: set[str] = set()
    for requirement in requirements(text):
        (pin,) = requirement.specifier
        assert pin.operator == "==", requirement
        name = canonicalize_name(requirement.name)
        if requirement.marker is None or requirement.marker.evaluate():
            assert name not in ours, requirement
            ours.add(name)
            found[name] = Version(pin.version)
        else:
            found.setdefault(name, Version(pin.version))
    return found


def declared() -> list[Requirement]:
    """Every dependency of pyproject.toml, of the core and of the extras."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def test_lock_and_constraints_pin_the_same_versions():
    assert len(pins(LOCK)) > 100
    assert requirements(LOCK) == requirements(CONSTRAINTS)


def test_every_declared_dependency_is_pinned_within_its_bounds():
    pinned = pins(CONSTRAINTS)
    wrong = [str(wanted) for wanted in declared() if pinned[canonicalize_name(wanted.name)] not in wanted.specifier]
    assert len(declared()) > 15
    assert wrong == []


def test_every_package_of_the_lock_has_a_sha256():
    entries = re.findall(r"^\S+==.*?(?<!\\)$", LOCK, re.MULTILINE | re.DOTALL)
    assert len(entries) == len(requirements(LOCK))
    bare = [entry.split()[0] for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)]
    assert bare == []


@pytest.mark.parametrize("text", [LOCK, CONSTRAINTS], ids=["requirements.lock", "constraints.txt"])
def test_no_file_of_versions_names_an_index_or_an_address(text):
    assert (
        re.findall(r"(?m)://|^\s*-(?:-index-url|-extra-index-url|-find-links|-trusted-host|[if]\b).*| @ ", text) == []
    )


def test_torch_is_pinned_without_a_local_version_so_that_each_machine_takes_its_own_build():
    assert pins(CONSTRAINTS)["torch"].local is None


def test_lightning_is_neither_malicious_nor_vulnerable():
    (bounds,) = [wanted.specifier for wanted in declared() if wanted.name == "lightning"]
    refused = ["2.6.2", "2.6.3", "2.6.5"]  # 2.6.2 and 2.6.3 were malicious; up to 2.6.5 has CVE-2026-58659
    assert [version for version in refused if version in bounds] == []
    for package in ("lightning", "pytorch-lightning"):
        assert pins(LOCK)[package] >= Version("2.6.6")


def test_the_build_tools_are_pinned_too():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pinned = pins(CONSTRAINTS)
    assert [tool for tool in build if canonicalize_name(Requirement(tool).name) not in pinned] == []


def test_every_package_that_the_sources_import_is_declared():
    """A package that comes along with another one today may be gone tomorrow."""
    sources = list((ROOT / "src").rglob("*.py"))
    assert len(sources) > 50
    imported = {name for source in sources for name in imports(source)} - sys.stdlib_module_names - {PACKAGE}
    named = {canonicalize_name(wanted.name) for wanted in declared()}
    owners = packages_distributions()
    imported -= {"litert_torch", "ai_edge_litert"}  # ask for older packages than ours: docs/formats.md
    missing = [name for name in sorted(imported) if not named & set(map(canonicalize_name, owners.get(name, [name])))]
    assert missing == []


def imports(source: Path) -> set[str]:
    """Top-level names that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, unpacked; built by the installed hatchling, so without network."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_ships_every_option_of_conf_and_every_module(unpacked):
    inside = unpacked / PACKAGE
    page = ("serving", "page")
    for here, there, pattern, least in [
        ("conf", inside / "conf", "*.yaml", 50),
        (f"src/{PACKAGE}", inside, "*.py", 50),
        (f"src/{PACKAGE}", inside, "py.typed", 1),
        (Path("src", PACKAGE, *page), inside.joinpath(*page), "*.*", 3),
    ]:
        wanted = {path.relative_to(ROOT / here) for path in (ROOT / here).rglob(pattern)}
        assert len(wanted) >= least
        assert wanted == {path.relative_to(there) for path in there.rglob(pattern)}


def test_an_installed_wheel_composes_from_the_configuration_that_it_ships(unpacked, tmp_path):
    """`-P` and PYTHONPATH put the wheel before the editable checkout, as if only the wheel were installed."""
    program = f"from {PACKAGE} import cli; from {PACKAGE}.config import conf_dir; print(conf_dir.CONF); cli.main()"
    words = [sys.executable, "-P", "-c", program]
    done = subprocess.run(
        [*words, "train", "model=mlp", "--cfg", "job"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, _, composed = done.stdout.partition("\n")
    assert Path(where) == unpacked / PACKAGE / "conf"
    assert yaml.safe_load(composed)["model"]["_target_"] == f"{PACKAGE}.models.mlp.MLP"


def test_every_script_can_be_run():
    scripts = [ROOT / "scripts" / name for name in SCRIPTS] + [ROOT / ".ci/run"]
    assert [str(script) for script in scripts if not os.access(script, os.X_OK)] == []


def test_every_hook_is_local_so_that_linting_needs_no_network():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook for repository in repositories for hook in repository["hooks"]]
    assert {repository["repo"] for repository in repositories} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    assert len(hooks) >= 6


@pytest.mark.parametrize("version", ["3.10.14", "3.14.0"])
def test_bootstrap_refuses_an_unsupported_python_in_one_line_and_changes_nothing(tmp_path, version):
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "scripts/bootstrap"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / "python"  # answers as that interpreter would: the question whether it fits with 1
    python.write_text(f'#!/bin/sh\ncase "$1" in --version) echo "Python {version}" ;; *) exit 1 ;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/bootstrap"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert version in line
    assert "3.11, 3.12 or 3.13" in line
    assert not (tmp_path / ".venv").exists()
