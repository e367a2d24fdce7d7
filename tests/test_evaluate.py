"""Runs and bundles are measured on any split, in any runtime; what is written down agrees with the report."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score

from conftest import Command, Outcome, command
from espalier import robustness
from espalier.data.synthetic_images import SyntheticImages
from espalier.export import onnx
from espalier.robustness import base

QUIET = ("logger=[csv]", "callbacks=[checkpoint,monitor]")
DIGITS = ("model=mlp", "model.hidden=[32]", "trainer.max_epochs=6")


def made(folder: Path, *words: str) -> Path:
    """The folder of a run that ended well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command([*words, *QUIET, f"hydra.run.dir={folder / 'run'}"], folder).code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return made(tmp_path_factory.mktemp("digits"), "train", *DIGITS)


@pytest.fixture(scope="module")
def bundle(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("task.format=[onnx,torch_export,safetensors]",)
    return made(tmp_path_factory.mktemp("bundle"), "export", f"source={digits}", *words)


@pytest.fixture(scope="module")
def in_torch(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("task.predictions=csv", "task.robustness=[noise,pgd]")
    return made(tmp_path_factory.mktemp("in_torch"), "evaluate", f"source={digits}", *words)


@pytest.fixture(scope="module")
def eight_bits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear layers with ranges that ONNX Runtime finds anew in each call."""
    return made(
        tmp_path_factory.mktemp("eight"), "compress", f"source={digits}", "compression=[ptq]", "task.batches=[1]"
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("data=breast_cancer", "model=mlp", "model.hidden=[8]", "trainer.max_epochs=3")
    return made(tmp_path_factory.mktemp("table"), "train", *words)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("data=diabetes", "model=mlp", "model.hidden=[8]", "learner=regressor", "trainer.max_epochs=3")
    return made(tmp_path_factory.mktemp("numbers"), "train", *words)


def evaluated(espalier: Command, source: Path, *words: str, to: str = "again") -> Path:
    done = espalier("evaluate", f"source={source}", *words, *QUIET, f"hydra.run.dir={to}")
    assert done.code == 0, done.err
    return done.folder / to


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def metrics(run: Path, row: int = -1) -> dict[str, float]:
    return report(run)["rows"][row]["metrics"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("split", "num"), [("train", 1151), ("val", 287)])
def test_predictions_in_a_file_are_those_that_the_report_scores(espalier: Command, digits: Path, split: str, num: int):
    done = espalier("evaluate", f"source={digits}", f"task.split={split}", "task.predictions=csv", *QUIET)
    assert done.code == 0, done.err
    lines = read(done.run / "predictions.csv")
    true = [line["true"] for line in lines]
    assert [int(line["index"]) for line in lines] == list(range(num))
    found = metrics(done.run)
    assert found[f"{split}/accuracy"] == pytest.approx(
        accuracy_score(true, [line["predicted"] for line in lines]), abs=1e-6
    )
    right = [float(line[f"p_{line['true']}"]) for line in lines]
    assert found[f"{split}/loss"] == pytest.approx(-sum(map(math.log, right)) / num, rel=1e-4)
    assert "precision" in done.out.partition("report:")[2], "the table of classes stands below the report"


def test_where_a_network_errs_is_drawn_and_written(in_torch: Path):
    drawn = {path.name: path.stat().st_size for path in (in_torch / "figures").iterdir()}
    assert set(drawn) == {"calibration.png", "confusion.png", "errors.png", "robustness.png"}
    assert min(drawn.values()) > 5000
    classes = read(in_torch / "per_class.csv")
    assert [line["class"] for line in classes] == list("0123456789")
    found = sum(float(line["recall"]) * int(line["support"]) for line in classes) / 359
    assert found == pytest.approx(metrics(in_torch)["test/accuracy"], abs=1e-5)
    wrong = [line for line in read(in_torch / "predictions.csv") if line["true"] != line["predicted"]]
    sure = max(wrong, key=lambda line: float(line["probability"]))
    note = f"{len(wrong)} of 359 samples wrong; most confident: sample {sure['index']}"
    assert any(each.startswith(note) for each in report(in_torch)["notes"])


@pytest.mark.parametrize("runtime", ["onnx", "torch_export"])
def test_a_run_answers_alike_in_every_runtime(espalier: Command, digits: Path, in_torch: Path, runtime: str):
    exported = evaluated(espalier, digits, f"task.runtime={runtime}")
    assert metrics(exported) == pytest.approx(metrics(in_torch), abs=1e-4)
    row = report(exported)["rows"][0]
    assert row["size_bytes"] == sum(file.stat().st_size for file in (exported / "export").iterdir()) > 0
    assert row["params"] == report(in_torch)["rows"][-1]["params"]
    assert (exported / "figures" / "confusion.png").exists()


def test_a_bundle_is_measured_without_its_run(espalier: Command, in_torch: Path, bundle: Path):
    run = evaluated(espalier, bundle / "export")
    assert metrics(run) == pytest.approx(metrics(in_torch), abs=1e-4)
    row = report(run)["rows"][0]
    assert row["runtime"] == "onnxruntime"
    assert row["size_bytes"] == (bundle / "export" / "model.onnx").stat().st_size
    other = evaluated(espalier, bundle, "task.runtime=torch_export", to="other")
    assert metrics(other) == pytest.approx(metrics(in_torch), abs=1e-4)


def test_every_harm_has_a_row_with_five_severities_and_their_mean(espalier: Command, digits: Path):
    names = ["noise", "blur", "contrast", "brightness", "rotation", "fgsm", "pgd"]
    run = evaluated(espalier, digits, f"task.robustness=[{','.join(names)}]")
    *rows, unharmed = report(run)["rows"]
    accuracy = unharmed["metrics"]["test/accuracy"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        *severities, mean = row["metrics"].values()
        assert len(severities) == 5
        assert mean == pytest.approx(sum(severities) / 5)
    assert all(row["metrics"]["test/severity 5"] < accuracy - 0.1 for row in rows[-2:])


def test_a_larger_epsilon_harms_more_and_noise_knows_none(espalier: Command, digits: Path, in_torch: Path):
    larger = evaluated(espalier, digits, "task.robustness=[noise,pgd]", "task.epsilon=0.2")
    assert metrics(larger, 0) == metrics(in_torch, 0)
    assert metrics(larger, 1)["test/mean"] < metrics(in_torch, 1)["test/mean"]


def test_ranges_found_at_run_time_do_not_depend_on_the_batch_and_attacks_are_transferred(
    espalier: Command, eight_bits: Path, in_torch: Path
):
    words = ("task.runtime=onnx", "task.predictions=csv")
    large = evaluated(espalier, eight_bits, *words, "task.robustness=[pgd]", to="large")
    small = evaluated(espalier, eight_bits, *words, "data.batch_size=7", to="small")
    assert (large / "predictions.csv").read_text() == (small / "predictions.csv").read_text()
    assert any("transferred" in note for note in report(large)["notes"])
    assert metrics(large, 0)["test/mean"] == pytest.approx(metrics(in_torch, 1)["test/mean"], abs=0.02)


def test_a_runtime_that_does_not_quantize_is_named(espalier: Command, eight_bits: Path):
    run = evaluated(espalier, eight_bits, "task.runtime=torch_export")
    assert any("keeps in float" in note for note in report(run)["notes"])


def test_errors_on_a_table_are_listed_with_their_features(espalier: Command, table: Path):
    run = evaluated(espalier, table, "task.predictions=csv", "task.robustness=[noise,fgsm,pgd]")
    errors, lines = read(run / "errors.csv"), read(run / "predictions.csv")
    wrong = [line for line in lines if line["true"] != line["predicted"]]
    assert {line["index"] for line in errors} == {line["index"] for line in wrong}
    shares = [float(line["probability"]) for line in errors]
    assert shares == sorted(shares, reverse=True)
    assert float(errors[0]["x0"]) > 5, "the radius in its own unit"
    assert len(errors[0]) == 4 + 30
    assert not (run / "figures" / "errors.png").exists()


def test_a_regression_shows_its_residuals(espalier: Command, numbers: Path):
    run = evaluated(espalier, numbers, "task.predictions=parquet", "task.robustness=[pgd]", "task.runtime=onnx")
    from pyarrow import parquet

    lines = parquet.read_table(run / "predictions.parquet").to_pydict()
    squares = [(said - is_) ** 2 for said, is_ in zip(lines["predicted"], lines["true"], strict=True)]
    rmse = (sum(squares) / len(squares)) ** 0.5
    assert metrics(run)["test/rmse"] == pytest.approx(rmse, rel=1e-5)
    assert metrics(run, 0)["test/severity 5"] > rmse
    names = {path.name for path in (run / "figures").iterdir()}
    assert names == {"predictions.png", "residuals.png", "robustness.png"}


PIXELS = ("data=synthetic_images", "data.channels=1", "data.height=8", "data.width=8")
SIZES = ("data.num_train=256", "data.num_val=64", "data.num_test=200")


def test_samples_with_other_statistics_are_normalised_as_in_training(espalier: Command, tmp_path: Path):
    source = made(tmp_path, "train", *PIXELS, *SIZES, "model=mlp", "model.hidden=[16]", "trainer.max_epochs=2")
    exported = evaluated(espalier, source, "+data.noise=0.95", "task.runtime=onnx", to="exported")
    in_torch = evaluated(espalier, source, "+data.noise=0.95", to="in_torch")
    before, now = (
        SyntheticImages(10, 1, 8, 8, 256, 64, 200, noise, batch_size=40, augment={}, seed=0) for noise in (0.5, 0.95)
    )
    assert now.spec.std[0] != pytest.approx(before.spec.std[0], rel=0.05)
    raw = now.splits.test
    x_BCHW = (raw.x.float() / 255 - before.spec.mean[0]) / before.spec.std[0]
    logits = onnx.Session(exported / "export" / "model.onnx", threads=1)(x_BCHW)
    expected = {
        "test/accuracy": float((logits.argmax(1) == raw.y).float().mean()),
        "test/loss": float(torch.nn.functional.cross_entropy(logits, raw.y)),
    }
    for run in (exported, in_torch):
        found = {name: metrics(run)[name] for name in expected}
        assert found == pytest.approx(expected, abs=1e-4)


WRONG = {
    "format that the bundle lacks": ("bundle", ["task.runtime=openvino"], "onnx, torch_export"),
    "torch on a bundle": ("bundle", ["task.runtime=torch"], "onnx, torch_export"),
    "attack on a bundle": ("bundle", ["task.robustness=[pgd]"], "task.robustness=[pgd]"),
    "format that nothing runs": ("digits", ["task.runtime=safetensors"], "task.runtime=safetensors"),
    "kind of file": ("digits", ["task.predictions=xml"], "'csv' or 'parquet'"),
    "harm for images on a table": ("table", ["task.robustness=[noise,blur]"], "task.robustness=[blur]"),
    "harm that does not exist": ("digits", ["task.robustness=[fog]"], "'contrast'"),
    "harm listed twice": ("digits", ["task.robustness=[blur,blur]"], "once is enough"),
    "epsilon of zero": ("digits", ["task.epsilon=0"], "greater than 0"),
}


@pytest.mark.parametrize(("source", "words", "advice"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_wish_ends_in_one_line_and_leaves_nothing(
    espalier: Command, request: pytest.FixtureRequest, source: str, words: list[str], advice: str
):
    done: Outcome = espalier("evaluate", f"source={request.getfixturevalue(source)}", *words, *QUIET)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert advice in done.err
    assert not list(done.folder.glob("logs/*/*"))


def test_a_corruption_that_lacks_a_part_ends_in_one_line_that_names_it(
    espalier: Command, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    contract = f"from {base.__name__} import Corruption\n\n\nclass Half(Corruption):\n    applies_to = ('images',)\n"
    (tmp_path / "half.py").write_text(contract)
    monkeypatch.setattr(robustness, "__path__", [*robustness.__path__, str(tmp_path)])
    done = espalier("evaluate", f"source={digits}", "task.robustness=[half]", *QUIET)
    [line] = done.err.splitlines()
    assert done.code == 2
    assert line.endswith("robustness.half.Half has no corrupt; see docs/evaluation.md")
