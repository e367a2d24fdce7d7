"""`espalier train`: fit, test the best checkpoint, report."""

from espalier.run import Run
from espalier.spec import Report


def train(run: Run) -> Report:
    """Fit the model on the data, measure its best checkpoint on the test split.

    `resume=` continues at the step of the last checkpoint; `source=` starts from another run's weights.
    """
    run.record()
    run.trainer.fit(run.learner, run.data, ckpt_path=run.resumed.path if run.resumed else None)
    best = run.best_checkpoint
    metrics = run.measure("test", best)
    notes = [] if best is None else [f"measured on {best.name}, which had {run.learner.monitor} {run.best_score:.4f}"]
    return run.publish(run.cost(best) | run.speed() | {"metrics": metrics}, *notes)
