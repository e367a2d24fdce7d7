"""FSDP2 as a Lightning strategy: parameters, gradients and optimizer state are spread over all devices."""

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from espalier.config.ranges import Positive


class FullyShardedData(ModelParallelStrategy):
    """Shards the layers over all devices; each device trains on its own part of the batch.

    `Learner.configure_model` does the sharding. Lightning's `auto` would split each layer's computation within a node
    (tensor parallelism), which needs a plan per model. Checkpoints are whole files that load anywhere. It gives up on a
    device that has not answered for `timeout_seconds`.
    """

    def __init__(self, timeout_seconds: Positive) -> None:
        timeout = timedelta(seconds=timeout_seconds)
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read weights and optimizer states; also for plain SGD, which has no state although torch expects one."""
        path = self.broadcast(checkpoint_path)
        states = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("optimizer_states", [])
        if not self.optimizers or all(state["state"] for state in states):
            return super().load_checkpoint(path, weights_only)
        optimizers, self.optimizers = self.optimizers, []
        try:
            content = super().load_checkpoint(path, weights_only)
        finally:
            self.optimizers = optimizers
        for optimizer, state in zip(optimizers, states, strict=True):
            for group, stored in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({name: value for name, value in stored.items() if name != "params"})
        return content
