"""Words in, exit code out: the command, its help, completion and folders. Nothing here imports torch."""

from espalier.cli.entry import main

__all__ = ["main"]
