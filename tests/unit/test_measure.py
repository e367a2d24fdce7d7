import io
import json
import math
import shlex
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from espalier.config import overrides
from espalier.profiling import cost
from espalier.reporting import figures, provenance, report
from espalier.spec import Report, of_shape


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(32, num_heads=4, batch_first=True)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.mix(x_BTD, x_BTD, x_BTD, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 16, batch_first=True)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.cell(x_BTD)[0]


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)
    )


def sample_report() -> Report:
    row = {
        "name": "best.ckpt",
        "runtime": "torch",
        "metrics": {"test/accuracy": 0.98888, "test/loss": 0.0431},
        "params": 272_474,
        "nonzero": 272_474,
        "macs": 40_551_808,
        "size_bytes": 1_141_000,
        "seconds": 12.34,
        "samples_per_second": 5210.3,
    }
    return Report("train", "logs/train/run", None, 0, [row], {"size": 8.8}, ["measured on two cores"])


def shown(renderable: object, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


# --- cost ---------------------------------------------------------------------------------------------------------


def test_parameters_are_counted_as_on_paper():
    assert cost.count_params(small_cnn()) == (3 * 9 * 8 + 8) + 2 * 8 + (512 * 10 + 10)


def test_zeros_are_not_counted_among_the_nonzero():
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0], [3, 0, 0, -1]])
    assert cost.count_nonzero(layer) == 4


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (small_cnn(), (3, 8, 8), 8 * 8 * 8 * 27 + 512 * 10),
        (nn.Conv2d(8, 8, 3, stride=2, groups=8), (8, 9, 9), 8 * 4 * 4 * 9),
        (Attention(), (16, 32), 4 * 16 * 32 * 32 + 2 * 16 * 16 * 32),  # four projections, QK and AV
        (Recurrent(), (5, 8), 5 * 4 * 16 * (8 + 16)),  # four gates, input and hidden state
    ],
    ids=["cnn", "depthwise", "attention", "lstm"],
)
def test_macs_match_the_formula(model, shape, macs):
    assert cost.count_macs(model, of_shape(shape)) == macs


def test_counting_macs_leaves_the_model_as_it_was():
    model = small_cnn().train()
    model[1].eval()  # a frozen batch norm
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()

    cost.count_macs(model, of_shape((3, 8, 8)))

    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_folder_is_as_large_as_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 700)
    (tmp_path / "deep" / "b").write_bytes(b"x" * 300)
    assert cost.size_bytes(tmp_path) == 1000
    assert cost.size_bytes(tmp_path / "a") == 700


def test_the_size_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        cost.size_bytes(tmp_path / "missing")


# --- report -------------------------------------------------------------------------------------------------------


def test_a_report_survives_the_file(tmp_path):
    report.write(sample_report(), tmp_path)
    assert report.read(tmp_path) == sample_report()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_the_markdown_says_by_which_command_when_and_on_what():
    words = [
        "/usr/bin/espalier",
        "task=train",
        "model=mlp",
        "data.path='my \\'own\\' photos'",
        "hydra.run.dir='/tmp/a run'",
    ]
    origin = {
        **{"command": words, "git": {"commit": "0123456789", "dirty": True}, "python": "3.11.7"},
        "packages": {"espalier": "0.1.0", "torch": "2.13.0", "numpy": "2.4"},
        "hardware": {"cpu": "AMD EPYC", "cores": 2, "gpus": ["H200"]},
    }
    made = provenance.paragraph(origin, "photos", datetime(2026, 11, 27, 20, 43))
    assert report.markdown(sample_report(), made).splitlines()[-1] == made
    typed = made.partition("`")[2].partition("`")[0]
    assert shlex.split(typed)[:3] == ["espalier", "train", "model=mlp"]
    parsed = {word.key_or_group: word.value() for word in overrides.parse(shlex.split(typed)[2:])}
    assert parsed["hydra.run.dir"] == "/tmp/a run"
    assert str(parsed["data.path"]) == "my 'own' photos"
    assert made.partition("`, ")[2] == (
        "2026-11-27 20:43, on photos; espalier 0.1.0, torch 2.13.0 (0123456, changed), Python 3.11.7; "
        "AMD EPYC with 2 cores, H200."
    )


def test_report_json_has_the_documented_keys(tmp_path):
    report.write(sample_report(), tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert list(stored) == ["schema", "task", "run", "source", "seed", "rows", "ratios", "notes", "monitored"]
    assert stored["schema"] == 1


def test_a_metric_that_is_not_a_number_stays_valid_json(tmp_path):
    row = {"name": "diverged", "runtime": "torch", "metrics": {"test/loss": math.nan}}
    report.write(Report("train", "run", None, 0, [row]), tmp_path)
    assert "NaN" not in (tmp_path / "report.json").read_text()
    assert report.read(tmp_path).rows[0]["metrics"]["test/loss"] is None


def test_a_failed_write_leaves_the_old_report(tmp_path):
    report.write(sample_report(), tmp_path)
    with pytest.raises(TypeError):
        report.write(Report("train", "run", None, 0, [{"name": object()}]), tmp_path)
    assert report.read(tmp_path) == sample_report()


def test_a_report_of_another_schema_is_refused(tmp_path):
    (tmp_path / "report.json").write_text('{"schema": 2}')
    with pytest.raises(ValueError, match="schema 2"):
        report.read(tmp_path)


def test_the_table_speaks_in_human_units():
    text = shown(report.table(sample_report()))
    for words in ("0.9889", "272 k", "40.6 M", "1.14 MB", "12.3 s", "5,210", "Ratios: size 8.8x", "two cores"):
        assert words in text


def test_the_table_fits_80_columns_even_with_many_metrics():
    metrics = {f"test/a_rather_long_metric_{place}": 0.5 for place in range(2)} | {"test/accuracy": 0.25}
    wide = Report("train", "run", None, 0, [{**sample_report().rows[0], "metrics": metrics}])
    text = shown(report.table(wide), width=80)
    assert max(map(len, text.splitlines())) <= 80
    for words in ("a_rather_long_metric_1", "0.2500", "1.14 MB", "5,210"):
        assert words in text


def test_markdown_has_one_line_per_artifact():
    lines = report.markdown(sample_report()).splitlines()
    assert [line for line in lines if line.startswith("| best.ckpt")] == [
        "| best.ckpt | 0.9889 | 0.0431 | 272 k | 40.6 M | 1.14 MB | 12.3 s | 5,210 |"
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1.00 k"), (999_960, "1.00 M"), (3.2e9, "3.20 G")]
)
def test_counts_get_three_digits_and_a_prefix(value, text):
    assert report.si(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0.20 s"), (99.97, "1 min 40 s"), (7205, "2 h 00 min")])
def test_durations_read_like_a_clock(seconds, text):
    assert report.duration(seconds) == text


def test_a_wide_terminal_gets_one_table():
    metrics = {f"test/metric_{number}": 0.5 for number in range(12)}
    wide = Report("train", "run", None, 0, [{**sample_report().rows[0], "metrics": metrics}])
    headers = [line for line in shown(report.table(wide, 400), width=400).splitlines() if "metric_0" in line]
    assert len(headers) == 1
    assert "metric_11" in headers[0]
    assert "MACs" in headers[0]


def test_the_table_of_trials_shows_what_differs_and_how_each_ended(tmp_path):
    done = tmp_path / "0"
    done.mkdir()
    report.write(sample_report(), done)
    finished = [
        (done, {"model": "cnn", "optimizer.lr": "0.1"}, report.DONE),
        (tmp_path / "1", {"model": "cnn", "optimizer.lr": "9"}, "loss became NaN at step 3"),
    ]
    text = shown(report.trials(finished), width=120)
    assert "optimizer.lr" in text
    assert "model" not in text  # the same in both
    [first, second] = [line.split() for line in text.splitlines() if line.strip()[:1] in {"0", "1"}]
    assert first == ["0", "0.1", "0.9889", "0.0431", "done"]
    assert second[:4] == ["1", "9", "-", "-"]
    assert " ".join(second[4:]) == "loss became NaN at step 3"


def test_a_long_reason_in_a_table_of_trials_takes_no_width_from_the_numbers(tmp_path):
    rates = ("0.0001234", "0.0005678")
    reason = "data.batch_size=5000: on 2 devices makes a global batch of 5000, but there are only 1151 samples; " * 2
    finished = [
        (tmp_path / str(place), {"optimizer.lr": rate, "data.path": f"/data/a/folder/{place}"}, reason)
        for place, rate in enumerate(rates)
    ]
    for width in (80, 100):
        text = shown(report.trials(finished), width=width)
        for value in (*rates, "/data/a/folder/0"):
            assert text.count(value) == 1, text
        assert "".join(text.split()).count("global") == 4


# --- figures ------------------------------------------------------------------------------------------------------


def test_curves_take_the_last_value_of_each_epoch(tmp_path):
    csv = tmp_path / "metrics.csv"
    csv.write_text("step,lr,epoch,train/loss,val/loss\n5,0.1,,,\n11,,0,2.0,1.5\n12,,0,,1.4\n23,,1,1.0,0.9\n36,,2,,\n")
    assert figures._per_epoch(csv) == {"loss": {"train": [(1, 2.0), (2, 1.0)], "val": [(1, 1.4), (2, 0.9)]}}


def test_curves_of_a_run_without_epochs_say_so(tmp_path):
    csv = tmp_path / "metrics.csv"
    csv.write_text("step,lr\n5,0.1\n")
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.curves(csv, tmp_path / "curves.png")


def test_every_figure_is_an_image_with_ink_on_it(tmp_path):
    csv = tmp_path / "metrics.csv"
    csv.write_text("step,epoch,train/loss,val/loss,val/accuracy\n1,0,2.0,1.5,0.5\n2,1,1.0,0.9,0.8\n")
    figures.curves(csv, tmp_path / "curves.png")
    figures.confusion_matrix(torch.tensor([[5, 1], [0, 4]]), ["cat", "dog"], tmp_path / "confusion.png")
    figures.confusion_matrix(torch.eye(100), [str(place) for place in range(100)], tmp_path / "large.png")
    figures.predicted_vs_true(torch.arange(9.0).numpy(), torch.arange(9.0).numpy(), tmp_path / "scatter.png")
    images = sorted(tmp_path.glob("*.png"))
    assert len(images) == 4
    for file in images:
        pixels = torch.tensor(list(Image.open(file).convert("L").resize((64, 64)).tobytes()))
        assert pixels.unique().numel() > 10


# --- provenance ---------------------------------------------------------------------------------------------------


def test_provenance_is_plain_and_names_the_versions():
    found = provenance.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] >= 1


def test_a_folder_outside_git_has_no_commit(tmp_path):
    assert provenance.git(tmp_path) is None


def test_a_changed_file_makes_the_repository_dirty(tmp_path):
    def git(*words: str) -> None:
        author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "a").write_text("1")
    git("init")
    git("add", "a")
    git("commit", "-m", "first")
    clean = provenance.git(tmp_path)
    (tmp_path / "a").write_text("2")
    changed = provenance.git(tmp_path)
    assert clean is not None
    assert changed == {"commit": clean["commit"], "dirty": True}
    assert clean["dirty"] is False
    assert len(clean["commit"]) == 40


def test_the_lock_is_hashed_where_it_lies(tmp_path):
    deep = tmp_path / "src" / "package"
    deep.mkdir(parents=True)
    (tmp_path / "requirements.lock").write_bytes(b"abc")
    # NIST's example of SHA-256 for "abc"
    assert provenance.lock_sha256(deep) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert provenance.lock_sha256(Path("/")) is None
