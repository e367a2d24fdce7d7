"""Where a network errs on a split, drawn, written down and put into words.

Letters: B samples, E errors.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from espalier.evaluation import error_figures, prediction_files
from espalier.evaluation.predictions import Predictions, calibration, columns, confident_errors, per_class, worst

PER_CLASS = "per_class.csv"
ERRORS = "errors.csv"

Raw = Callable[[Tensor], Tensor]  # positions (B,) in the split to raw samples (B, *shape)


def describe(found: Predictions, raw: Raw, folder: Path) -> Iterator[str]:
    """Figures and tables in the folder of a run; what a reader must know, in words.

    `found.spec` says which raw value is 1.0 in a picture.
    """
    if not found.spec.num_classes:
        error_figures.residuals(found.predicted, found.y, folder / "figures" / "residuals.png")
        return
    scores = per_class(found)
    prediction_files.write_classes(scores, folder / PER_CLASS)
    error_figures.reliability(calibration(found), folder / "figures" / "calibration.png")
    weakest = worst(scores)[0]
    yield (
        f"weakest class: {weakest.name}, precision {weakest.precision:.4f}, recall {weakest.recall:.4f}; "
        f"all in {PER_CLASS}"
    )
    num_wrong = int((found.predicted != found.y).sum())
    yield _errors(found, raw, num_wrong, folder) if num_wrong else f"no error among {len(found):,} samples"


def _errors(found: Predictions, raw: Raw, num_wrong: int, folder: Path) -> str:
    place_E = confident_errors(found, error_figures.MAX_ERRORS)
    wrong = columns(found, probabilities=False)
    index_E, true_E, predicted_E, probability_E = (cells[place_E.numpy()].tolist() for cells in wrong.values())
    x = raw(found.index[place_E])
    if found.spec.is_image:
        drawn = folder / "figures" / "errors.png"
        error_figures.errors(x.float() / found.spec.scale, true_E, predicted_E, probability_E, drawn)
    else:
        drawn = folder / ERRORS
        header = [*wrong, *(f"x{place}" for place in range(x.shape[1]))]
        lines = zip(index_E, true_E, predicted_E, probability_E, x.tolist(), strict=True)
        prediction_files.write_csv(drawn, header, ([*cells, *features] for *cells, features in lines))
    return (
        f"{num_wrong:,} of {len(found):,} samples wrong; most confident: sample {index_E[0]}, {true_E[0]} taken for "
        f"{predicted_E[0]} with {probability_E[0]:.4f}; see {drawn.name}"
    )
