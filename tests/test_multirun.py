"""A run folder and a W&B run per trial, a table at the end, and no trial that fails stops another."""

import json
from pathlib import Path

import pytest

from conftest import QUICK, Command

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


def test_sweeps_return_the_monitored_metric(espalier: Command, monkeypatch: pytest.MonkeyPatch):
    from espalier.cli import job

    returned = []
    carry_out = job.carry_out
    monkeypatch.setattr(job, "carry_out", lambda cfg: returned.append(carry_out(cfg)) or returned[-1])
    done = espalier(*WORDS[:1], *WORDS[2:], *QUICK)
    assert done.code == 0
    [note] = report(done.run)["notes"]
    assert note.endswith(f"{returned[0]:.4f}")


def test_a_sweep_that_shall_go_on_by_itself_is_told_what_does(espalier: Command):
    done = espalier(*WORDS, "seed=0,1", "hydra.sweep.dir=sweep", "resume=auto")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "use one command per trial, each with its own hydra.run.dir=FOLDER resume=auto" in done.err
