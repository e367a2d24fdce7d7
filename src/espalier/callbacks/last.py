"""The checkpoint that a run resumes from: `last.ckpt`, after every validation."""

from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from espalier.ranges import Count


class Last(ModelCheckpoint):
    """Replaces `last.ckpt` every `every_n_epochs` epochs.

    Lightning's own `save_last` writes it only where a better checkpoint was written as well (2.6.6): a run that was
    killed late would go back to its best epoch.
    """

    def __init__(self, dirpath: Path, every_n_epochs: Count) -> None:
        super().__init__(dirpath, filename="last", every_n_epochs=every_n_epochs, enable_version_counter=False)
