"""Paths as people type them."""

import os


def at_home(path: str) -> str:
    """Return the path with its `~` replaced, which a shell does at the beginning of a word alone."""
    return os.path.expanduser(path)  # noqa: PTH111  Path's raises for ~nobody
