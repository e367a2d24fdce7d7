"""From the command to a reported run: what lies in its folder, and what can be done with it afterwards."""

import csv
import json
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from conftest import QUICK, Command, Outcome, command
from espalier.data.digits import Digits
from espalier.models.mlp import MLP

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
    place = espalier("evaluate", f"source={words[source]}", "logger=[csv]", f"hydra.run.dir=again_{source}")
    assert place.code == 0, place.err
    again = row(trained.folder / f"again_{source}")
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


def test_what_will_be_trained_is_said_before_it_is(espalier: Command):
    done = espalier("train", "model=mlp", "model.hidden=[8]", "trainer.max_epochs=2", *QUICK)
    first, folder, second, third, *_ = done.out.splitlines()
    assert first == "train mlp on digits, seed 0"
    assert folder == f"run folder: {done.run.relative_to(done.folder)}"
    assert second == (
        "cpu, 1 thread; digits: 1151 training, 287 validation and 359 test samples of 1 x 8 x 8, 10 classes; "
        "17 steps per epoch, 34 in all, batch size 64"
    )
    assert third == (
        "each epoch leaves out 63 of 1151 training samples (5.5 %), others each time, as whole batches are 64; "
        "data.batch_size=63 leaves out 17"
    )


def test_the_first_line_comes_before_torch_is_imported(tmp_path: Path):
    program = "import sys; sys.modules['torch'] = None; from espalier import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", program, "train"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "train resnet on digits, seed 0\n"


@pytest.mark.parametrize("word", ["data.batch_size=2000", "trainer.limit_train_batches=0", "trainer.devices=0"])
def test_no_folder_is_named_that_a_mistake_leaves_behind_for_nobody(espalier: Command, word: str):
    done = espalier("train", "model=mlp", "model.hidden=[8]", word, *QUICK)
    assert done.code == 2
    assert "logs" not in done.out + done.err
    assert not [*done.folder.glob("logs/*/*")]


def test_a_network_in_16_bits_is_trained_and_reported_as_it_answers(espalier: Command):
    words = ("model=mlp", "model.hidden=[8]", "trainer.max_epochs=1", "callbacks=[checkpoint,summary,ema]")
    done = espalier("train", *words, "trainer.precision=bf16-true", "logger=[csv]")
    assert done.code == 0, done.err
    stored = content(done.run, "best")
    assert {tensor.dtype for tensor in stored["state_dict"].values() if tensor.is_floating_point()} == {torch.float32}
    assert {tensor.dtype for tensor in stored["ema"]["raw"].values()} == {torch.bfloat16}
    knobs = {name: value for name, value in stored["espalier"]["config"]["model"].items() if name != "_target_"}
    model = MLP((1, 8, 8), 10, **knobs).bfloat16().eval()
    model.load_state_dict({name.removeprefix("model."): value for name, value in stored["state_dict"].items()})
    whole = next(iter(Digits(batch_size=64, seed=0, augment={}).loader("test", 1000)))
    expected = torch.nn.functional.cross_entropy(model(whole.x.bfloat16()).float(), whole.y)
    assert row(done.run)["metrics"]["test/loss"] == pytest.approx(float(expected), rel=1e-4)


def test_early_stopping_can_watch_another_metric(espalier: Command):
    words = ("model=mlp", "model.hidden=[8]", "trainer.max_epochs=4", "callbacks=[checkpoint,early_stopping]")
    stop = ("callbacks.early_stopping.monitor=val/loss", "callbacks.early_stopping.min_delta=9")  # never so much better
    done = espalier("train", *words, *stop, "callbacks.early_stopping.patience=1", "logger=[csv]")
    assert done.code == 0, done.err
    last = content(done.run)
    assert last["epoch"] == 1  # the second: it needs the first to compare with
    [state] = [state for name, state in last["callbacks"].items() if name.startswith("EarlyStopping")]
    assert float(state["best_score"]) < 2.4  # a loss, and smaller is better


def test_a_profile_lies_in_the_run_folder(espalier: Command):
    words = ("model=mlp", "model.hidden=[8]", "trainer.limit_train_batches=2", "trainer.max_epochs=1", *QUICK)
    done = espalier("train", *words, "trainer.profiler=simple")
    assert done.code == 0, done.err
    profile = done.run / "fit-profile.txt"
    assert "optimizer_step" in profile.read_text()
    assert f"profile: {profile}" in done.out.splitlines()
