"""Who has started this process: what a launcher left in the environment is believed if it is whole."""

import pytest

from espalier.errors import ConfigError
from espalier.processes import launchers

NAMES = (
    *launchers.BY_HAND,
    *("RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NAME"),
    *("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"),
)
BATCH = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train.sh", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
SRUN = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
BY_HAND = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Sets the variables of launchers, and no others."""

    def set_to(variables: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="a shell"),
        pytest.param(BATCH, id="sbatch"),
        pytest.param({**BATCH, "SLURM_NTASKS": "4"}, id="sbatch --ntasks=4"),
        pytest.param({**BATCH, "SLURM_STEP_ID": "4294967291"}, id="the step that is the batch script"),
        pytest.param({**SRUN, "SLURM_JOB_NAME": "bash"}, id="srun --pty bash"),
        pytest.param(POD, id="a container of several"),
        pytest.param({"WORLD_SIZE": "2"}, id="WORLD_SIZE left over"),
    ],
)
def test_nobody_has_started_the_processes_of(environment, variables: dict[str, str]):
    environment(variables)
    assert launchers.find() is None
    assert launchers.rank() == 0


@pytest.mark.parametrize(
    ("variables", "rank"), [({**SRUN, "SLURM_PROCID": "1"}, 1), (SRUN, 0), (TORCHRUN, 1), (BY_HAND, 1)]
)
def test_a_launcher_whose_count_is_that_of_the_devices_is_believed(environment, variables: dict[str, str], rank: int):
    environment(variables)
    launcher = launchers.find()
    assert launcher is not None
    launcher.require(num_devices=2, num_nodes=1)
    launcher.require(num_devices=1, num_nodes=2)
    assert launchers.rank() == launcher.rank == rank


@pytest.mark.parametrize(
    ("variables", "num_devices", "line"),
    [
        ({**SRUN, "SLURM_NTASKS": "1"}, 2, "trainer.devices=2: takes 2 processes, but SLURM has started 1; use srun"),
        ({**SRUN, "SLURM_NTASKS": "4"}, 1, "trainer.devices=1: takes 1 process, but SLURM has started 4; use srun"),
        (TORCHRUN, 1, "trainer.devices=1: takes 1 process, but torchrun has started 2; use --nproc-per-node 1"),
        (BY_HAND, 4, "trainer.devices=4: takes 4 processes, but WORLD_SIZE is 2; unset WORLD_SIZE and LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, 2, "LOCAL_RANK=0: left over, as WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"),
        ({"LOCAL_RANK": "1"}, 1, "LOCAL_RANK=1: left over, as WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"),
        ({"LOCAL_RANK": "one"}, 1, "LOCAL_RANK=one: of the environment, is no number"),
    ],
)
def test_processes_that_are_not_there_are_one_line(environment, variables: dict[str, str], num_devices: int, line: str):
    environment(variables)
    with pytest.raises(ConfigError) as refused:
        launchers.find().require(num_devices, 1)
    assert str(refused.value).startswith(line)


def test_a_local_rank_of_0_that_is_left_over_does_no_harm_to_one_process(environment):
    environment({"LOCAL_RANK": "0"})
    launchers.find().require(num_devices=1, num_nodes=1)


def test_other_machines_need_a_launcher(environment):
    environment({"MASTER_ADDR": "there"})
    with pytest.raises(ConfigError, match="NODE_RANK, MASTER_PORT are not set"):
        launchers.require_nodes(2)
    launchers.require_nodes(1)
