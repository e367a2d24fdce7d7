"""DDP as a Lightning strategy: a whole network on every device, gradients averaged."""

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy

from espalier.config.ranges import Positive


class Replicated(DDPStrategy):
    """Lightning's `ddp`, which gives up on a device that has not answered for `timeout_seconds`."""

    def __init__(self, timeout_seconds: Positive) -> None:
        super().__init__(timeout=timedelta(seconds=timeout_seconds))
