"""A training that diverges ends at that step, with exit code 4 and weights that are still finite."""

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import Command, launch, run_in
from espalier.learners.divergence import Guard
from espalier.learners.learner import Learner
from espalier.reporting import report
from helpers.faulty_step import harmed

MLP = ("model=mlp", "model.hidden=[16]", "logger=[csv]", "callbacks=[checkpoint,monitor]")
NUM_BATCHES = 17  # per epoch: 1,151 training samples in batches of 64

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def harm_at(patch: pytest.MonkeyPatch, step: int, harm: str) -> None:
    patch.setattr(Learner, "objective", harmed(Learner.objective, step, harm))


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("lags", [False, True], ids=["processor", "accelerator"])
@pytest.mark.parametrize(
    ("step", "harm"),
    [(1, "nan"), (2, "inf"), (9, "gradient"), (17, "nan"), (18, "gradient"), (25, "-inf"), (34, "nan"), (35, "inf")],
)
def test_a_step_that_is_not_finite_is_not_taken(
    espalier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, harm: str, lags: bool
):
    if lags:  # as on an accelerator
        monkeypatch.setattr(Guard, "lags", property(lambda guard: True, lambda guard, value: None), raising=False)
    harm_at(monkeypatch, step, harm)
    done = espalier("train", *MLP, "trainer.max_epochs=3")
    assert done.code == 4
    [line] = done.err.splitlines()
    assert line.startswith(f"espalier: diverged at step {step}: loss ")
    assert ("loss nan" in line, "loss inf" in line) == (harm == "nan", harm == "inf")
    assert "gradient norm nan" in line or "gradient norm inf" in line
    saved = list(run_in(tmp_path).glob("checkpoints/*.ckpt"))
    assert len(saved) == (0 if step <= NUM_BATCHES else 2 if step <= 2 * NUM_BATCHES else 3)
    for path in saved:
        assert all(value.isfinite().all() for value in weights(path).values())


def test_the_message_names_samples_and_learning_rate(
    espalier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[list[int]] = []
    whole = Learner.training_step

    def training_step(self: Learner, batch, batch_idx):
        seen.append(batch.index.tolist())
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(Learner, "training_step", training_step)
    harm_at(monkeypatch, 3, "nan")
    done = espalier("train", *MLP, "optimizer=sgd", "optimizer.lr=0.01", "scheduler=constant", "trainer.max_epochs=1")
    first = ", ".join(map(str, seen[2][:8]))
    assert f"learning rate 0.01, samples {first}, ...; " in done.err


def test_a_learning_rate_that_is_far_too_large_is_such_a_case(espalier: Command, tmp_path: Path):
    words = ("optimizer=sgd", "optimizer.lr=1e30", "scheduler=constant", "trainer.gradient_clip_val=null")
    done = espalier("train", *MLP, *words, "trainer.max_epochs=1")
    assert (done.code, len(done.err.splitlines())) == (4, 1)
    assert run_in(tmp_path).is_dir()  # its settings and metrics are kept


def test_the_run_goes_on_where_it_was_once_the_cause_is_gone(
    espalier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert espalier("train", *MLP, "trainer.max_epochs=3", "hydra.run.dir=unbroken").code == 0
    with monkeypatch.context() as patch:
        harm_at(patch, 40, "nan")
        assert espalier("train", *MLP, "trainer.max_epochs=3", "hydra.run.dir=broken").code == 4
    assert espalier("train", "resume=broken").code == 0
    ours, theirs = (weights(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("broken", "unbroken"))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_trial_that_diverges_costs_that_trial(espalier: Command, tmp_path: Path):
    words = ("optimizer=sgd", "scheduler=constant", "trainer.gradient_clip_val=null", "trainer.max_epochs=1")
    done = espalier("train", "-m", *MLP, *words, "optimizer.lr=0.1,1e30")
    assert done.code == 3
    assert "diverged at step" in " ".join(done.out.split())  # the table breaks it where it has to
    assert len(list(tmp_path.glob("logs/**/report.json"))) == 1


def test_a_loss_above_where_it_began_is_worth_one_warning(espalier: Command, monkeypatch: pytest.MonkeyPatch):
    harm_at(monkeypatch, 100, "100")
    done = espalier("train", *MLP, "trainer.max_epochs=7", "optimizer.lr=0.02")
    assert done.code == 0
    assert (done.out + done.err).count(" at step 100, after ") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nIf reserved but unallocated"),
        None,
    ],
    ids=["of an accelerator", "of the processor"],
)
def test_memory_that_does_not_suffice_is_said_in_a_line(
    espalier: Command, monkeypatch: pytest.MonkeyPatch, error: Exception | None
):
    def objective(self: Learner, inputs: Sequence[Tensor], output: Tensor, y: Tensor) -> Tensor:
        if error:
            raise error
        return torch.empty(10**15)

    monkeypatch.setattr(Learner, "objective", objective)
    done = espalier("train", *MLP, "trainer.max_epochs=1")
    [line] = done.err.splitlines()
    assert done.code == 1
    assert line.startswith("espalier: out of memory: ")
    assert line.endswith(
        "; try a data.batch_size below 64 with as much more trainer.accumulate_grad_batches, "
        "or trainer.precision=bf16-mixed"
    )


FULL = """
import resource, signal, sys
from espalier.runs import checkpoint
from espalier import cli
saved = []
whole = checkpoint.CheckpointIO.save_checkpoint
def save_checkpoint(self, content, path, storage_options=None):
    if len(saved) == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
    whole(self, content, path, storage_options)
    saved.append(path)
checkpoint.CheckpointIO.save_checkpoint = save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cli.main()
"""


@pytest.mark.parametrize("size", [20_000, *(pytest.param(size, marks=pytest.mark.slow) for size in (0, 1_000))])
def test_a_full_disk_leaves_the_checkpoint_before_and_one_line(tmp_path: Path, size: int):
    """The limit on the size of a file stands for the end of a disk; it is met in the second epoch."""
    (tmp_path / "full.py").write_text(FULL.format(size=size))
    words = ["full", "train", *MLP, "trainer.max_epochs=3", "hydra.run.dir=run"]
    done = launch(tmp_path, *words)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"espalier: {tmp_path}/run/checkpoints/")
    assert line.endswith(
        f"File too large; what was there before is whole. Make room, then go on with: "
        f"espalier train resume={tmp_path}/run"
    )
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == NUM_BATCHES
    assert not list(tmp_path.glob("run/checkpoints/.*"))


def test_a_disk_that_is_full_elsewhere_is_a_line_too(espalier: Command, monkeypatch: pytest.MonkeyPatch):
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/report.json")

    monkeypatch.setattr(report, "write", write)
    done = espalier("train", *MLP, "trainer.max_epochs=1")
    assert (done.code, done.err) == (1, "espalier: run/report.json: not written, No space left on device; make room\n")


ON_ONE_RANK = """
import os
import pytest
import test_guard
from espalier import cli
if os.environ.get("LOCAL_RANK") == "1":
    test_guard.harm_at(pytest.MonkeyPatch(), 5, "nan")
cli.main()
"""


@pytest.mark.parametrize("strategy", ["ddp_cpu", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_all_ranks_end_at_the_step_where_one_of_them_diverges(tmp_path: Path, strategy: str):
    (tmp_path / "on_one_rank.py").write_text(ON_ONE_RANK)
    words = ["torch.distributed.run", "--nproc-per-node", "2", "on_one_rank.py", "train", *MLP]
    words += [f"strategy={strategy}", "trainer.max_epochs=1"]
    if strategy == "fsdp":
        words += ["trainer.accelerator=cpu", "trainer.devices=2"]
    done = launch(tmp_path, *words)
    assert done.returncode != 0  # torchrun's own
    assert done.stderr.count("espalier: diverged at step 5: ") == 1  # by the first rank, whose loss is finite
    assert done.stderr.count("exitcode  : 4 ") + done.stderr.count("(exitcode: 4)") >= 1
