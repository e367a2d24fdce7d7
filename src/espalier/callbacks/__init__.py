"""Lightning callbacks that watch a training, save checkpoints or average weights, without changing the training."""
