"""Tasks that SLURM's srun has started, as Lightning's processes."""

from lightning.pytorch.plugins.environments import SLURMEnvironment


class Tasks(SLURMEnvironment):
    """Lightning's, which believes `--ntasks` as well; `launchers.py` has counted the tasks."""

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
