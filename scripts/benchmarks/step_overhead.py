"""Cost of one training step of our learner against a hand-written loop and against Lightning as it is usually written.

A 64-64-10 MLP on images of 8x8 pixels, 128 batches of 64 an epoch, where nothing but overhead counts. Prints Python
and C function calls per step (a count that no other process can disturb) and the median ratio of CPU times over
interleaved rounds.

    .venv/bin/python scripts/benchmarks/step_overhead.py [--rounds 7]
"""

import argparse
import contextlib
import cProfile
import io
import logging
import pstats
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from espalier.config import compose
from espalier.validate import prepare

BATCH, STEPS, WARM_EPOCHS, EPOCHS = 64, 128, 1, 2


def dataset() -> TensorDataset:
    """As many samples of the same shape as `data=synthetic_images` below trains on."""
    return TensorDataset(torch.randn(BATCH * STEPS, 64), torch.randint(10, (BATCH * STEPS,)))


def network() -> nn.Sequential:
    """Return the same layers as `model=mlp model.hidden=[64]`."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def raw_loop() -> Callable[[int], int]:
    """Run (a): what a user writes without any framework."""
    loader = DataLoader(dataset(), batch_size=BATCH, shuffle=True, drop_last=True)
    net = network()
    optimizer = torch.optim.Adam(net.parameters())

    def train(epochs: int) -> int:
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                optimizer.step()
        return epochs * len(loader)

    return train


class UsualModule(L.LightningModule):
    """(b) A Lightning module as tutorials write it: two metrics, two logged values per step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.accuracy = MulticlassAccuracy(10)
        self.top2 = MulticlassAccuracy(10, top_k=2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.top2(logits, y)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("train/top2", self.top2, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def usual_lightning() -> Callable[[int], int]:
    """(b) with the Trainer's defaults, less its files."""

    def train(epochs: int) -> int:
        loader = DataLoader(dataset(), batch_size=BATCH, shuffle=True, drop_last=True)
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
        )
        return _timed_fit(trainer, UsualModule(), loader)

    return train


def ours() -> Callable[[int], int]:
    """`espalier train model=mlp` with its default callbacks and CSV; no validation, no clipping, like the others."""

    def train(epochs: int) -> int:
        with tempfile.TemporaryDirectory() as folder:
            words = ["model=mlp", "model.hidden=[64]", "optimizer=adam", "scheduler=constant", "logger=[csv]"]
            words += [
                "data=synthetic_images",
                "data.channels=1",
                "data.height=8",
                "data.width=8",
                f"data.batch_size={BATCH}",
            ]
            words += [f"data.num_train={BATCH * STEPS}", "strategy=cpu", f"trainer.max_epochs={epochs}"]
            words += ["trainer.limit_val_batches=0", "trainer.gradient_clip_val=null"]
            run = prepare(compose.compose(words), words, Path(folder), task="train")
            return _timed_fit(run.trainer, run.learner, run.data)

    return train


class _Window(L.Callback):
    """Measures from the end of the first epoch to the end of training, when everything is warm."""

    def __init__(self) -> None:
        self.profile: cProfile.Profile | None = None
        self.seconds = 0.0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == WARM_EPOCHS - 1:
            self.seconds = -time.process_time()
            if self.profile:
                self.profile.enable()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.profile:
            self.profile.disable()
        self.seconds += time.process_time()


window = _Window()


def _timed_fit(trainer: L.Trainer, learner: L.LightningModule, data: object) -> int:
    trainer.callbacks.append(window)  # last, so no other callback runs after it
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.fit(learner, data)
    return trainer.global_step


def measure(name: str, train: Callable[[int], int], profile: bool) -> float:
    """CPU seconds per step, or function calls per step under the profiler."""
    steps = STEPS * EPOCHS
    profiler = cProfile.Profile()
    if name == "raw":
        train(WARM_EPOCHS)
        if profile:
            profiler.enable()
        start = time.process_time()
        train(EPOCHS)
        seconds = time.process_time() - start
        profiler.disable()
    else:
        window.profile = profiler if profile else None
        train(WARM_EPOCHS + EPOCHS)
        seconds = window.seconds
    return pstats.Stats(profiler).total_calls / steps if profile else seconds / steps  # type: ignore[attr-defined]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    loops = {"raw": raw_loop(), "usual": usual_lightning(), "ours": ours()}
    calls = {name: measure(name, train, profile=True) for name, train in loops.items()}
    seconds = [{name: measure(name, train, profile=False) for name, train in loops.items()} for _ in range(rounds)]
    print(f"{'':34}{'calls/step':>11}{'to (a)':>8}{'to (b)':>8}{'CPU time to (a)':>17}{'to (b)':>8}")
    titles = {"raw": "(a) raw loop, DataLoader", "usual": "(b) Lightning, usual way", "ours": "espalier"}
    for name, title in titles.items():
        to_raw = statistics.median(one[name] / one["raw"] for one in seconds)
        to_usual = statistics.median(one[name] / one["usual"] for one in seconds)
        row = f"{title:34}{calls[name]:11.0f}{calls[name] / calls['raw']:8.2f}{calls[name] / calls['usual']:8.2f}"
        print(f"{row}{to_raw:17.2f}{to_usual:8.2f}")
    print(f"median of {rounds} interleaved rounds, {torch.get_num_threads()} thread, torch {torch.__version__}")


if __name__ == "__main__":
    main()
