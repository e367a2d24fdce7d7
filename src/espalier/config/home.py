"""Paths as people type them."""

import os


def at_home(path: str) -> str:
    """Return the path with `~` replaced by the home folder; a shell does so only at the beginning of a word."""
    return os.path.expanduser(path)  # noqa: PTH111  Path's raises for ~nobody
