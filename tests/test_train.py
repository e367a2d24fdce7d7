"""From the command to a reported run: what lies in its folder, and what can be done with it afterwards."""

import csv
import json
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from conftest import QUICK, Command, Outcome, command

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")  # epochs are short here

WORDS = ("model=mlp", "model.hidden=[32]", "data.batch_size=128", "trainer.max_epochs=3", *QUICK)
NUM_STEPS = 3 * (1151 // 128)
FILES = {
    *("config.yaml", "overrides.yaml", "provenance.json", "run.log", "metrics.csv", "report.json", "report.md"),
    *(
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/previous.ckpt",
        "checkpoints/BEST",
        "checkpoints/SHA256SUMS",
        "figures/curves.png",
        "figures/confusion.png",
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = command(["train", *WORDS], folder)
    assert done.code == 0
    return done


def content(run: Path, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return content(run, name)["state_dict"]


def row(run: Path) -> dict:
    report = json.loads((run / "report.json").read_text())
    assert report["schema"] == 1
    [only] = report["rows"]
    return only


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_exactly_the_documented_files(trained: Outcome):
    [run] = trained.folder.glob("logs/*/*")
    assert {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} == FILES
    assert (run / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_says_what_the_run_was_made_of(trained: Outcome):
    config = OmegaConf.load(trained.run / "config.yaml")
    assert (config.model.hidden, config.trainer.max_epochs, config.seed) == ([32], 3, 0)
    assert OmegaConf.load(trained.run / "overrides.yaml") == ["task=train", *WORDS]
    provenance = json.loads((trained.run / "provenance.json").read_text())
    assert provenance["packages"]["torch"] == torch.__version__
    assert "task=train" in provenance["command"]


def test_the_report_holds_every_number_it_promises(trained: Outcome):
    measured = row(trained.run)
    num_weights = 64 * 32 + 32 * 10
    assert measured["params"] == num_weights + 32 + 10
    assert measured["macs"] == num_weights
    assert measured["size_bytes"] == (trained.run / "checkpoints" / "best.ckpt").stat().st_size
    assert measured["seconds"] > 0
    assert measured["samples_per_second"] > 0
    assert measured["metrics"].keys() == {
        f"test/{name}" for name in ("loss", "accuracy", "f1", "calibration_error", "top5_accuracy")
    }
    assert 0.3 < measured["metrics"]["test/accuracy"] <= 1


def test_metrics_csv_has_a_row_per_epoch(trained: Outcome):
    with (trained.run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    epochs = [line for line in rows if line["train/loss"]]
    assert [line["epoch"] for line in epochs] == ["0", "1", "2"]
    assert all(line["val/accuracy"] and line["val/loss"] and line["train/accuracy"] for line in epochs)


def test_a_checkpoint_is_tensors_and_plain_types_with_plain_names(trained: Outcome):
    last = content(trained.run)
    assert last["global_step"] == NUM_STEPS
    assert set(last["state_dict"]) == {
        *("model.layers.linear1.weight", "model.layers.linear1.bias", "model.head.weight", "model.head.bias")
    }
    assert last["espalier"]["config"]["model"]["hidden"] == [32]
    assert last["espalier"]["spec"]["class_names"] == list("0123456789")


def test_the_best_checkpoint_is_the_one_of_the_best_epoch(trained: Outcome):
    with (trained.run / "metrics.csv").open() as file:
        accuracies = [float(line["val/accuracy"]) for line in csv.DictReader(file) if line["val/accuracy"]]
    best = max(range(3), key=accuracies.__getitem__)  # the first one of equals, as training saw them
    assert content(trained.run, "best")["epoch"] == best


@pytest.mark.parametrize("source", ["folder", "file", "latest"])
def test_evaluate_repeats_the_numbers_without_retyped_overrides(
    espalier: Command, trained: Outcome, monkeypatch: pytest.MonkeyPatch, source: str
):
    monkeypatch.chdir(trained.folder)
    words = {"folder": trained.run, "file": trained.run / "checkpoints" / "best.ckpt", "latest": "latest"}
    place = espalier("evaluate", f"source={words[source]}", "logger=[csv]", "hydra.run.dir=again")
    assert place.code == 0, place.err
    again = row(trained.folder / "again")
    assert again == {key: value for key, value in row(trained.run).items() if key in again}
    assert again["metrics"] == row(trained.run)["metrics"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_evaluate_measures_any_split(espalier: Command, trained: Outcome, split: str):
    assert espalier("evaluate", f"source={trained.run}", f"task.split={split}", *QUICK, "hydra.run.dir=run").code == 0
    metrics = row(Path("run"))["metrics"]
    assert all(name.startswith(f"{split}/") for name in metrics)
    if split == "val":
        with (trained.run / "metrics.csv").open() as file:
            best = max(float(line["val/accuracy"]) for line in csv.DictReader(file) if line["val/accuracy"])
        assert metrics["val/accuracy"] == best


def test_a_knob_of_the_data_stays_open_in_evaluation(espalier: Command, trained: Outcome):
    assert espalier("evaluate", f"source={trained.run}", "data.batch_size=7", *QUICK, "hydra.run.dir=run").code == 0
    again, before = row(Path("run"))["metrics"], row(trained.run)["metrics"]
    assert again["test/accuracy"] == before["test/accuracy"]
    assert again["test/loss"] == pytest.approx(before["test/loss"], rel=1e-5)


def test_the_seed_decides_everything(espalier: Command, trained: Outcome):
    assert espalier("train", *WORDS, "seed=0", "hydra.run.dir=same").code == 0
    assert espalier("train", *WORDS, "seed=1", "hydra.run.dir=other").code == 0
    assert_equal(weights(Path("same")), weights(trained.run))
    assert row(Path("same"))["metrics"] == row(trained.run)["metrics"]
    theirs, ours = weights(Path("other")), weights(trained.run)
    assert all(not torch.equal(theirs[name], ours[name]) for name in ours)


def test_regression_is_trained_and_reported_too(espalier: Command):
    done = espalier("train", "data=diabetes", "model.hidden=[16]", "trainer.max_epochs=2", *QUICK)
    assert done.code == 0, done.err
    assert row(done.run)["metrics"].keys() == {"test/rmse", "test/mae", "test/r2"}
    assert (done.run / "figures" / "predictions.png").exists()


def test_compiling_changes_neither_the_names_nor_the_weights(
    espalier: Command, monkeypatch: pytest.MonkeyPatch, trained: Outcome
):
    quick = partialmethod(torch.nn.Module.compile, backend="eager")  # traced all the same, but no C++ is built
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    torch._dynamo.utils.counters.clear()
    assert espalier("train", *WORDS, "learner.compile=true", "hydra.run.dir=run").code == 0
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert_equal(weights(Path("run")), weights(trained.run))


def test_debug_fast_runs_three_batches_of_everything(espalier: Command):
    done = espalier("train", "debug=fast", "model=mlp")
    assert done.code == 0, done.err
    assert content(done.run)["global_step"] == 3
    assert not (done.run / "wandb").exists()
