"""LightningModules: the step, the metrics and the optimizer hook-up. Nothing about compression."""
