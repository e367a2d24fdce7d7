"""The Python interface: load what was trained or exported, let it answer, train (docs/python.md)."""
