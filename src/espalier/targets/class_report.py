"""How a network fares with each class, and where it errs: counted, drawn, written down and put into words.

Letters: N samples, K classes, E errors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from espalier.reporting import error_figures, terminal
from espalier.runs import files
from espalier.targets.kind import Raw
from espalier.targets.metrics import calibration

if TYPE_CHECKING:
    from espalier.targets.predictions import Predictions

MAX_CLASSES = 20  # in the printed table; of more, the worst WORST_CLASSES
WORST_CLASSES = 10
PER_CLASS = "per_class.csv"
ERRORS = "errors.csv"


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class; a share is 0 where nothing could be divided."""

    name: str
    precision: float  # of what was given this label, how much is right
    recall: float  # of the samples of this class, how many were found
    f1: float
    support: int  # samples of this class


def per_class(found: "Predictions") -> list[ClassScore]:
    """Return one score per class, in the order of the classes."""
    num_classes = found.spec.num_classes
    predicted_N = found.predicted
    support_K = found.y.bincount(minlength=num_classes)
    given_K = predicted_N.bincount(minlength=num_classes)
    right_K = found.y[predicted_N == found.y].bincount(minlength=num_classes)
    counts = zip(right_K.tolist(), given_K.tolist(), support_K.tolist(), strict=True)
    return [
        ClassScore(name, right / max(given, 1), right / max(support, 1), 2 * right / max(given + support, 1), support)
        for name, (right, given, support) in zip(found.spec.class_names, counts, strict=True)
    ]


def worst(scores: Sequence[ClassScore]) -> list[ClassScore]:
    """Return the classes that have samples, the lowest F1 first."""
    return sorted((score for score in scores if score.support), key=lambda score: score.f1)


def class_table(scores: Sequence[ClassScore]) -> Table:
    """Return a table of all classes, or, of more than `MAX_CLASSES`, of the worst."""
    is_short = len(scores) <= MAX_CLASSES
    shown = list(scores) if is_short else worst(scores)[:WORST_CLASSES]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    grid.add_column("class" if is_short else f"worst {len(shown)} of {len(scores)} classes", style="bold")
    for name in ("precision", "recall", "F1", "samples"):
        grid.add_column(name, justify="right")
    for score in shown:
        shares = (f"{share:.4f}" for share in (score.precision, score.recall, score.f1))
        grid.add_row(Text(terminal.printable(score.name)), *shares, f"{score.support:,}")
    return grid


def confident_errors(found: "Predictions", limit: int) -> Tensor:
    """Return the places in `found` of at most `limit` wrong answers, the most confident first."""
    judged = found.kind.judge(found.output, found.y)
    place_E = judged.is_wrong.nonzero().flatten()
    order_E = judged.confidence[place_E].argsort(descending=True, stable=True)
    return place_E[order_E][:limit]


def write_classes(scores: Sequence[ClassScore], target: Path) -> None:
    """Write every class, as CSV."""
    header = ("class", "precision", "recall", "f1", "support")
    files.write_csv(
        target, header, ([each.name, each.precision, each.recall, each.f1, each.support] for each in scores)
    )


def describe(found: "Predictions", raw: Raw, folder: Path) -> Iterator[str]:
    """Draw figures and write tables into the folder of a run; yield what a reader must know, in words.

    `found.spec` says which raw value is 1.0 in a picture.
    """
    scores = per_class(found)
    write_classes(scores, folder / PER_CLASS)
    error_figures.reliability(calibration(found.output, found.y), folder / "figures" / "calibration.png")
    weakest = worst(scores)[0]
    yield (
        f"weakest class: {weakest.name}, precision {weakest.precision:.4f}, recall {weakest.recall:.4f}; "
        f"all in {PER_CLASS}"
    )
    num_wrong = int((found.predicted != found.y).sum())
    yield _errors(found, raw, num_wrong, folder) if num_wrong else f"no error among {len(found):,} samples"


def _errors(found: "Predictions", raw: Raw, num_wrong: int, folder: Path) -> str:
    place_E = confident_errors(found, error_figures.MAX_ERRORS)
    wrong = found.columns(is_full=False)
    index_E, true_E, predicted_E, probability_E = (cells[place_E.numpy()].tolist() for cells in wrong.values())
    x = raw(found.index[place_E])
    if found.spec.is_image:
        drawn = folder / "figures" / "errors.png"
        error_figures.errors(x.float() / found.spec.scale, true_E, predicted_E, probability_E, drawn)
    else:
        drawn = folder / ERRORS
        header = [*wrong, *(f"x{place}" for place in range(x.shape[1]))]
        lines = zip(index_E, true_E, predicted_E, probability_E, x.tolist(), strict=True)
        files.write_csv(drawn, header, ([*cells, *features] for *cells, features in lines))
    return (
        f"{num_wrong:,} of {len(found):,} samples wrong; most confident: sample {index_E[0]}, {true_E[0]} taken for "
        f"{predicted_E[0]} with {probability_E[0]:.4f}; see {drawn.name}"
    )
