"""`python -m traced TASK ...` is `espalier TASK ...` that appends a line per batch to the file named by TRACE.

A line holds rank, epoch, batch, a hash of the sample ids, a hash of the augmented input, and the loss to the last bit.
It is written before the optimizer step, so every step that a checkpoint holds has its line.
A callback would not do: a configuration that comes back out of a checkpoint may name none of ours.

HARM=nan@7 makes the loss of the seventh optimizer step NaN; `gradient@7` leaves the loss and spoils its gradient.
"""

import hashlib
import os

import torch
from torch import Tensor

from espalier import cli
from espalier.data.loaders import Batch
from espalier.learners.learner import Learner

whole_step, whole_objective = Learner.training_step, Learner.objective
harm, _, harmed_step = os.environ.get("HARM", "").partition("@")


class Overflow(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        """A copy."""
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        """Infinity."""
        return gradient * torch.inf


def training_step(self: Learner, batch: Batch, batch_idx: int) -> Tensor:
    """The step, and its line."""
    loss = whole_step(self, batch, batch_idx)
    seen = (hashlib.sha256(values.numpy().tobytes()).hexdigest()[:12] for values in (batch.index, batch.x))
    words = (self.global_rank, self.current_epoch, batch_idx, *seen, loss.item().hex())
    os.write(trace, f"{' '.join(map(str, words))}\n".encode())  # one call, so a kill leaves all of it or nothing
    return loss


def objective(self: Learner, x: Tensor, output: Tensor, y: Tensor) -> Tensor:
    """The loss, spoilt at the step that was asked for."""
    loss = whole_objective(self, x, output, y)
    if not harm or self.trainer.global_step + 1 != int(harmed_step):
        return loss
    return Overflow.apply(loss) if harm == "gradient" else loss * float(harm)


if __name__ == "__main__":
    trace = os.open(os.environ["TRACE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    Learner.training_step, Learner.objective = training_step, objective  # type: ignore[method-assign]
    cli.main()
