"""What processes ask each other in every step, without one that waits for the others."""

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor


class SumOverRanks:
    """Begins to add up a tensor over all processes; each of them must begin the same sums in the same order."""

    def __init__(self, value: Tensor) -> None:
        self._sum = value.detach().clone()
        self._work = dist.all_reduce(self._sum, async_op=True)

    def get(self) -> Tensor:
        """Return the sum once it is there; on an accelerator its stream waits, not this process."""
        self._work.wait()
        return self._sum


class Question:
    """Whether something is so in any process; all of them ask at the same moments, and are told the same."""

    def __init__(self) -> None:
        self._asked: SumOverRanks | None = None  # how many of them said yes, the last time

    def ask(self, is_so: bool, device: torch.device, *, waits: bool) -> bool:
        """Return the answer to the question before, which has crossed the network meanwhile, so that nobody waits.

        With `waits` it is that to this question, too. After a yes nothing is on its way.
        """
        if self.settle():
            return True
        self._asked = SumOverRanks(torch.full((), float(is_so), device=device))
        return waits and self.settle()

    def settle(self) -> bool:
        """Return the answer to the last question, False if there is none; wait for it."""
        asked, self._asked = self._asked, None
        return asked is not None and bool(asked.get())


def is_first_rank() -> bool:
    """Whether this process is the one that writes and speaks."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)
