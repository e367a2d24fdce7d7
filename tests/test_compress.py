"""A trained run becomes a smaller one: every recipe from the command line, its report, its checkpoint, its faults."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Command, command
from espalier.config import compose
from espalier.validate import prepare
from helpers import forked
from test_resume import CrashError, crash_at, tensors

SMALL = ("model.depth=[1,1]", "model.width=8", "logger=[csv]", "callbacks=[checkpoint,monitor]")
SHORT = ("trainer.max_epochs=2", "logger=[csv]", "callbacks=[checkpoint,monitor]")
RECIPES = {
    "prune_channels,distill,qat": ("compression.prune_channels.ratio=0.25", "compression.prune_channels.round_to=2"),
    "low_rank,prune_magnitude,distill,qat": ("compression.distill.features=[stages.1]",),
    "prune_channels,prune_nm,ptq": ("compression.prune_channels.round_to=4",),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small residual network, trained for three epochs."""
    folder = tmp_path_factory.mktemp("source")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(["train", *SMALL, "trainer.max_epochs=3"], folder).code == 0
    [run] = folder.glob("logs/train/*")
    return run


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def content(run: Path, name: str = "best") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def test_every_rank_returns_what_a_sweep_optimises(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each rank of a trial has a sweeper of its own, and all of them have to choose the same trial next."""
    words = [f"source={source}", "compression=[prune_magnitude]", *SHORT, "trainer.max_epochs=1"]
    for module in ("espalier.run", "espalier.tasks.compress"):
        monkeypatch.setattr(f"{module}.is_first_rank", lambda: False)
    returned = prepare(compose.compose(["task=compress", *words]), words, tmp_path, "compress").perform()
    [best] = (tmp_path / "checkpoints").glob("best*")
    state = torch.load(best, weights_only=True)["callbacks"]
    assert returned == next(each["best_model_score"] for name, each in state.items() if "BestAndLast" in name)


RELOAD = """
import sys
from pathlib import Path
import torch
from espalier.runs import checkpoint
from espalier.composition import networks
from espalier.config.compose import compose
from espalier.run import Run

stored = checkpoint.load("source", Path(sys.argv[1]))
run = Run(compose(["callbacks=[]", "logger=[]"]), [], Path("."), "evaluate")
network = networks.trained(stored).eval()
x = run.data.samples(100).x
with torch.no_grad():
    torch.save(network(x), sys.argv[2])
assert "torch_pruning" not in sys.modules
"""


def logits_in_a_new_process(checkpoint: Path, folder: Path) -> torch.Tensor:
    file = folder / "logits.pt"
    done = forked.run(["-c", RELOAD, checkpoint, file], cwd=folder)
    assert done.returncode == 0, done.stderr
    return torch.load(file, weights_only=True)


def but_for_slow_ones(recipes: dict[str, Any], kept: str) -> list[Any]:
    """All of them as parameters; those but `kept`, which goes through most, are left to slow tests and the matrix."""
    marks = {recipe: () if recipe == kept else pytest.mark.slow for recipe in recipes}
    return [pytest.param(recipe, words, marks=marks[recipe]) for recipe, words in recipes.items()]


@pytest.mark.parametrize(("recipe", "words"), but_for_slow_ones(RECIPES, "prune_channels,distill,qat"))
def test_a_recipe_is_applied_in_one_fit_and_measured_as_deployed(
    espalier: Command, source: Path, recipe: str, words: tuple[str, ...]
):
    done = espalier("compress", f"source={source}", f"compression=[{recipe}]", *words, *SHORT)
    assert done.code == 0, done.err
    measured = report(done.run)
    before, between, after = measured["rows"]
    methods = recipe.split(",")
    assert (before["name"], after["name"]) == ("fp32", "+".join(methods))
    assert between["name"].endswith("in float")
    assert after["params"] < before["params"]
    assert after["size_bytes"] < before["size_bytes"]
    assert after["size_bytes"] == (done.run / "export" / "compressed.onnx").stat().st_size
    assert measured["ratios"]["size"] == pytest.approx(before["size_bytes"] / after["size_bytes"])
    assert set(after["latency_ms"]) == {"1", "32"}
    notes = "\n".join(measured["notes"])
    assert "test/accuracy" in notes
    assert "prepared" in notes
    assert "QLinearConv" in notes
    assert "8 bits cost most in" in notes
    assert (done.run / "figures" / "trade_off.png").stat().st_size > 5000
    name = "compressed" if "ptq" in methods else "best"
    assert [entry["method"] for entry in content(done.run, name)["espalier"]["compression"]] == methods


def test_the_order_of_the_list_is_the_order_of_application(espalier: Command, source: Path):
    done = espalier("compress", f"source={source}", "compression=[qat,prune_channels]", *SHORT)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "compression=[prune_channels,qat]" in done.err
    assert not list(done.folder.glob("logs/*/*"))


WRONG = {
    "twice the same method": (["compression=[qat,qat]"], "qat"),
    "misspelt method": (["compression=[prune_chanels]"], "did you mean prune_channels?"),
    "no recipe": ([], "compression=[]"),
    "sparsity of 1.5": (["compression=[prune_magnitude]", "compression.prune_magnitude.sparsity=1.5"], "less than 1"),
    "bits that no runtime has": (["compression=[weight_only]", "compression.weight_only.bits=3"], "bits=3"),
    "layer that does not exist": (["compression=[qat]", "compression.qat.skip=[stages.9]"], "stages"),
    "teacher that does not exist": (["compression=[distill]", "compression.distill.teacher=nowhere"], "no such run"),
    "another model": (["compression=[qat]", "model=cnn"], "model=cnn"),
    "sharded weights": (["compression=[qat]", "strategy=fsdp", "trainer.accelerator=cpu", "trainer.devices=1"], "ddp"),
}


@pytest.mark.parametrize(("words", "advice"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_recipe_ends_in_one_line_before_anything_is_written(
    espalier: Command, source: Path, words: list[str], advice: str
):
    done = espalier("compress", f"source={source}", *SHORT, *words)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert advice in done.err
    assert not list(done.folder.glob("logs/*/*"))


def test_a_network_without_convolutions_has_no_n_m_groups_of_seven(espalier: Command, tmp_path: Path):
    done = espalier(
        "train", "model=mlp", "model.hidden=[16]", "compression=[prune_nm]", "compression.prune_nm.m=7", *SHORT
    )
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert "prune_nm" in done.err


def test_a_teacher_of_other_classes_is_refused(espalier: Command, source: Path):
    train = espalier("train", "data=breast_cancer", "model=mlp", "trainer.max_epochs=1", *SHORT[1:])
    done = espalier("train", *SMALL, "compression=[distill]", f"compression.distill.teacher={train.run}")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert "compression.distill.teacher" in done.err
    assert "breast_cancer" in done.err


def test_evaluate_takes_no_recipe_but_measures_a_compressed_run(espalier: Command, source: Path):
    refused = espalier("evaluate", f"source={source}", "compression=[qat]")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    done = espalier("compress", f"source={source}", "compression=[prune_magnitude]", *SHORT)
    again = espalier("evaluate", f"source={done.run}", "logger=[csv]")
    assert again.code == 0, again.err
    accuracy = report(done.run)["rows"][-1]["metrics"]["test/accuracy"]
    assert report(again.run)["rows"][0]["metrics"]["test/accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_stages_form_a_chain_through_source(espalier: Command, source: Path, tmp_path: Path):
    words = ("compression=[prune_channels,distill]", "compression.prune_channels.round_to=4")
    first = espalier("compress", f"source={source}", *words, *SHORT).run
    second = espalier("compress", f"source={first}", "compression=[prune_magnitude]", *SHORT).run
    third = espalier("compress", f"source={second}", "compression=[qat]", *SHORT).run
    stored = content(third)
    assert [entry["method"] for entry in stored["espalier"]["compression"]] == [
        "prune_channels",
        "prune_magnitude",
        "qat",
    ]
    assert not any("adapters" in name for name in stored["state_dict"])
    masks = {name: value for name, value in stored["state_dict"].items() if name.endswith("_mask")}
    assert masks
    weights = {name: stored["state_dict"][name.removesuffix("_mask")] for name in masks}
    assert all((weights[name][~mask] == 0).all() for name, mask in masks.items()), "zeros stay zero through qat"
    assert [row["name"] for row in report(third)["rows"]] == [
        "prune_channels+prune_magnitude",
        "prune_channels+prune_magnitude+qat",
    ]


RESUMED = {
    "prune_magnitude": ("callbacks=[checkpoint,monitor,ema]",),
    "prune_channels,distill": (
        *("compression.prune_channels.round_to=4", "compression.distill.features=[stages.1]"),
        "callbacks=[checkpoint,monitor]",
    ),
    "prune_nm,qat": ("callbacks=[checkpoint,monitor,ema]",),
}


@pytest.mark.parametrize(("recipe", "words"), but_for_slow_ones(RESUMED, "prune_nm,qat"))
def test_a_killed_compression_resumes_bit_equal(tmp_path: Path, source: Path, recipe: str, words: tuple[str, ...]):
    run = ["compress", f"source={source}", f"compression=[{recipe}]", "trainer.max_epochs=4", "logger=[csv]", *words]
    folders = tmp_path / "unbroken", tmp_path / "broken"
    assert command([*run, f"hydra.run.dir={folders[0]}"], tmp_path).code == 0
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, epoch=2, batch=6)
        with pytest.raises(CrashError):
            command([*run, f"hydra.run.dir={folders[1]}"], tmp_path)
    assert command(["compress", f"resume={folders[1]}"], tmp_path).code == 0
    kept = ("state_dict", "ema", "optimizer_states", "global_step", "espalier")
    then, now = (tensors({key: content(folder, "last").get(key) for key in kept}) for folder in folders)
    assert now.keys() == then.keys()
    assert [name for name in then if not torch.equal(now[name], then[name])] == []
    before, after = (report(folder)["rows"][-1] for folder in folders)
    assert after["metrics"] == before["metrics"]
    assert after["nonzero"] == before["nonzero"]


def test_a_network_is_pruned_from_scratch_and_its_checkpoint_is_sparse(espalier: Command, tmp_path: Path):
    words = ("compression=[prune_magnitude]", "compression.prune_magnitude.sparsity=0.9")
    done = espalier("train", *SMALL, "trainer.max_epochs=4", *words)
    assert done.code == 0, done.err
    state = content(done.run)["state_dict"]
    masks = {name: value for name, value in state.items() if name.endswith("_mask")}
    zeros = sum(int((state[name.removesuffix("_mask")] == 0).sum()) for name in masks)
    assert zeros / sum(mask.numel() for mask in masks.values()) == pytest.approx(0.9, abs=0.001)
    logits = logits_in_a_new_process(done.run / "checkpoints" / "best.ckpt", tmp_path)
    assert logits.isfinite().all()


def test_a_sensitivity_scan_names_draws_and_ranks_layers(espalier: Command, source: Path):
    done = espalier("compress", f"source={source}", "compression=[ptq]", "task.scan=true", *SHORT)
    assert done.code == 0, done.err
    assert "one layer at a time quantized" in done.out.replace("\n", " ")
    assert (done.run / "figures" / "sensitivity_quantized.png").exists()
    assert any(note.startswith("most sensitive to being quantized") for note in report(done.run)["notes"])


def test_a_drop_beyond_the_limit_is_marked_and_exits_0(espalier: Command, source: Path):
    words = ("compression=[prune_magnitude]", "compression.prune_magnitude.sparsity=0.999", "task.max_drop=0.001")
    done = espalier("compress", f"source={source}", *words, *SHORT)
    assert done.code == 0
    assert any(note.startswith("TOO MUCH LOST") for note in report(done.run)["notes"])
    assert "TOO MUCH LOST" in done.out


def test_a_warm_start_keeps_the_smaller_network(espalier: Command, source: Path):
    small = espalier("compress", f"source={source}", "compression=[prune_channels]", *SHORT).run
    done = espalier("train", f"source={small}", *SHORT)
    assert done.code == 0, done.err
    assert report(done.run)["rows"][0]["params"] == report(small)["rows"][-1]["params"]
