"""The MLflow logger, which writes to a database in the run folder unless a server is named.

`mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db` shows it.
"""

import logging
import os
from pathlib import Path

from lightning.pytorch.loggers import MLFlowLogger

from espalier.errors import require

RUN_ID_NAME = "mlflow_run_id"
CHATTER = ("alembic", "mlflow.store.db.utils", "lightning.pytorch.loggers.mlflow")  # while the database is created


class MlflowLog(MLFlowLogger):
    """Logs to MLflow from one run folder; a resumed run is the same MLflow run.

    `MLFLOW_TRACKING_URI` names a server in place of the database, which takes about four seconds to create; MLflow 3
    refuses the faster plain files. Its reports about how it is used are switched off.

    Raises:
        ConfigError: mlflow is not installed.
    """

    def __init__(self, folder: Path, run_name: str, experiment: str) -> None:
        require("mlflow", "track")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report each run, and wait for an answer
        for name in CHATTER:
            logging.getLogger(name).setLevel(logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / RUN_ID_NAME
        super().__init__(
            experiment_name=experiment,
            run_name=run_name,
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').resolve()}",
            artifact_location=str(folder.resolve() / "mlflow"),
            run_id=id_file.read_text(encoding="utf-8") if id_file.exists() else None,
        )
        self.id_file = id_file

    @property
    def experiment(self) -> object:
        client = super().experiment
        if self._run_id is not None and not self.id_file.exists():
            self.id_file.write_text(self._run_id, encoding="utf-8")
        return client
