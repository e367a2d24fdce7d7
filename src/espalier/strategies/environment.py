"""Tell Lightning how many processes there are, and which of them this one is."""

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from espalier.processes.launchers import is_task_of_slurm


class Tasks(SLURMEnvironment):
    """The tasks that srun has started, as `launchers.py` counted them; Lightning does not believe `--ntasks`."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)  # requeue=true does it, once all is saved

    @staticmethod
    def _validate_srun_used() -> None:
        pass

    @staticmethod
    def _validate_srun_variables() -> None:
        pass

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass


def environments() -> list[ClusterEnvironment]:
    """Return the cluster environment for Lightning, or none if it finds the right one by itself."""
    if TorchElasticEnvironment.detect():
        return []
    if is_task_of_slurm():
        return [Tasks()]
    return [LightningEnvironment()] if SLURMEnvironment.detect() else []  # of a batch script, not of this process
