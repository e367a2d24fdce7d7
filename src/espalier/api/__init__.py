"""The Python interface: load a trained or exported network, get its predictions, train (docs/python.md)."""
