#!/usr/bin/env python3
"""Print the part of CHANGELOG.md that belongs to a tag: scripts/release_notes.py v0.1.0

Ends with 1 where the tag is not the version in pyproject.toml, or the changelog has nothing about it.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Compare the three, then print."""
    (tag,) = sys.argv[1:]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if tag != f"v{version}":
        sys.exit(f"the tag is {tag}, the version in pyproject.toml {version}: set one of them, v{version} or {tag[1:]}")
    parts = re.split(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    titles = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = [text.strip() for title, text in titles.items() if title.split()[0].strip("[]") == version]
    if not found or not found[0]:
        sys.exit(f"CHANGELOG.md has nothing under {version}: move it there from Unreleased, as `## {version} - date`")
    print(found[0])


if __name__ == "__main__":
    main()
