"""What lies in a run folder: names, checkpoints, hashes, the lock; how it reaches a disk or a bucket whole."""
