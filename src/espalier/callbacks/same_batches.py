"""The same batches in each epoch, to see whether a network can learn a few samples by heart (`debug=overfit`)."""

from typing import Any

import lightning as L


class SameBatches(L.Callback):
    """Gives every epoch the order of the first, without augmentation."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.augment = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the epoch of the sampler back to 0, after Lightning has set it and before batches are drawn."""
        loader: Any = trainer.train_dataloader
        loader.sampler.set_epoch(0)
