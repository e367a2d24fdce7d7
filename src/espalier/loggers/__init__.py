"""Where the numbers of a training go: metrics.csv, W&B, MLflow, TensorBoard."""
