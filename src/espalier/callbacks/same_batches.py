"""The same batches in each epoch, as they are: whether a network can learn a few samples by heart (`debug=overfit`)."""

from typing import Any

import lightning as L


class SameBatches(L.Callback):
    """Give every epoch the order of the first, and no sample an augmentation."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.augment = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning has set the number of the epoch; batches are drawn after this."""
        loader: Any = trainer.train_dataloader
        loader.sampler.set_epoch(0)
