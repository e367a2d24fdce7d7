"""FSDP2 as a Lightning strategy: parameters, gradients and optimizer state are spread over all devices."""

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy

from espalier.ranges import Positive


class FullyShardedData(ModelParallelStrategy):
    """Every device trains on its own part of the batch; `Learner.configure_model` shards the layers.

    Lightning's `auto` would split each layer's computation within a node (tensor parallelism), which needs a plan per
    model. Checkpoints are whole files that load anywhere. It gives up on a device that has not answered for
    `timeout_seconds`.
    """

    def __init__(self, timeout_seconds: Positive) -> None:
        timeout = timedelta(seconds=timeout_seconds)
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
