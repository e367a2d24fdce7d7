"""Writes a trained network as a file that runs without torch, runs such files and measures them."""
