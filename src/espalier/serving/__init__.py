"""A bundle over HTTP: predictions, heat maps and a page, in a process without torch, Lightning, Hydra and W&B."""
