"""`espalier runs` lists, sorts and deletes; `source=best` is the best of comparable trainings. Nothing is trained."""

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import Command, launch_anew
from espalier.errors import ConfigError
from espalier.reporting import report
from espalier.runs import listing, references
from espalier.spec import Report
from helpers.holder import another_process_holds

DIGITS = {"_target_": "espalier.data.digits.Digits", "batch_size": 64}
ACCURACY = {"metric": "val/accuracy", "mode": "max"}
RMSE = {"metric": "val/rmse", "mode": "min"}


def left(
    folder: Path, value: float | None, monitored: dict[str, str] = ACCURACY, data: dict[str, Any] = DIGITS, age: int = 0
) -> Path:
    """A training as it lies on disk; one without a value did not finish."""
    (folder / "checkpoints").mkdir(parents=True)
    config = {"seed": 3, "data": data, "task": {"_target_": "espalier.tasks.train.train"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text("{}")
    if value is not None:
        name = monitored["metric"].replace("val/", "test/")
        rows = [{"name": "MLP", "metrics": {"test/loss": 1.0, name: value - 0.01}}]
        report.write(Report("train", str(folder), None, 7, rows, monitored={**monitored, "value": value}), folder)
        past = time.time() - 3600 * age
        os.utime(folder / "report.json", (past, past))
    return folder


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Three finished trainings of different age, one that can go on, one that cannot."""
    for name, value, age in (("good", 0.9, 2), ("better", 0.95, 3), ("poor", 0.5, 1)):
        left(tmp_path / "logs" / "train" / name, value, age=age)
    left(tmp_path / "logs" / "train" / "stopped", None)
    (tmp_path / "logs" / "train" / "stopped" / "checkpoints" / "last.ckpt").write_bytes(b"weights")
    left(tmp_path / "logs" / "train" / "failed", None)
    return tmp_path / "logs"


def rows(text: str) -> list[list[str]]:
    """Cells of the printed runs."""
    return [line.split() for line in text.splitlines() if line.strip().startswith("logs/")]


def names(text: str) -> list[str]:
    return [Path(row[0]).name for row in rows(text)]


@pytest.mark.usefixtures("logs")
def test_runs_are_listed_with_what_they_measured_and_how_they_ended(espalier: Command):
    done = espalier("runs")
    assert (done.code, done.err) == (0, "")
    cells = {Path(row[0]).name: row[1:] for row in rows(done.out)}
    assert cells.keys() == {"good", "better", "poor", "stopped", "failed"}
    assert [cells[name][1] for name in ("good", "stopped", "failed")] == ["finished", "stopped", "failed"]
    assert cells["better"][4:7] == ["0.9500", "0.9400", "7"]
    assert cells["stopped"][4:7] == ["-", "-", "3"]
    assert "val/accuracy" in done.out
    assert "5 of 5 runs below logs" in done.out


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["state=finished"], ["poor", "good", "better"]),  # the newest first
        (["state=finished", "sort=test/accuracy"], ["better", "good", "poor"]),
        (["state=finished", "sort=val/accuracy"], ["better", "good", "poor"]),
        (["state=failed"], ["failed"]),
        (["task=train", "state=stopped"], ["stopped"]),
        (["state=running"], []),
    ],
)
def test_runs_are_chosen_and_sorted(espalier: Command, words: list[str], expected: list[str]):
    assert names(espalier("runs", *words).out) == expected


def test_a_metric_that_gets_better_as_it_falls_is_sorted_upwards(espalier: Command, tmp_path: Path):
    for name, value in (("a", 60.0), ("b", 50.0)):
        left(tmp_path / "logs" / name, value, RMSE)
    assert names(espalier("runs", "sort=test/rmse").out) == ["b", "a"]


def test_a_run_that_works_is_running_and_is_not_deleted(espalier: Command, logs: Path):
    with another_process_holds(logs / "train" / "good"):
        assert names(espalier("runs", "state=running").out) == ["good"]
        done = espalier("runs", "delete=logs/train/good", "--yes")
        assert (done.code, done.err) == (2, "espalier: delete=logs/train/good: is running; stop it first\n")
        assert names(espalier("runs", "delete=finished", "--yes").out)[:2] == ["poor", "better"]
    assert {run.name for run in (logs / "train").iterdir()} == {"good", "stopped", "failed"}


def test_what_is_deleted_is_shown_and_nothing_else_goes(espalier: Command, logs: Path):
    done = espalier("runs", "delete=train/poor,logs/train/failed", "--yes")
    assert (done.code, done.err) == (0, "")
    assert names(done.out) == ["poor", "failed"]
    assert {run.name for run in (logs / "train").iterdir()} == {"good", "better", "stopped"}


def test_nothing_is_deleted_where_nobody_is_asked(espalier: Command, logs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    done = espalier("runs", "delete=failed")
    assert done.code == 2
    assert done.err == (
        "espalier: delete: nobody can be asked here, so nothing was deleted; add --yes to delete this run\n"
    )
    assert (logs / "train" / "failed").is_dir()


@pytest.mark.parametrize(("answer", "code", "remains"), [("y", 0, False), ("", 1, True), ("n", 1, True)])
def test_a_terminal_is_asked(
    espalier: Command, logs: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, remains: bool
):
    asked: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    assert espalier("runs", "delete=failed").code == code
    assert asked[0].startswith("delete this run, ")
    assert (logs / "train" / "failed").exists() == remains


def test_a_run_that_holds_another_is_not_deleted_alone(espalier: Command, logs: Path):
    left(logs / "train" / "good" / "child", 0.1)
    done = espalier("runs", "delete=train/good", "--yes")
    assert (done.code, "another run lies in it" in done.err) == (2, True)
    assert espalier("runs", "delete=train/good,train/good/child", "--yes").code == 0
    assert not (logs / "train" / "good").exists()


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stat=failed"], "stat: no such key; did you mean state?"),
        (["state=lost"], "state=lost: no such state; it is one of finished, running, stopped, failed"),
        (["task=evaluate"], "task=evaluate: no run of that task; there are train"),
        (["sort=test/acuracy"], "sort=test/acuracy: no run has this metric; did you mean test/accuracy?"),
        (["sort"], "sort: not of the form KEY=VALUE"),
        (["logs=nowhere"], "logs=nowhere: no such folder"),
        (["delete=nothing"], "delete=nothing: no run below logs"),
        (["delete=..", "--yes"], "delete=..: no run below logs"),
        (["delete=logs", "--yes"], "delete=logs: no run below logs"),
        (["delete=running", "--yes"], "delete=running: what is running is not deleted"),
        (["delete=failed", "state=failed"], "state=failed: not together with delete="),
        (["--yes"], "--yes: deletes nothing without delete=RUN"),
        (["--force"], "--force: no such key"),
    ],
)
def test_a_wrong_word_costs_one_line_and_deletes_nothing(espalier: Command, logs: Path, words: list[str], told: str):
    done = espalier("runs", *words)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert done.err.startswith(f"espalier: {told}")
    assert len(list((logs / "train").iterdir())) == 5


def test_files_that_nobody_can_read_are_runs_that_failed(espalier: Command, tmp_path: Path):
    folder = left(tmp_path / "logs" / "odd", None)
    (folder / "report.json").write_text('{"rows": [3], ')
    (folder / "config.yaml").write_text("a: [")
    done = espalier("runs")
    assert (done.code, rows(done.out)[0][1:3]) == (0, ["?", "failed"])
    (folder / "report.json").write_text('{"rows": [3], "monitored": {"value": "x"}, "seed": []}')
    assert (espalier("runs").code, names(espalier("runs", "state=finished").out)) == (0, ["odd"])


@pytest.mark.usefixtures("logs")
def test_best_is_the_finished_training_with_the_best_validation_metric(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    assert references.find("source", "best").name == "better"


def test_best_is_the_lowest_where_lower_is_better(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 60.0), ("b", 50.0), ("c", 55.0)):
        left(tmp_path / "logs" / name, value, RMSE)
    assert references.find("source", "best").name == "b"


def test_best_takes_batches_of_another_size_for_the_same_data(logs: Path):
    left(logs / "large", 0.99, data={**DIGITS, "batch_size": 256})
    assert listing.best("source", logs).name == "large"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"monitored": RMSE}, "which do not compare; name a RUN"),
        ({"data": {**DIGITS, "path": "other"}}, r"were trained on different data, data\.path differs; name a RUN"),
    ],
)
def test_best_of_runs_that_do_not_compare_costs_one_line(logs: Path, changes: dict[str, Any], told: str):
    left(logs / "other", 0.99, **changes)
    with pytest.raises(ConfigError, match=told) as refused:
        listing.best("source", logs)
    assert len(str(refused.value).splitlines()) == 1


def test_best_needs_a_training_that_was_validated(espalier: Command):
    done = espalier("evaluate", "source=best")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "source=best: no finished training below" in done.err
    assert "say espalier export source=best" in espalier("predict", "source=best").err
    assert "resume=best: a finished training starts another" in espalier("train", "resume=best").err


@pytest.mark.usefixtures("logs")
def test_listing_imports_neither_torch_nor_hydra(tmp_path: Path):
    program = "import sys\nfrom espalier.cli import entry\nassert entry._dispatch(['runs']) == 0\n"
    (tmp_path / "listed.py").write_text(f"{program}print({{'torch', 'hydra', 'omegaconf'}} & set(sys.modules))\n")
    assert launch_anew(tmp_path, "listed", PYTHONPATH=str(tmp_path)).stdout.splitlines()[-1] == "set()"


def test_words_of_runs_are_completed():
    from espalier.cli import help_pages

    assert help_pages.candidates([], "ru", ["train"]) == ["runs"]
    assert help_pages.candidates(["runs"], "s", ["train"]) == ["state=", "sort="]
    assert help_pages.candidates(["runs"], "state=f", ["train"]) == ["state=finished", "state=failed"]
    assert help_pages.candidates(["runs"], "--", ["train"]) == ["--yes"]
