import csv
import errno
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from espalier import errors
from espalier.errors import ConfigError
from espalier.loggers import wandb_log
from espalier.loggers.csv_log import CsvLog
from espalier.loggers.fault_tolerant import Guarded, guarded
from espalier.loggers.mlflow_log import MlflowLog
from espalier.loggers.tensorboard_log import tensorboard
from espalier.loggers.wandb_log import WandbLog, log_report
from espalier.spec import Report

Rows = list[dict[str, str]]


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.model(batch[0]).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(batch[0]).square().mean(), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


BATCHES = DataLoader(TensorDataset(torch.ones(16, 2)), batch_size=4)


def trainer(folder: Path, loggers: list[Logger], max_epochs: int = 3, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=loggers,
        callbacks=list(callbacks),
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
    )


def rows(folder: Path) -> Rows:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- csv ----------------------------------------------------------------------------------------------------------


def test_metrics_of_one_step_share_a_row(tmp_path):
    log = CsvLog(tmp_path, "run")
    log.log_metrics({"lr": 0.1}, step=5)
    log.save()
    log.log_metrics({"val/loss": 0.5}, step=5)
    log.log_metrics({"lr": 0.2}, step=10)
    log.save()
    assert rows(tmp_path) == [
        {"step": "5", "lr": "0.1", "val/loss": "0.5"},
        {"step": "10", "lr": "0.2", "val/loss": ""},
    ]


def test_the_file_is_right_after_every_save(tmp_path):
    log = CsvLog(tmp_path, "run")
    expected: dict[int, dict[str, str]] = {}
    for step, name in [
        (1, "a"),
        (2, "a"),
        (3, "b"),
        (3, "a"),
        (5, "b"),
        (4, "a"),
        (6, "c"),
        (7, "c"),
        (7, "a"),
        (8, "a"),
    ]:
        log.log_metrics({name: float(step)}, step)
        expected.setdefault(step, {"step": str(step)})[name] = str(float(step))
        log.save()
        assert [{key: text for key, text in row.items() if text} for row in rows(tmp_path)] == [
            expected[step] for step in sorted(expected)
        ]


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_kill_at_any_moment_of_a_save_leaves_the_rows_that_were_there(tmp_path, name):
    """What is on disk is looked at before and after each call, of functions in C too."""
    log, seen = CsvLog(tmp_path, "run"), []
    for step in (10, 20):
        log.log_metrics({"old": 0.5}, step)
        log.save()
    log.log_metrics({name: 0.5}, step=30)
    sys.setprofile(lambda *_: seen.append([row["step"] for row in rows(tmp_path)]))
    log.save()
    sys.setprofile(None)
    assert len(seen) > 20
    assert all(steps in (["10", "20"], ["10", "20", "30"]) for steps in seen)


def test_half_a_line_that_a_full_disk_took_is_gone_once_there_is_room(tmp_path, monkeypatch):
    log = CsvLog(tmp_path, "run")
    for step in (1, 2):
        log.log_metrics({"a": 0.5}, step)
        log.save()
    log.log_metrics({"a": 0.5}, step=3)

    def half_a_line(path: Path, mode: str) -> None:
        with open(path, mode) as file:  # noqa: PTH123
            file.write(b"3,")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", half_a_line)
        with pytest.raises(OSError, match="No space"):
            log.save()
    log.save()
    assert rows(tmp_path) == [{"step": step, "a": "0.5"} for step in "123"]


def test_numbers_are_read_back_exactly(tmp_path):
    value = float(torch.tensor(1 / 3))
    log = CsvLog(tmp_path, "run")
    log.log_metrics({"loss": value}, step=1)
    log.save()
    assert float(rows(tmp_path)[0]["loss"]) == value


def test_a_second_process_keeps_earlier_rows_and_drops_those_it_will_log_again(tmp_path):
    first = CsvLog(tmp_path, "run")
    for step in (10, 20, 30):
        first.log_metrics({"loss": float(step)}, step)
    first.save()
    second = CsvLog(tmp_path, "run")  # resumed at step 15
    second.log_metrics({"loss": 2.5, "lr": 1.0}, step=20)
    second.save()
    assert rows(tmp_path) == [{"step": "10", "loss": "10.0", "lr": ""}, {"step": "20", "loss": "2.5", "lr": "1.0"}]


def test_a_row_that_a_crash_cut_in_half_is_dropped(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n10,0.5\n20,0.2")  # was 0.25
    log = CsvLog(tmp_path, "run")
    log.log_metrics({"loss": 0.1}, step=30)
    log.save()
    assert [row["step"] for row in rows(tmp_path)] == ["10", "30"]


def test_a_resumed_run_writes_the_file_of_an_unbroken_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trainer(whole, [CsvLog(whole, "run")]).fit(Net(), BATCHES, BATCHES)
    keeper = ModelCheckpoint(broken, filename="first", every_n_epochs=1, save_top_k=1)
    trainer(broken, [CsvLog(broken, "run")], 1, keeper).fit(Net(), BATCHES, BATCHES)
    trainer(broken, [CsvLog(broken, "run")], 2).fit(Net(), BATCHES, BATCHES, ckpt_path=broken / "first.ckpt")
    trainer(broken, [CsvLog(broken, "run")], 3).fit(Net(), BATCHES, BATCHES, ckpt_path=broken / "first.ckpt")
    assert len(rows(whole)) >= 6
    assert rows(broken) == rows(whole)


# --- guarded ------------------------------------------------------------------------------------------------------


class Down(Logger):
    """A logger that is not reachable."""

    name, version = "down", 0

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.calls = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls += 1
        raise self.error

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        return None


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "espalier.loggers.fault_tolerant"]


def test_a_logger_that_is_down_is_switched_off_once_and_training_goes_on(tmp_path, caplog):
    down = guarded(lambda: Down(ConnectionError("no route\nto host")))
    fit = trainer(tmp_path, [down, guarded(partial(CsvLog, tmp_path, "run"))])
    fit.fit(Net(), BATCHES, BATCHES)
    assert fit.global_step == 12
    assert rows(tmp_path)[-1]["step"] == "11"
    assert down.inner is not None
    assert down.inner.calls == 1
    assert warnings_of(caplog) == ["Down is switched off, the run goes on: no route"]


def test_a_logger_that_cannot_be_built_does_not_stop_training(tmp_path, caplog):
    def fail() -> Logger:
        raise OSError("disk full")

    broken = guarded(fail)
    trainer(tmp_path, [broken], 1).fit(Net(), BATCHES, BATCHES)
    assert broken.inner is None
    assert warnings_of(caplog) == ["logger is switched off, the run goes on: disk full"]


def test_an_experiment_that_cannot_start_does_not_stop_training(tmp_path, caplog):
    class Unreachable(Down):
        @property
        def experiment(self) -> Any:
            raise TimeoutError("server does not answer")

    trainer(tmp_path, [guarded(lambda: Unreachable(ValueError()))], 1).fit(Net(), BATCHES, BATCHES)
    assert warnings_of(caplog) == ["Unreachable is switched off, the run goes on: server does not answer"]


@pytest.mark.parametrize("error", [ConfigError("mlflow is not installed"), KeyboardInterrupt()])
def test_what_the_user_must_see_is_not_swallowed(error):
    with pytest.raises(type(error)):
        guarded(lambda: Down(error)).log_metrics({}, 0)

    def fail() -> Logger:
        raise error

    with pytest.raises(type(error)):
        guarded(fail)


def test_a_guarded_logger_looks_like_the_one_inside(tmp_path):
    log = guarded(partial(CsvLog, tmp_path, "run"))
    assert isinstance(log, Logger)
    assert isinstance(log.inner, CsvLog)
    assert (log.name, log.version, log.save_dir, log.log_dir) == ("", "run", str(tmp_path), str(tmp_path))
    assert log.call("no_such_method") is None


# --- Weights & Biases ---------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def new_wandb(folder: Path, name: str = "run") -> Guarded:
    return guarded(partial(WandbLog, folder / name, name, project="espalier", log_model=False))


def records(folder: Path) -> list[dict[str, Any]]:
    """What the offline file of a run holds, read by wandb's own tool."""
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_offline_run_holds_metrics_and_the_report_and_says_nothing(tmp_path, offline, capfd):
    log = new_wandb(tmp_path)
    trainer(tmp_path, [log], 1).fit(Net(), BATCHES, BATCHES)
    report = Report("train", "run", None, 0, [{"name": "best", "metrics": {"test/accuracy": 0.75}}], {"size": 2.0})
    (tmp_path / "run" / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "run" / "figures" / "curves.png")
    log_report(log, report)
    log.close()
    out, err = capfd.readouterr()
    assert "wandb" not in (out + err).lower()

    found = records(tmp_path / "run")
    summary: dict[str, Any] = {}
    for record in found:
        summary |= record.get("summary", {}).get("update", {})
    assert "val/loss" in summary
    assert summary["report/test/accuracy"] == 0.75
    assert summary["ratio/size"] == 2.0
    assert list((tmp_path / "run").glob("wandb/offline-run-*/files/media/table/report_*"))
    assert list((tmp_path / "run").glob("wandb/offline-run-*/files/media/images/figures/curves_*.png"))


def test_each_trial_of_a_process_is_a_wandb_run_of_its_own(tmp_path, offline):
    for name in ("trial_0", "trial_1"):  # the first one is never closed
        log = new_wandb(tmp_path, name)
        log.log_metrics({"loss": 1.0}, step=1)
        assert log.version == wandb_log.run_id(tmp_path / name)
    log.close()
    assert len(list(tmp_path.glob("trial_*/wandb/offline-run-*/*.wandb"))) == 2


def test_a_run_folder_always_has_the_same_wandb_run(tmp_path):
    assert wandb_log.run_id(tmp_path / "a") == wandb_log.run_id(tmp_path / "." / "a")
    assert wandb_log.run_id(tmp_path / "x" / "0") != wandb_log.run_id(tmp_path / "y" / "0")


@pytest.mark.parametrize(
    ("environment", "mode"),
    [({}, "offline"), ({"WANDB_API_KEY": "k"}, "online"), ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline")],
)
def test_wandb_is_offline_unless_a_key_is_set(monkeypatch, offline, environment, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_log.mode() == mode


def test_a_disabled_wandb_writes_nothing(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = new_wandb(tmp_path)
    log.log_metrics({"loss": 1.0}, step=1)
    log.close()
    assert log.is_on
    assert not list(tmp_path.rglob("*.wandb"))


# --- TensorBoard and MLflow ---------------------------------------------------------------------------------------


def test_tensorboard_writes_into_the_run_folder(tmp_path):
    trainer(tmp_path, [guarded(partial(tensorboard, tmp_path, "run"))], 1).fit(Net(), BATCHES, BATCHES)
    [file] = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert b"val/loss" in file.read_bytes()


def test_mlflow_keeps_one_run_per_folder_in_a_database_there(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first = MlflowLog(tmp_path, "run", "espalier")
    first.log_metrics({"val/loss": 0.5}, step=3)
    second = MlflowLog(tmp_path, "run", "espalier")
    second.log_metrics({"val/loss": 0.25}, step=6)
    assert first.run_id == second.run_id
    history = second.experiment.get_metric_history(second.run_id, "val/loss")
    assert [(metric.step, metric.value) for metric in history] == [(3, 0.5), (6, 0.25)]
    assert (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("build", "package"),
    [(tensorboard, "tensorboard"), (partial(MlflowLog, experiment="espalier"), "mlflow")],
    ids=["tensorboard", "mlflow"],
)
def test_a_missing_extra_ends_in_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[..., Logger], package: str
):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(errors, "import_module", missing)
    with pytest.raises(ConfigError, match=rf"{package} is not installed; run: pip install -e '\.\[track\]'"):
        guarded(partial(build, tmp_path, "run"))


@pytest.fixture(autouse=True)
def _quiet_lightning() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
