"""A run folder and a W&B run per trial, a table at the end, and no trial that fails stops another."""

import csv
import json
from pathlib import Path

import pytest

from conftest import QUICK, Command
from espalier.cli import job

WORDS = ("train", "-m", "model=mlp", "model.hidden=[16]", "trainer.max_epochs=1", "callbacks=[checkpoint,monitor]")

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def trials(folder: Path) -> dict[str, Path]:
    """The run folders of the only sweep, by their numbers."""
    [sweep] = folder.glob("logs/sweep/*")
    return {path.name: path for path in sorted(sweep.iterdir()) if path.is_dir()}


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def table_row(out: str, trial: str) -> list[str]:
    """The cells of a trial in the table at the end."""
    [row] = [line.split() for line in out.splitlines() if line.split()[:1] == [trial]]
    return row


def test_each_trial_has_a_run_folder_and_a_line_in_the_table(espalier: Command):
    done = espalier(*WORDS, "seed=0,1", "logger=[csv]")
    assert done.code == 0, done.err
    runs = trials(done.folder)
    assert list(runs) == ["0", "1"]
    assert [report(run)["seed"] for run in runs.values()] == [0, 1]
    accuracies = [report(run)["rows"][0]["metrics"]["test/accuracy"] for run in runs.values()]
    for trial, accuracy in enumerate(accuracies):
        row = table_row(done.out, str(trial))
        assert row[:2] == [str(trial), str(trial)]  # the trial, its seed
        assert f"{accuracy:.4f}" in row
        assert row[-1] == "done"


def test_a_trial_that_fails_stops_no_other_and_ends_in_exit_code_3(espalier: Command):
    done = espalier(*WORDS, "data.batch_size=5000,64", "logger=[csv]")
    assert done.code == 3
    runs = trials(done.folder)
    assert not (runs["0"] / "report.json").exists()
    assert report(runs["1"])["rows"][0]["metrics"]["test/accuracy"] > 0
    assert [line for line in done.err.splitlines() if line.startswith("espalier: trial 0: data.batch_size=5000")]
    assert table_row(done.out, "1")[-1] == "done"
    assert "espalier/run.py" not in done.err, "a traceback"


def test_each_trial_is_a_wandb_run_of_its_own(espalier: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = espalier(*WORDS, "seed=0,1", "logger=[csv,wandb]")
    assert done.code == 0, done.err
    ids = [file.stem for run in trials(done.folder).values() for file in run.glob("wandb/offline-run-*/*.wandb")]
    assert len(ids) == len(set(ids)) == 2, done.out + done.err
    assert not (done.folder / "wandb").exists()


@pytest.fixture
def returned(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What a sweeper is told of the runs of this process."""
    values: list[float | None] = []
    carry_out = job.carry_out
    monkeypatch.setattr(job, "carry_out", lambda cfg: values.append(carry_out(cfg)) or values[-1])
    return values


@pytest.mark.parametrize("words", [(), ("debug=fast",)])
def test_sweeps_return_the_monitored_metric(espalier: Command, returned: list[float | None], words: tuple[str, ...]):
    """Of a run for debugging too, whose report names none, as it is no result."""
    done = espalier(*WORDS[:1], *WORDS[2:], *QUICK, *words)
    assert done.code == 0
    with (done.run / "metrics.csv").open() as file:
        [validated] = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row.get("val/accuracy")]
    assert returned == [pytest.approx(validated, abs=1e-6)]
    assert (report(done.run)["monitored"] is None) == bool(words)


def test_a_sweep_is_told_nothing_of_a_run_that_chose_no_checkpoint(espalier: Command, returned: list[float | None]):
    done = espalier(*WORDS[:1], *WORDS[2:], "logger=[]", "callbacks=[monitor]", "debug=fast")
    assert (done.code, returned) == (0, [None]), done.err


def test_a_sweep_that_shall_go_on_by_itself_is_told_what_does(espalier: Command):
    done = espalier(*WORDS, "seed=0,1", "hydra.sweep.dir=sweep", "resume=auto")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "use one command per trial, each with its own hydra.run.dir=FOLDER resume=auto" in done.err
