#!/usr/bin/env python3
"""Make a fork yours: scripts/rename.py NAME renames package, command, targets, tests, docs and project names.

Needs git and nothing else. LICENSE keeps its copyright line, as its terms ask. Runs trained under the old name hold
its class paths in their checkpoints: train them again, or keep a copy of the old project to read them.
"""

import argparse
import importlib.util
import keyword
import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = {Path("LICENSE")}


def main() -> None:
    """Check the name and the tree first, so that a refusal changes nothing."""
    parser = argparse.ArgumentParser(description="Rename this project.")
    parser.add_argument("name", metavar="NAME", help="the new Python package, like my_project")
    parser.add_argument("--command", metavar="WORD", help="what users type, like my-project; default: NAME")
    parser.add_argument("--force", action="store_true", help="go on although there are uncommitted changes")
    asked = parser.parse_args()
    old = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    command = asked.command or asked.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", asked.name) or keyword.iskeyword(asked.name):
        parser.error(f"{asked.name} is not a package name; use small letters, digits and _, like my_project")
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", command):
        parser.error(f"--command {command} is not a command name; use small letters, digits, _ and -")
    if asked.name == old:
        parser.error(f"the project is already called {old}")
    if importlib.util.find_spec(asked.name):
        parser.error(f"{asked.name} is a package that Python already finds; choose another name")
    if git("status", "--porcelain") and not asked.force:
        parser.error("there are uncommitted changes; commit them first, or add --force")
    files = [
        Path(name) for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0") if name
    ]
    for path in sorted(files):
        if path not in KEPT:
            rewrite(path, old, asked.name, command)
    named = {part for path in files for part in (path, *path.parents) if old in part.name}
    for path in sorted(named, key=lambda path: len(path.parts), reverse=True):  # children before their folder
        new = path.with_name(path.name.replace(old, asked.name))
        (ROOT / path).rename(ROOT / new)
        print(f"{path} -> {new}")
    print(f"{old} is now {asked.name}. Next: scripts/test, then pre-commit run -a, because lines changed their length.")


def rewrite(path: Path, old: str, new: str, command: str) -> None:
    """Replace the name in a text file, in the three ways it is written, and say how often."""
    file = ROOT / path
    if file.is_symlink() or not file.is_file():
        return
    content = file.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return
    typed = re.compile(rf"(?<=bin/){old}\b|(?<!from )(?<!import )(?<![\w./-]){old}(?=[ `])")  # as a word of a shell
    spellings = {old: new, old.upper(): new.upper(), camel(old): camel(new)}
    count = sum(text.count(spelling) for spelling in spellings)
    if not count:
        return
    if command != new:
        text = typed.sub(command, text)
    text = re.sub("|".join(map(re.escape, spellings)), lambda found: spellings[found[0]], text)
    file.write_bytes(text.encode())
    print(f"{path}: {count}")


def camel(name: str) -> str:
    """my_project as the start of a class name: MyProject."""
    return "".join(part.capitalize() for part in name.split("_"))


def git(*words: str) -> str:
    """Return what git prints about this checkout."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
