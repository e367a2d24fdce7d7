"""Data sets, their loaders and the augmentations that run on whole batches."""
