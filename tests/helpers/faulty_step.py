"""A training whose loss or gradient is spoilt at one step; for the tests and for scripts/chaos/."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from espalier.learners.learner import Learner

Objective = Callable[[Learner, Tensor, Tensor, Tensor], Tensor]


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


def harmed(whole: Objective, step: int, harm: str) -> Objective:
    """`Learner.objective`, spoilt at this optimizer step, counted from 1: `gradient`, or a number such as `nan`."""

    def objective(self: Learner, inputs: Sequence[Tensor], output: Tensor, y: Tensor) -> Tensor:
        loss = whole(self, inputs, output, y)
        if self.trainer.global_step + 1 != step:
            return loss
        return Overflow.apply(loss) if harm == "gradient" else loss * float(harm)

    return objective
