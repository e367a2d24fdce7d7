"""`espalier evaluate source=RUN`: measure a trained run again, from its checkpoint alone."""

from typing import Literal

from espalier.errors import ConfigError
from espalier.run import Run
from espalier.spec import Report


def evaluate(run: Run, split: Literal["train", "val", "test"]) -> Report:
    """Measure the source's best checkpoint on a split; metrics are named `test/...` or `val/...` as in training.

    Raises:
        ConfigError: no source.
    """
    if run.source is None:
        raise ConfigError("source=null: evaluate needs the RUN to measure; try source=latest")
    run.record()
    metrics = run.measure(split)
    return run.publish([run.cost(run.source.path) | {"metrics": metrics}], [])
