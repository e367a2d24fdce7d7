"""Answers counted as scikit-learn and torchmetrics count them, and files read back by other readers."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import mean_absolute_error, precision_recall_fscore_support, root_mean_squared_error
from torchmetrics.functional.classification import multiclass_calibration_error

from espalier.data.loaders import Batch
from espalier.errors import ConfigError
from espalier.evaluation import prediction_files
from espalier.evaluation.predictions import collect
from espalier.runs import files
from espalier.spec import DataSpec
from espalier.targets.class_report import class_table, confident_errors, per_class, worst
from espalier.targets.metrics import NUM_BINS, CalibrationError, calibration
from espalier.targets.predictions import Predictions, join

NUM_CLASSES = 7
NAMES = tuple(f"kind {number}" for number in range(NUM_CLASSES))
SPEC = DataSpec.single("made up", (3,), 1.0, (0.0,) * 3, (1.0,) * 3, NAMES)


def random_answers(num: int = 400) -> Predictions:
    """Right in about half of the cases; the last class never occurs."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(NUM_CLASSES - 1, (num,), generator=generator)
    logits = 2 * torch.randn(num, NUM_CLASSES, generator=generator)
    logits[torch.arange(num), y] += 3
    return Predictions(SPEC, torch.arange(num), y, logits)


def of_probabilities(rows: list[list[float]], y: list[int]) -> Predictions:
    spec = DataSpec.single("made up", (1,), 1.0, (0.0,), (1.0,), tuple("abc"[: len(rows[0])]))
    return Predictions(spec, torch.arange(len(y)), torch.tensor(y), torch.tensor(rows).log())


def regression(num: int) -> Predictions:
    spec = DataSpec.single("made up", (1,), 1.0, (0.0,), (1.0,), target_mean=100.0, target_std=10.0)
    generator = torch.Generator().manual_seed(1)
    y = 100 + 10 * torch.randn(num, generator=generator)
    return Predictions(spec, torch.arange(num), y, torch.randn(num, 1, generator=generator))


def test_scores_per_class_are_those_of_scikit_learn():
    found = random_answers()
    scores = per_class(found)
    expected = precision_recall_fscore_support(found.y, found.predicted, labels=range(NUM_CLASSES), zero_division=0)
    for place, name in enumerate(("precision", "recall", "f1", "support")):
        assert [getattr(score, name) for score in scores] == pytest.approx(expected[place].tolist())
    assert [score.name for score in scores] == list(NAMES)


def test_the_worst_classes_come_first_and_those_without_samples_not_at_all():
    scores = worst(per_class(random_answers()))
    assert NAMES[-1] not in [score.name for score in scores]
    assert [score.f1 for score in scores] == sorted(score.f1 for score in scores)


@pytest.mark.parametrize(("num_classes", "num_shown"), [(20, 20), (21, 10)])
def test_of_many_classes_the_table_shows_the_worst_ten(num_classes: int, num_shown: int):
    spec = DataSpec.single("made up", (1,), 1.0, (0.0,), (1.0,), tuple(f"name {n:02d}" for n in range(num_classes)))
    y = torch.arange(num_classes).repeat(2)
    output = torch.nn.functional.one_hot(y, num_classes).float()
    output[0] = output[1].clone()  # a sample of class 0 is taken for class 1
    console = Console(width=80, file=None, record=True, quiet=False)
    with console.capture() as shown:
        console.print(class_table(per_class(Predictions(spec, torch.arange(len(y)), y, output))))
    assert shown.get().count("name ") == num_shown
    assert "name 00" in shown.get()
    assert "name 01" in shown.get()


def test_the_calibration_error_is_that_of_torchmetrics_in_whatever_batches_and_processes():
    found = random_answers()
    expected = float(multiclass_calibration_error(found.output, found.y, NUM_CLASSES, n_bins=NUM_BINS))
    assert calibration(found.output, found.y).error == pytest.approx(expected, abs=1e-6)
    ranks = [CalibrationError(), CalibrationError()]
    for place, rows in enumerate(torch.arange(len(found)).split(37)):
        ranks[place % 2].update(found.output[rows], found.y[rows])
    ranks[0].bins += ranks[1].bins  # as processes are summed
    assert ranks[0].compute() == pytest.approx(expected, abs=1e-6)


def test_a_calibration_error_on_paper():
    found = of_probabilities([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.4, 0.6]], [0, 1, 1, 1])
    curve = calibration(found.output, found.y)
    # 0.9 twice, right once: gap 0.4 of two samples; 0.7, right: 0.3; 0.6, right: 0.4
    assert curve.error == pytest.approx((2 * 0.4 + 0.3 + 0.4) / 4)
    assert curve.count.sum() == 4
    filled = curve.count > 0
    assert curve.accuracy[filled].tolist() == pytest.approx([1, 1, 0.5])
    assert curve.accuracy[~filled].isnan().all()


def test_certainty_belongs_to_the_last_bin():
    found = of_probabilities([[1.0, 0.0], [1.0, 0.0]], [0, 0])
    curve = calibration(found.output, found.y)
    assert curve.count.tolist() == [0] * (NUM_BINS - 1) + [2]
    assert curve.error == 0


def test_errors_are_ranked_by_their_confidence():
    found = of_probabilities([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]], [1, 1, 1, 0, 1])
    assert confident_errors(found, limit=10).tolist() == [2, 3, 0]
    assert confident_errors(found, limit=2).tolist() == [2, 3]


def test_answers_are_collected_in_the_order_of_the_batches():
    x = torch.arange(12.0).view(4, 3)
    batches = [
        Batch.single(x[:3], torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])),
        Batch.single(x[3:], torch.tensor([3]), torch.tensor([8])),
    ]
    found = collect(lambda x: x * 2, SPEC, batches)
    assert found.index.tolist() == [5, 6, 7, 8]
    assert found.y.tolist() == [0, 1, 2, 3]
    assert torch.equal(found.output, 2 * x)
    again = join([found.rows(0, 1), found.rows(1, 4)])
    assert torch.equal(again.output, found.output)
    assert len(again) == 4


def test_a_split_without_samples_is_refused():
    with pytest.raises(ConfigError, match="no sample"):
        collect(lambda x: x, SPEC, [])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_holds_what_was_answered(tmp_path: Path, kind: str):
    found = random_answers(30)
    table = read(prediction_files.write(found, kind, tmp_path))
    assert list(table) == ["index", "true", "predicted", "probability", *(f"p_{name}" for name in NAMES)]
    assert [int(cell) for cell in table["index"]] == list(range(30))
    assert table["true"] == [NAMES[label] for label in found.y]
    shares_NK = np.array([[float(cell) for cell in table[f"p_{name}"]] for name in NAMES]).T
    for logits, true, said, probability, shares in zip(
        found.output.tolist(), found.y.tolist(), table["predicted"], table["probability"], shares_NK, strict=True
    ):
        powers = [math.exp(logit) for logit in logits]
        assert shares == pytest.approx([power / sum(powers) for power in powers], rel=1e-4)
        assert said == NAMES[max(range(NUM_CLASSES), key=logits.__getitem__)]
        assert float(probability) == pytest.approx(max(shares), rel=1e-4)
        assert 0 <= true < NUM_CLASSES


def test_a_regression_is_written_in_the_unit_of_its_target(tmp_path: Path):
    found = regression(9)
    table = read(prediction_files.write(found, "csv", tmp_path))
    assert list(table) == ["index", "true", "predicted"]
    assert [float(cell) for cell in table["predicted"]] == pytest.approx(
        (100 + 10 * found.output[:, 0]).tolist(), rel=1e-5
    )


def test_files_are_scored_together(tmp_path: Path):
    found = random_answers(50)
    parts = [found.rows(0, 20), found.rows(20, 50)]
    for place, part in enumerate(parts):
        prediction_files.write(part, "parquet", tmp_path / str(place))
    files = [tmp_path / str(place) / "predictions.parquet" for place in range(2)]
    assert [prediction_files.num_rows(file) for file in files] == [20, 30]
    expected = float((found.predicted == found.y).double().mean())
    assert prediction_files.score(files, found.kind) == {"accuracy": pytest.approx(expected)}


def test_files_of_a_regression_are_scored_as_scikit_learn_does(tmp_path: Path):
    found = regression(40)
    file = prediction_files.write(found, "parquet", tmp_path)
    scores = prediction_files.score([file], found.kind)
    assert scores["rmse"] == pytest.approx(root_mean_squared_error(found.y, found.predicted), rel=1e-5)
    assert scores["mae"] == pytest.approx(mean_absolute_error(found.y, found.predicted), rel=1e-5)


def test_what_is_no_parquet_has_no_rows(tmp_path: Path):
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and then the power failed")
    assert prediction_files.num_rows(tmp_path / "half.parquet") == 0
    assert prediction_files.num_rows(tmp_path / "nothing.parquet") == 0


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path):
    def rows():
        yield ["new"]
        raise OSError("disk full")

    (tmp_path / "table.csv").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        files.write_csv(tmp_path / "table.csv", ["word"], rows())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("table.csv", "old")]


def read(path: Path) -> dict[str, list]:
    """Column by column."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pydict()
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return {name: list(cells) for name, cells in zip(header, zip(*rows, strict=True), strict=True)}
