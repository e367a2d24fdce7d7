"""The run folder: its names, checkpoints, hashes and lock, and how files reach a disk or a bucket whole."""
