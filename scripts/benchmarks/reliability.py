"""What exact resume and the guards cost: our training as it is against the same with all of that switched off.

The default network on digits, with its default callbacks. Switched off are the look at loss and gradient norm, the
question for signals, the seeds of each step, and hashes, syncs and the last but one of checkpoints. Prints the median
ratio of CPU times per step over interleaved rounds in one process, and what one checkpoint takes to write.

    .venv/bin/python scripts/benchmarks/reliability.py [--rounds 11]
"""

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch

from espalier.config import compose
from espalier.learners import learner
from espalier.learners.learner import Learner
from espalier.runs import storage
from espalier.validate import prepare

WARM_EPOCHS, EPOCHS = 1, 3
WORDS = ["logger=[csv]", "callbacks=[checkpoint,monitor]", "strategy=cpu", f"trainer.max_epochs={WARM_EPOCHS + EPOCHS}"]
NUM_WRITES = 31


class Window(L.Callback):
    """CPU seconds from the end of the warm epochs to the end of training, checkpoints included."""

    seconds = 0.0
    num_steps = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins where the warm epochs are over."""
        if trainer.current_epoch == WARM_EPOCHS:
            self.seconds, self.num_steps = -time.process_time(), -trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        self.seconds += time.process_time()
        self.num_steps += trainer.global_step


def nothing(*_: Any) -> None:
    """Stands for what is switched off."""


def plainly(folder: storage.Folder, content: Any, name: str, keep: str | None = None) -> None:
    """Write as most do."""
    torch.save(content, folder.path / name)


def plain_link(folder: storage.Folder, source: str, name: str, keep: str | None = None) -> None:
    """Link the last checkpoint where it is the best one."""
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).hardlink_to(folder.path / source)


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """No guard, no question for signals, no seeds of steps, plain checkpoints."""
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (Learner, "on_before_optimizer_step"),
            (Learner, "on_train_batch_end"),
            (Learner, "on_validation_batch_end"),
            (learner, "seed_step"),
        ):
            stack.enter_context(patch.object(owner, name, nothing))
        stack.enter_context(patch.object(Learner, "configure_gradient_clipping", L.LightningModule.clip_gradients))
        stack.enter_context(patch.object(storage.Folder, "write", plainly))
        stack.enter_context(patch.object(storage.Folder, "link", plain_link))
        yield


def seconds_per_step(folder: Path) -> float:
    """CPU time of a step in a fresh training."""
    window = Window()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = prepare(compose.compose(WORDS), WORDS, folder, task="train")
        run.trainer.callbacks.append(window)
        run.trainer.fit(run.learner, run.data)
    return window.seconds / window.num_steps


def write_ms(write: Callable[[], object]) -> float:
    """Median of the wall clock."""
    times = []
    for _ in range(NUM_WRITES):
        start = time.perf_counter()
        write()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Print the ratio and the table of writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        ratios, steps = [], []
        for number in range(rounds):
            timed = {}
            for is_guarded in (True, False) if number % 2 else (False, True):  # whoever is second finds warm caches
                with contextlib.nullcontext() if is_guarded else switched_off():
                    timed[is_guarded] = seconds_per_step(path / f"{number}_{is_guarded}")
            ratios.append(timed[True] / timed[False])
            steps.append(timed[True])
            print(f"{number + 1:3}: {1000 * timed[True]:.2f} ms to {1000 * timed[False]:.2f} ms", flush=True)
        content = torch.load(path / "0_True" / "checkpoints" / "last.ckpt", weights_only=True)
        folder = storage.Folder(path)
        ours = write_ms(lambda: folder.write(content, "last.ckpt", "previous.ckpt"))
        with patch.object(storage, "_sync", nothing):
            unsynced = write_ms(lambda: folder.write(content, "last.ckpt", "previous.ckpt"))
        plain = write_ms(lambda: torch.save(content, path / "plain.ckpt"))
        size = (path / "plain.ckpt").stat().st_size
    print(f"a checkpoint of {size / 1e6:.2f} MB: {ours:.1f} ms, {unsynced:.1f} unsynced, {plain:.1f} by torch.save")
    low, *_, high = statistics.quantiles(ratios, n=4)
    print(
        f"CPU time per step {statistics.median(ratios):.3f} times that without (quartiles {low:.3f} to {high:.3f}), "
        f"{1000 * statistics.median(steps):.2f} ms; {rounds} rounds"
    )


if __name__ == "__main__":
    main()
