"""What the answer of a network means: one class per kind of target, from loss and metrics to columns and figures."""
