"""`debug=` answers one question each, and its report says that it is no result."""

import csv
from pathlib import Path

import pytest

from conftest import Command
from espalier.config import conf_dir
from espalier.reporting import report
from espalier.runs import listing

DEBUG = {"fast": [], "overfit": [], "profile": ["trainer.limit_train_batches=2"], "anomaly": ["trainer.max_epochs=1"]}


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def test_every_option_of_debug_is_tested():
    assert conf_dir.groups()["debug"] == sorted(DEBUG)


@pytest.mark.parametrize("option", DEBUG)
def test_the_report_says_that_it_is_no_result_and_best_leaves_it_out(espalier: Command, option: str):
    done = espalier("train", f"debug={option}", "model=mlp", *DEBUG[option])
    assert done.code == 0, done.err
    written = report.read(done.run)
    assert written.notes[0].startswith(f"no result: debug={option}, ")
    assert f"* no result: debug={option}, " in (done.run / "report.md").read_text()
    assert f"no result: debug={option}" in done.out
    assert written.monitored is None
    assert [run.chosen for run in listing.below(Path("logs"))] == [None]
    assert not (done.run / "wandb").exists()
    if option == "profile":
        assert list(done.run.glob("*-profile.txt"))
    if option == "overfit":
        assert len(losses(done.run)) == 50
        assert losses(done.run)[-1] < 0.05 < 1 < losses(done.run)[0]


def test_overfitting_needs_the_same_batch_in_each_epoch(espalier: Command):
    words = ("debug=overfit", "model=mlp", "trainer.max_epochs=20", "trainer.check_val_every_n_epoch=20")
    assert espalier("train", *words, "hydra.run.dir=same").code == 0
    assert espalier("train", *words, "~callbacks.same_batches", "hydra.run.dir=others").code == 0
    assert losses(Path("same"))[-1] < losses(Path("others"))[-1] / 2


def test_what_is_no_debugging_is_a_result(espalier: Command):
    words = ("model=mlp", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger=[]")
    done = espalier("train", *words)
    written = report.read(done.run)
    assert "no result" not in " ".join(written.notes)
    assert written.monitored is not None
    assert written.notes[0] == "measured on best.ckpt, which had val/accuracy {value:.4f}".format(**written.monitored)
