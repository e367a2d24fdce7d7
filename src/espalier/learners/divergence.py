"""Ends a training that has diverged, before what is not finite reaches a checkpoint.

No callback: Lightning calls each hook of each callback, which costs more than the check itself.
"""

import logging
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from espalier.errors import DivergedError

NUM_FIRST = 10  # steps whose mean loss is where the training started
SMOOTHING = 0.9  # of the recent loss
MAX_SHOWN = 8  # samples named in the message
HALF = (torch.bfloat16, torch.float16)
KEPT = ("start", "recent", "has_warned")  # in a checkpoint

Looked = tuple[int, Tensor, float, Tensor]  # step, loss and norm (2,), learning rate, samples

log = logging.getLogger(__name__)


class Guard:
    """Looks at loss and gradient before every optimizer step.

    On the CPU a step that is not finite is not taken. An accelerator would have to be waited for, so there each step is
    looked at in the next one, and before a checkpoint is written.
    Processes that share gradients see the same norm, so all of them end at the same step. With the scaler of float16
    gradients overflow now and then, which it handles: there the mean loss decides.

    A loss above that of the first steps, after it had fallen to less than half of it, is worth one warning.
    """

    def __init__(self) -> None:
        self.start = 0.0  # mean loss of the first steps
        self.recent = 0.0  # moving average of the loss
        self.has_warned = False
        self.is_alone = True  # no other process trains the same network: one that ends alone leaves others waiting
        self.lags = False
        self.step = 0  # optimizer steps so far, those before a resume included
        self.index = torch.empty(0)  # of the samples in the last batch, (B,)
        self.norm: Tensor | None = None  # of the gradients at this step; None where the scaler has the say
        self._pending: Looked | None = None

    def look(self, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Check the step that is about to be taken; `rate` is its learning rate.

        Raises:
            DivergedError: loss or gradient is not finite, in this step or, on an accelerator, in the one before.
        """
        self.step += 1
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        looked = (self.step, torch.stack((loss, whole)), rate, self.index)
        if self.lags:
            self.settle()
            self._pending = looked
        else:
            self._require_finite(*looked)

    def settle(self) -> None:
        """Look at the last step now.

        Raises:
            DivergedError: it was not finite.
        """
        if self._pending is not None:
            looked, self._pending = self._pending, None
            self._require_finite(*looked)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training has to know."""
        return {name: getattr(self, name) for name in KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in KEPT:
            setattr(self, name, state[name])

    def _require_finite(self, step: int, values: Tensor, rate: float, index: Tensor) -> None:
        loss, norm = values.tolist()
        if not isfinite(norm) or (self.is_alone and not isfinite(loss)):
            shown = index.tolist()
            samples = ", ".join(map(str, shown[:MAX_SHOWN])) + (", ..." if len(shown) > MAX_SHOWN else "")
            raise DivergedError(
                f"diverged at step {step}: loss {loss:g}, gradient norm {norm:g}, learning rate {rate:g}, "
                f"samples {samples}; checkpoints are those before it; try a smaller optimizer.lr or "
                "trainer.precision=32-true, and trainer.detect_anomaly=true to see where it begins"
            )
        if not self.has_warned:
            self._watch(step, loss)

    def _watch(self, step: int, loss: float) -> None:
        """Warn once if training has lost what it had reached."""
        if step <= NUM_FIRST:
            self.start += (loss - self.start) / step
            self.recent = self.start
        elif loss > self.start > 2 * self.recent:
            self.has_warned = True
            log.warning(
                "loss %.3g at step %d, after %.3g before and %.3g at the start", loss, step, self.recent, self.start
            )
        self.recent += (1 - SMOOTHING) * (loss - self.recent)


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """Return the L2 norm of all gradients together, scalar, float32 or wider; a DTensor if they are sharded."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if isinstance(gradients[0], DTensor):
        return get_total_norm(gradients)
    norms = partial(torch._foreach_norm, dtype=torch.float32) if gradients[0].dtype in HALF else torch._foreach_norm
    try:  # as get_total_norm, in 4 calls, not 60
        return torch.linalg.vector_norm(torch.stack(norms(gradients)))
    except NotImplementedError:  # a gradient of an embedding may be sparse
        whole = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack(norms(whole)))
