"""A signal ends a training after its step: saved, exit code 75, and resumed bit for bit as if nothing had happened."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import command, launch
from espalier.errors import EspalierError
from espalier.processes.stop_signal import requeue
from helpers.ranks import ranks
from test_resume import assert_same

WORDS = (
    *("model=mlp", "model.hidden=[16]", "model.dropout=0.2", "data/augment=[crop]", "logger=[csv]"),
    *("callbacks=[checkpoint,monitor,ema]", "trainer.max_epochs=3", "trainer.accumulate_grad_batches=2"),
)
SIGNALLED = """
import os, signal, sys
from espalier import cli
from espalier.learners.learner import Learner
numbers, part, *moment = os.environ["SIGNALLED"].split(",")
whole = getattr(Learner, part)
def step(self, data, batch_idx):
    if [self.current_epoch, batch_idx, self.global_rank] == [int(number) for number in moment]:
        for number in numbers.split("+"):
            os.kill(os.getpid(), getattr(signal, number))
    return whole(self, data, batch_idx)
setattr(Learner, part, step)
cli.main()
"""


def signalled(
    folder: Path,
    numbers: str,
    epoch: int,
    batch: int,
    *words: str,
    rank: int = 0,
    part: str = "training_step",
    **more: str,
) -> subprocess.CompletedProcess[str]:
    """A training, one of whose processes gets the signals in the middle of a batch."""
    (folder / "signalled.py").write_text(SIGNALLED)
    return launch(folder, "signalled", "train", *words, SIGNALLED=f"{numbers},{part},{epoch},{batch},{rank}", **more)


def resume(folder: Path) -> None:
    done = launch(folder, "espalier.cli", "train", "resume=run")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(["train", *WORDS, "hydra.run.dir=run"], folder).code == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("number", "part", "epoch", "batch", "step"),
    [
        pytest.param("SIGTERM", "training_step", 0, 0, 1, marks=pytest.mark.slow),  # its step needs the second batch
        pytest.param("SIGUSR1", "training_step", 1, 7, 13, marks=pytest.mark.slow),  # of 9 steps an epoch
        # The last batch of an epoch: left in the validation after it.
        pytest.param("SIGINT", "training_step", 1, 16, 18, marks=pytest.mark.slow),
        pytest.param("SIGTERM", "validation_step", 1, 3, 18, marks=pytest.mark.slow),
        ("SIGUSR1", "validation_step", 2, 0, 27),  # nothing but validation is left to do
    ],
)
def test_a_signal_stops_it_after_the_step_and_resume_is_bit_equal(
    tmp_path: Path, unbroken: Path, number: str, part: str, epoch: int, batch: int, step: int
):
    done = signalled(tmp_path, number, epoch, batch, *WORDS, "hydra.run.dir=run", part=part)
    assert done.returncode == 75
    told = f"espalier: stopped by {number} after step {step}; go on with: espalier train resume={tmp_path}/run"
    assert done.stderr.splitlines()[-1] == told
    resume(tmp_path)
    assert_same(tmp_path / "run", unbroken)


SIGNALLED_RANK = """
import os, signal
from espalier.learners.learner import Learner
whole = Learner.{part}

def signalled(self, data, batch_idx):
    if (self.current_epoch, batch_idx, self.global_rank) == {place}:
        os.kill(os.getpid(), signal.{number})
    return whole(self, data, batch_idx)

Learner.{part} = signalled
"""


@pytest.fixture(scope="module")
def unbroken_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken_by_two")
    done = ranks(folder, "train", *WORDS, "strategy=ddp_cpu", "hydra.run.dir=run")
    assert {code for code, _ in done} == {0}, done
    return folder / "run"


@pytest.mark.parametrize(
    ("number", "part", "epoch", "batch", "step"),
    [
        ("SIGTERM", "validation_step", 0, 1, 4),
        ("SIGUSR1", "training_step", 1, 3, 7),  # comes in step 6, and is read in the next
        pytest.param("SIGTERM", "training_step", 1, 7, 8, marks=pytest.mark.slow),  # the last: left in the validation
    ],
)
def test_a_signal_to_one_rank_stops_all_of_them_and_resume_is_bit_equal(
    tmp_path: Path, unbroken_by_two: Path, number: str, part: str, epoch: int, batch: int, step: int
):
    before = SIGNALLED_RANK.format(part=part, place=(epoch, batch, 1), number=number)
    done = ranks(tmp_path, "train", *WORDS, "strategy=ddp_cpu", "hydra.run.dir=run", before=before)
    assert [code for code, _ in done] == [75, 75]
    assert done[0][1].count(f"espalier: stopped by a signal to another process after step {step};") == 1
    assert {code for code, _ in ranks(tmp_path, "train", "resume=run")} == {0}
    assert_same(tmp_path / "run", unbroken_by_two)


@pytest.mark.slow  # test_launch.py has the codes and lines of ranks that stop
def test_several_processes_end_with_the_code_and_line_of_a_stopped_run(tmp_path: Path):
    words = (*WORDS, "strategy=ddp_cpu", "hydra.run.dir=run")
    done = signalled(tmp_path, "SIGTERM", 0, 1, *words, rank=1, part="validation_step")
    assert done.returncode == 75
    assert done.stderr.count("espalier: stopped by a signal to another process after step 4") == 1


def test_slurm_is_asked_for_another_turn_and_the_same_command_goes_on(tmp_path: Path, unbroken: Path):
    scontrol = tmp_path / "scontrol"  # stands for SLURM's
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    (tmp_path / "srun").symlink_to(scontrol)  # Lightning has advice for whoever does not use it
    job = {"SLURM_JOB_ID": "17", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = (*WORDS, "requeue=true", "resume=auto", "hydra.run.dir=run")
    stopped = signalled(tmp_path, "SIGUSR1", 1, 7, *words, **job)
    assert stopped.returncode == 75
    assert "srun" not in stopped.stderr
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert launch(tmp_path, "espalier.cli", "train", *words, **job).returncode == 0
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    ("script", "reason"),
    [("exit 1", "exit code 1"), ("echo no such job >&2; exit 1", "no such job"), ("echo busy; exit 3", "busy")],
)
def test_a_scheduler_that_refuses_to_start_the_job_again_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\n{script}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(EspalierError, match=f"scontrol requeue 17: {reason}; what was trained is saved"):
        requeue()


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path):
    done = signalled(tmp_path, "SIGINT+SIGINT", 1, 3, *WORDS, "hydra.run.dir=run")
    assert done.returncode not in (0, 75)
    assert "press Ctrl-C again to end at once" in done.stderr
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["epoch"] == 0


def test_a_run_without_checkpoints_says_that_nothing_is_saved(tmp_path: Path):
    words = [word.replace("checkpoint,", "") for word in WORDS]
    done = signalled(tmp_path, "SIGTERM", 0, 3, *words, "hydra.run.dir=run")
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1].endswith("nothing is saved, as callbacks has no checkpoint")


def test_a_sweep_that_is_stopped_starts_no_further_trial(tmp_path: Path):
    done = signalled(tmp_path, "SIGTERM", 0, 3, "-m", "seed=0,1", *WORDS)
    assert done.returncode == 75
    assert len(list(tmp_path.glob("logs/sweep/*/*/config.yaml"))) == 1
