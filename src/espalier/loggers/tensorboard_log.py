"""TensorBoard event files in the run folder: `tensorboard --logdir logs`."""

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from espalier.errors import require


def tensorboard(folder: Path, run_name: str) -> TensorBoardLogger:
    """Return a logger that writes to `<folder>/tensorboard`.

    Raises:
        ConfigError: tensorboard is not installed.
    """
    require("tensorboard", "track")
    return TensorBoardLogger(save_dir=folder, name="", version="tensorboard", default_hp_metric=False)
