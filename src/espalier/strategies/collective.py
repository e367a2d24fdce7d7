"""Ask all processes a question in every step, without making one wait for the others."""

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor


class SumOverRanks:
    """Starts to add up a tensor over all processes; each of them must start the same sums in the same order."""

    def __init__(self, value: Tensor) -> None:
        self._sum = value.detach().clone()
        self._work = dist.all_reduce(self._sum, async_op=True)

    def get(self) -> Tensor:
        """Return the sum once it is there; on an accelerator its stream waits, not this process."""
        self._work.wait()
        return self._sum


class Question:
    """Tells all processes whether something is so in any of them; all must ask at the same moments."""

    def __init__(self) -> None:
        self._asked: SumOverRanks | None = None  # how many of them said yes, the last time

    def ask(self, is_so: bool, device: torch.device, *, waits: bool) -> bool:
        """Ask a question and return the answer to the one before, which has arrived meanwhile.

        With `waits`, wait for the answer to this question as well. After a yes, no question is pending.
        """
        if self.settle():
            return True
        self._asked = SumOverRanks(torch.full((), float(is_so), device=device))
        return waits and self.settle()

    def settle(self) -> bool:
        """Wait for the answer to the last question and return it; False if there is none."""
        asked, self._asked = self._asked, None
        return asked is not None and bool(asked.get())


def is_first_rank() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)
