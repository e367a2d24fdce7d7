"""`python -m traced TASK ...` is `espalier TASK ...` that appends a line per batch to the file named by TRACE.

A line holds rank, epoch, batch, a hash of the sample ids, a hash of the augmented input, and the loss to the last bit.
It is written before the optimizer step, so every step that a checkpoint holds has its line.
A callback would not do: a configuration that comes back out of a checkpoint may name none of ours.

HARM=nan@7 makes the loss of the seventh optimizer step NaN; `gradient@7` leaves the loss and spoils its gradient.
"""

import hashlib
import os
import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from espalier.cli import entry
from espalier.data.loaders import Batch
from espalier.learners.learner import Learner
from helpers.faulty_step import harmed

whole = Learner.training_step
harm, _, harmed_step = os.environ.get("HARM", "").partition("@")


def training_step(self: Learner, batch: Batch, batch_idx: int) -> Tensor:
    """Return the step, and its line."""
    loss = whole(self, batch, batch_idx)
    seen = (hashlib.sha256(values.numpy().tobytes()).hexdigest()[:12] for values in (batch.index, batch.x))
    words = (self.global_rank, self.current_epoch, batch_idx, *seen, loss.item().hex())
    os.write(trace, f"{' '.join(map(str, words))}\n".encode())  # one call, so a kill leaves all of it or nothing
    return loss


if __name__ == "__main__":
    trace = os.open(os.environ["TRACE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    Learner.training_step = training_step  # type: ignore[method-assign]
    if harm:
        Learner.objective = harmed(Learner.objective, int(harmed_step), harm)  # type: ignore[method-assign]
    entry.main()
