"""Several processes compress one network: the same structure on all ranks, one report, and no harm from a kill -9."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import test_compress
from conftest import command
from test_compress import content, report
from test_distributed import KILLED, launch, run_in
from test_resume import tensors

SHORT = (
    *("trainer.max_epochs=2", "logger=[csv]", "callbacks=[checkpoint,monitor]", "task.batches=[1]"),
    "callbacks.checkpoint.every_n_steps=3",
)
SPARSE = ("compression=[prune_magnitude]", "compression.prune_magnitude.every_n_steps=2", "strategy=ddp_cpu", *SHORT)
SMALLER = (
    *("compression=[prune_channels,distill,qat]", "compression.distill.features=[stages.0]"),
    *("compression.prune_channels.ratio=0.25", "compression.prune_channels.round_to=2", *SHORT),
)
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "espalier")

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:Checkpoint directory")

source = test_compress.source  # the fixture


class Witness(L.Callback):
    """After the last step writes the state of this rank's learner to `<folder>/state_<rank>.pt`.

    Not at the end of training: a validation has copied the buffers of the first rank to the others by then.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.estimated_stepping_batches:
            torch.save(pl_module.state_dict(), self.folder / f"state_{trainer.global_rank}.pt")


def compress_on_two_ranks(folder: Path, source: Path, *words: str) -> Path:
    """The run; what each rank ended with lies in `folder`."""
    witness = (f"+callbacks.witness._target_={__name__}.Witness", f"+callbacks.witness.folder={folder}")
    done = launch(folder, "espalier.cli", "compress", f"source={source}", *words, "strategy=ddp_cpu", *witness)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    return run_in(folder)


def states(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = (torch.load(folder / f"state_{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal to the last bit, or that one side lacks."""
    names = [*theirs, *(name for name in ours if name not in theirs)]
    return [
        name for name in names if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


def assert_same(run: Path, unbroken: Path) -> None:
    now, then = (tensors({key: content(each, "last")[key] for key in COMPARED}) for each in (run, unbroken))
    assert differing(now, then) == []
    after, before = (report(each)["rows"][-1] for each in (run, unbroken))
    assert {key: after[key] for key in ("metrics", "nonzero")} == {key: before[key] for key in ("metrics", "nonzero")}


def sparsity(state: dict[str, Any]) -> float:
    """Share of zeros, counted over the weights that have a mask."""
    pruned = [state[name.removesuffix("_mask")] for name in state if name.endswith("_mask")]
    return sum(int((weight == 0).sum()) for weight in pruned) / sum(weight.numel() for weight in pruned)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """The folder of a run that two processes pruned."""
    folder = tmp_path_factory.mktemp("sparse")
    compress_on_two_ranks(folder, source, *SPARSE)
    return folder


def test_both_ranks_prune_the_same_weights_and_both_checkpoints_are_sparse(sparse: Path):
    first, second = states(sparse)
    statistics = [name for name in first if "running_" in name]  # of a rank's own samples
    assert differing(first, second) == statistics
    for name in ("best", "last"):
        state = content(run_in(sparse), name)["state_dict"]
        assert sparsity(state) == pytest.approx(0.9, abs=0.001)
    assert differing(content(run_in(sparse), "last")["state_dict"], first) == []


@pytest.mark.slow
def test_a_compression_resumes_bit_equal_after_kill_9_of_one_rank(tmp_path: Path, source: Path, sparse: Path):
    (tmp_path / "killed.py").write_text(KILLED.replace("global_rank == 0", "global_rank == 1"))
    killed = launch(tmp_path, "killed", "compress", f"source={source}", *SPARSE)  # returns when no rank is left
    assert killed.returncode != 0
    run = run_in(tmp_path)
    assert not (run / "report.json").exists()
    assert 0 < sparsity(content(run, "last")["state_dict"]) < 0.9
    done = launch(tmp_path, "espalier.cli", "compress", f"resume={run}")
    assert done.returncode == 0, done.stderr
    assert_same(run, run_in(sparse))


def test_both_ranks_have_the_structure_scales_and_weights_that_the_first_one_chose(tmp_path: Path, source: Path):
    run = compress_on_two_ranks(tmp_path, source, *SMALLER)
    first, second = states(tmp_path)
    assert differing(first, second) == []  # ranges and batch statistics included: they are frozen
    assert any(name.endswith(".zero_point") for name in first)
    assert "model.adapters.stages__0.weight" in first
    teacher = content(source)["state_dict"]
    assert first["model.head.weight"].shape[1] < teacher["model.head.weight"].shape[1]
    for name in ("best", "last"):
        stored = tensors(content(run, name))
        copies = [path for path, value in stored.items() for old in teacher.values() if old.ndim and old.equal(value)]
        assert copies == [], "a teacher in a checkpoint"


@pytest.mark.slow
def test_a_recipe_resumes_bit_equal_after_kill_9_and_train_goes_on_with_it(tmp_path: Path, source: Path):
    unbroken = tmp_path / "unbroken"
    assert command(["compress", f"source={source}", *SMALLER, f"hydra.run.dir={unbroken}"], tmp_path).code == 0
    (tmp_path / "killed.py").write_text(KILLED)
    killed = launch(tmp_path, "killed", "compress", f"source={source}", *SMALLER)
    assert killed.returncode < 0
    run = run_in(tmp_path)
    assert not (run / "report.json").exists()
    assert command(["train", f"resume={run}"], tmp_path).code == 0
    assert report(run)["task"] == "compress"
    assert_same(run, unbroken)


def test_a_fault_that_only_the_first_rank_can_find_ends_all_in_one_line(tmp_path: Path, source: Path):
    words = ("compression=[prune_channels]", "compression.prune_channels.ratio=0.01", "strategy=ddp_cpu", *SHORT)
    done = launch(tmp_path, "espalier.cli", "compress", f"source={source}", *words)  # returns when no rank is left
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("espalier: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("espalier: compression.prune_channels.ratio=0.01: removes nothing")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("logs/*/*"))


@pytest.mark.slow
def test_a_recipe_without_training_trains_nothing_in_two_processes_either(tmp_path: Path, source: Path):
    words = ("compression=[ptq]", "strategy=ddp_cpu", *SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert command(["compress", f"source={source}", *words], tmp_path).code == 0
    assert not torch.distributed.is_initialized()
    stored = content(run_in(tmp_path), "compressed")
    assert [entry["method"] for entry in stored["espalier"]["compression"]] == ["ptq"]
    before = {name: value for name, value in content(source)["state_dict"].items() if name.startswith("model.")}
    assert differing({name: stored["state_dict"][name] for name in before}, before) == [], "nothing was trained"
    assert report(run_in(tmp_path))["rows"][-1]["name"] == "ptq"
