"""Loggers of the numbers of a training: metrics.csv, W&B, MLflow, TensorBoard."""
