"""The command line: parses words, runs the command and returns its exit code. Nothing here imports torch."""

from espalier.cli.entry import main

__all__ = ["main"]
