"""Several processes train one model: equal weights on all ranks, one run folder, checkpoints that load anywhere."""

import csv
import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from conftest import QUICK, Command, command, launch, run_in
from espalier.cli import job
from helpers.ranks import ranks

MLP = ("model=mlp", "model.hidden=[32]", "data.batch_size=32", "trainer.max_epochs=2", *QUICK)
ALONE = tuple(word.replace("batch_size=32", "batch_size=64") for word in MLP)  # the same global batches
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "-m")

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def metrics(run: Path) -> dict[str, float]:
    return json.loads((run / "report.json").read_text())["rows"][0]["metrics"]


def losses(run: Path) -> list[float]:
    """Of the training samples of each epoch, over all ranks."""
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_close(one: Path, other: Path) -> None:
    """Sums over ranks are rounded in another order, so not bit-equal."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that sees the same samples in each step as two processes with half the batch size."""
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(["train", *ALONE], folder).code == 0
    return run_in(folder)


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    done = launch(folder, *TORCHRUN, "espalier.cli", "train", *MLP, "strategy=ddp_cpu")
    assert done.returncode == 0, done.stderr
    return run_in(folder)


def test_ddp_ends_with_equal_weights_and_the_numbers_of_one_process(espalier: Command, tmp_path: Path):
    words = ("model=cnn", "data=digits", "trainer.max_epochs=3", "strategy=ddp_cpu")
    spy = ("+callbacks.spy._target_=helpers.record_rank.Spy", f"+callbacks.spy.folder={tmp_path}", "logger=[csv]")
    done = launch(tmp_path, "espalier.cli", "train", *words, *spy)
    assert done.returncode == 0, done.stderr
    run = run_in(tmp_path)
    hashes = [(tmp_path / f"weights_{rank}.txt").read_text() for rank in range(2)]
    assert hashes[0] == hashes[1]
    again = espalier("evaluate", f"source={run}", "strategy=cpu", *QUICK, "hydra.run.dir=again")
    assert again.code == 0, again.err
    assert metrics(Path("again"))["test/accuracy"] == metrics(run)["test/accuracy"]
    assert metrics(Path("again")) == pytest.approx(metrics(run), rel=1e-5)

    val = espalier("evaluate", f"source={run}", "task.split=val", "strategy=cpu", *QUICK, "hydra.run.dir=val")
    assert val.code == 0, val.err
    with (run / "metrics.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["val/loss"]]
    best = max(lines, key=lambda line: float(line["val/accuracy"]))  # rank 1 validated half of it
    assert metrics(Path("val")) == pytest.approx({name: float(best[name]) for name in metrics(Path("val"))}, rel=1e-5)


def test_two_processes_train_like_one_with_the_double_batch(torchrun: Path, alone: Path):
    assert_close(torchrun, alone)
    assert metrics(torchrun) == pytest.approx(metrics(alone), rel=1e-4)
    trained, by_one = (losses(run) for run in (torchrun, alone))
    assert len(trained) == 2
    assert trained == pytest.approx(by_one, rel=1e-4)


def test_fsdp_trains_alike_and_its_checkpoint_loads_in_one_process(espalier: Command, tmp_path: Path, alone: Path):
    on_cpu = ("strategy=fsdp", "trainer.accelerator=cpu", "trainer.devices=2")
    done = launch(tmp_path, "espalier.cli", "train", *MLP, *on_cpu)
    assert done.returncode == 0, done.stderr
    run = run_in(tmp_path)
    assert_close(run, alone)
    again = espalier("evaluate", f"source={run}", *QUICK, "hydra.run.dir=again")
    assert again.code == 0, again.err
    assert metrics(Path("again")) == pytest.approx(metrics(run), rel=1e-5)


SBATCH = {
    **{"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train.sh", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "1"},
}
SRUN = SBATCH | {"SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize("environment", [SBATCH, SRUN], ids=["sbatch", "srun"])
def test_inside_slurm_two_processes_see_all_of_the_data(tmp_path: Path, alone: Path, environment: dict[str, str]):
    """In a batch script without srun they are our own, which find the variables of the script."""
    for code, output in ranks(tmp_path, "train", *MLP, "strategy=ddp_cpu", "hydra.run.dir=run", **environment):
        assert code == 0, output
        assert "srun" not in output
    assert metrics(tmp_path / "run") == pytest.approx(metrics(alone), rel=1e-4)
    assert_close(tmp_path / "run", alone)


def test_a_batch_script_without_srun_starts_its_own_processes(espalier: Command, monkeypatch: pytest.MonkeyPatch):
    started: list[int] = []
    monkeypatch.setattr(job.launch, "launch", lambda words, num_ranks: started.append(num_ranks))
    for name, value in (SBATCH | {"SLURM_NTASKS": "4"}).items():
        monkeypatch.setenv(name, value)
    assert espalier("train", *MLP, "strategy=ddp_cpu").code == 0
    assert started == [2]


@pytest.mark.parametrize(
    ("environment", "words", "line"),
    [
        ({"LOCAL_RANK": "0"}, ["strategy=ddp_cpu"], "LOCAL_RANK=0: left over, as WORLD_SIZE, MASTER_ADDR"),
        (SBATCH | {"SLURM_STEP_ID": "0"}, ["strategy=ddp_cpu"], "trainer.devices=2: takes 2 processes, but SLURM has"),
        (SBATCH | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, [], "trainer.devices=1: takes 1 process, but SLURM has"),
        ({}, ["strategy=ddp_cpu", "trainer.num_nodes=2"], "trainer.num_nodes=2: nobody has started the processes"),
    ],
)
def test_processes_that_nobody_has_started_are_one_line_and_no_folder(
    espalier: Command, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: list[str], line: str
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = espalier("train", *MLP, *words)
    assert done.code == 2
    assert done.err.startswith(f"espalier: {line}")
    assert done.err.count("\n") == 1
    assert not list(done.folder.glob("logs/*/*"))


def test_a_trainer_that_counts_fewer_processes_than_devices_trains_nothing(
    espalier: Command, monkeypatch: pytest.MonkeyPatch
):
    """However it comes that it does."""
    monkeypatch.setattr(job.launch, "launch", lambda words, num_ranks: pytest.fail("is started by somebody else"))
    monkeypatch.setattr("espalier.validate.num_processes", lambda run: 1)
    monkeypatch.setattr(job, "_num_cpus", lambda cfg, task: 1)
    monkeypatch.setattr("espalier.strategies.ddp.Replicated.world_size", 1)
    done = espalier("train", *MLP, "strategy=ddp_cpu")
    assert done.code == 2
    assert done.err == "espalier: trainer.devices: 2 in all, but only 1 take part in this run\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["strategy=ddp_cpu"], "trainer.devices=2: of the 2 processes of a trial each would start the whole sweep"),
        (["trainer.devices=2,1"], "trainer.devices=2: of the 2 processes"),
        (["strategy=cpu", "trainer.num_nodes=3"], "trainer.devices=1: of the 3 processes"),
    ],
)
def test_a_sweep_of_several_processes_per_trial_is_refused_by_their_number(
    espalier: Command, words: list[str], line: str
):
    done = espalier("train", "-m", "model=mlp", "seed=0,1", *words)
    assert done.code == 2
    assert done.err.startswith(f"espalier: {line}")
    assert not list(done.folder.glob("logs/*/*"))


def test_a_sweep_of_one_process_per_trial_may_use_any_strategy(espalier: Command):
    done = espalier("train", "-m", *MLP, "trainer.max_epochs=1", "strategy=ddp_cpu", "trainer.devices=1", "seed=0")
    assert done.code == 0, done.err
    assert len(list(done.folder.glob("logs/sweep/*/0/report.json"))) == 1
    assert "LOCAL_RANK" not in os.environ  # Lightning's, which the next run of this process would take for a launcher's


WEIGHED = (
    *("train", "model=mlp", "model.hidden=[16]", "optimizer=sgd", "trainer.max_epochs=2", *QUICK),
    *("learner.class_weights=[1,50,2,3,0,5,0.1,7,8,9]", "learner.label_smoothing=0.1"),
)


@pytest.mark.parametrize(
    "words",
    [
        ("strategy=ddp_cpu", "trainer.accumulate_grad_batches=2"),
        ("strategy=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"),
    ],
)
def test_weighed_classes_train_two_processes_like_one_with_the_double_batch(tmp_path: Path, words: tuple[str, ...]):
    accumulate = [word for word in words if "accumulate" in word]
    one = command([*WEIGHED, "data.batch_size=32", *accumulate, f"hydra.run.dir={tmp_path}/one"], tmp_path)
    assert one.code == 0
    for code, output in ranks(tmp_path, *WEIGHED, "data.batch_size=16", *words, "hydra.run.dir=two"):
        assert code == 0, output
    ours, theirs = (weights(tmp_path / name) for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), rel=1e-5)


WATCHED = """
from pathlib import Path
import torch.distributed as dist
from espalier.learners.learner import Learner
log = []

def watch(name):
    whole = getattr(dist, name)
    def counted(*args, **knobs):
        log.append(f"{name}, {'async' if knobs.get('async_op') else 'waits'}")
        return whole(*args, **knobs)
    setattr(dist, name, counted)

def on_train_end(self):
    Path(f"collectives_{self.global_rank}.txt").write_text("\\n".join(log))

for name in ("all_reduce", "broadcast", "broadcast_object_list", "all_gather", "barrier"):
    watch(name)
Learner.on_train_batch_start = lambda self, batch, batch_idx: log.append("step")
Learner.on_train_end = on_train_end
"""


def test_no_process_waits_for_another_between_two_steps(tmp_path: Path):
    """But for the gradients, which torch's reducer adds up out of sight of Python."""
    one_epoch = (
        *MLP,
        "learner.class_weights=balanced",
        "trainer.max_epochs=1",
        "callbacks.checkpoint.every_n_minutes=99",
        "strategy=ddp_cpu",
    )
    for code, output in ranks(tmp_path, "train", *one_epoch, "hydra.run.dir=run", before=WATCHED):
        assert code == 0, output
    for rank in range(2):
        calls = (tmp_path / f"collectives_{rank}.txt").read_text().splitlines()
        steps = [place for place, call in enumerate(calls) if call == "step"]
        assert len(steps) == 17
        between = [calls[start + 1 : end] for start, end in pairwise(steps)]
        # Of the weights of the samples, of the time since the last checkpoint, and of signals.
        assert between == [["all_reduce, async"] * 3] * 16


def test_a_sweep_under_torchrun_has_one_folder_and_trains_every_trial(tmp_path: Path, torchrun: Path):
    done = launch(tmp_path, *TORCHRUN, "espalier.cli", "train", "-m", *MLP, "strategy=ddp_cpu", "seed=0,1")
    assert done.returncode == 0, done.stderr
    sweep = run_in(tmp_path)
    assert metrics(sweep / "0") == metrics(torchrun)
    assert metrics(sweep / "1") != metrics(torchrun)


KILLED = """
import os, signal
from espalier import cli
from espalier.callbacks.monitor import Monitor

whole = Monitor.on_train_batch_end

def on_train_batch_end(self, trainer, learner, outputs, batch, batch_idx):
    whole(self, trainer, learner, outputs, batch, batch_idx)
    if trainer.global_rank == 0 and (trainer.current_epoch, batch_idx) == (1, 5):
        os.kill(os.getpid(), signal.SIGKILL)

Monitor.on_train_batch_end = on_train_batch_end
if __name__ == "__main__":
    cli.main()
"""


def test_ddp_resumes_bit_equal_after_kill_9(tmp_path: Path, torchrun: Path):
    (tmp_path / "killed.py").write_text(KILLED)
    killed = launch(tmp_path, *TORCHRUN, "killed", "train", *MLP, "strategy=ddp_cpu")
    assert killed.returncode != 0
    assert f"exitcode  : {-signal.SIGKILL}" in killed.stderr
    run = run_in(tmp_path)
    assert not (run / "report.json").exists()
    done = launch(tmp_path, "espalier.cli", "train", f"resume={run}")
    assert done.returncode == 0, done.stderr
    ours, theirs = weights(run), weights(torchrun)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert metrics(run) == metrics(torchrun)
