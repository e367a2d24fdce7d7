"""`espalier train`: fit, test the best checkpoint, report."""

from espalier.callbacks import monitor
from espalier.run import Run
from espalier.spec import Report


def train(run: Run) -> Report:
    """Fit the model on the data, measure its best checkpoint on the test split.

    `resume=` continues at the step of the last checkpoint; `source=` starts from another run's weights.
    """
    run.record()
    weights = run.fit()
    metrics = run.measure("test", weights)
    if weights is None:
        notes = ["no checkpoint was kept: callbacks has none"]
    elif (chosen := run.monitored) is None:
        notes = [f"measured on {weights.name}, as no validation chose a best"]
    else:
        notes = [f"measured on {weights.name}, which had {chosen['metric']} {chosen['value']:.4f}"]
    return run.publish([run.cost(weights) | monitor.speed(run.callbacks) | {"metrics": metrics}], notes)
