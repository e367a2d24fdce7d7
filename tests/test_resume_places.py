"""Wherever a training is cut, in whichever folder it goes on, and whatever ends it: it ends as if never stopped."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import Command, command
from espalier.checkpoint import CheckpointIO
from test_resume import CrashError, measured, rows, tensors

TINY = (  # 5 batches an epoch, 4 of validation
    *("data=breast_cancer", "data.batch_size=64", "model=mlp", "model.hidden=[4]", "optimizer.lr=0.02"),
    *("callbacks=[checkpoint,monitor]", "logger=[csv]", "trainer.log_every_n_steps=3"),
)
WITHIN = ("trainer.max_epochs=3", "+trainer.val_check_interval=4", "callbacks.checkpoint.every_n_steps=2")
TOP = ("callbacks.checkpoint.save_top_k=2", "callbacks.checkpoint.filename='best-{epoch}-{step}'")
STOPPING = ("callbacks=[checkpoint,monitor,early_stopping]", "callbacks.early_stopping.patience=1")
PLATEAU = ("scheduler=plateau", "scheduler.patience=0", "scheduler.threshold=0.5")
UNEVEN = ("trainer.accumulate_grad_batches=3", "+trainer.val_check_interval=2", "callbacks.checkpoint.every_n_steps=1")
# What decides when validations and checkpoints come, and a save after which a crash used to cost something.
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "validation within the epoch": (WITHIN, 2),
    "max_steps": (("trainer.max_steps=13",), 2),
    "max_steps, ended by a validation": (("trainer.max_steps=14", *WITHIN[1:], "trainer.max_epochs=-1"), 9),
    "validation between batches of a step": (("trainer.max_epochs=3", *UNEVEN, *TOP), 3),
    "validation every second epoch": (
        ("trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2", *PLATEAU, "callbacks.checkpoint.every_n_steps=4"),
        4,
    ),
    "early stopping": ((*STOPPING, "optimizer.lr=1e-9", "trainer.max_epochs=9"), 3),
}


def crashing_after(num_saves: int, folder: Path, *words: str) -> int:
    """Train until so many checkpoints are written, links to one included; how many were."""
    written: list[str] = []

    def counted(save: Callable[..., None]) -> Callable[..., None]:
        def saved(self: CheckpointIO, *arguments: object) -> None:
            save(self, *arguments)
            written.append(str(arguments[-1]))
            if len(written) == num_saves:
                raise CrashError

        return saved

    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_checkpoint", "save_again"):
            patch.setattr(CheckpointIO, name, counted(getattr(CheckpointIO, name)))
        with contextlib.suppress(CrashError):
            assert command(["train", *TINY, *words], folder).code == 0
    return len(written)


def differing(run: Path, other: Path) -> list[str]:
    """Everything in which the files of two runs differ, but for clocks and the checkpoint before the last."""
    files = [{path.name for path in (each / "checkpoints").iterdir()} - {"SHA256SUMS"} for each in (run, other)]
    found = sorted(files[0] ^ files[1])
    for name in sorted(files[0] & files[1] - {"previous.ckpt"}):
        if name == "BEST":
            found += [name] * ((run / "checkpoints" / name).read_text() != (other / "checkpoints" / name).read_text())
            continue
        now, then = (tensors(torch.load(each / "checkpoints" / name, weights_only=True)) for each in (run, other))
        found += [f"{name}{key}" for key in now.keys() ^ then.keys()]
        found += [f"{name}{key}" for key in now.keys() & then.keys() if not torch.equal(now[key], then[key])]
    found += ["metrics.csv"] * (rows(run) != rows(other)) + ["report.json"] * (measured(run) != measured(other))
    return found


def require_resumed_equal(espalier: Command, words: tuple[str, ...], num_saves: int) -> None:
    """Crash, move the folder, resume there."""
    crashing_after(num_saves, Path.cwd(), *words, f"hydra.run.dir=broken{num_saves}")
    run = Path(shutil.move(f"broken{num_saves}", f"moved{num_saves}"))
    done = espalier("train", f"resume={run}")
    assert done.code == 0, done.err
    assert "dirpath" not in done.err
    assert differing(run, Path("unbroken")) == [], num_saves


@pytest.mark.parametrize("case", CASES)
def test_a_crash_right_after_a_save_loses_nothing(espalier: Command, tmp_path: Path, case: str):
    words, num_saves = CASES[case]
    assert espalier("train", *TINY, *words, "hydra.run.dir=unbroken").code == 0
    require_resumed_equal(espalier, words, num_saves)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_crash_right_after_each_save_loses_nothing(espalier: Command, tmp_path: Path, case: str):
    words, _ = CASES[case]
    total = crashing_after(-1, tmp_path, *words, "hydra.run.dir=unbroken")
    assert total > 4
    for num_saves in range(2, total + 1):  # after the first there may be no last yet
        require_resumed_equal(espalier, words, num_saves)
