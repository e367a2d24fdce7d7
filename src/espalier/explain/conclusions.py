"""Sentences that say which attribution maps should not be trusted, and why."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from espalier.compression.base import is_quantized
from espalier.spec import DataSpec, Entry

FAILS_FROM = 0.5  # rank correlation with the map of a network that has learnt nothing
MAX_INCOMPLETE = 0.01


def untrustworthy(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each method that should not be trusted here, with what would help."""
    notes = []
    for row in rows:
        metrics = row["metrics"]
        if metrics.get("completeness_error", 0) > MAX_INCOMPLETE:
            notes.append(
                f"INCOMPLETE: {row['name']} misses its sum by {metrics['completeness_error']:.1%}; raise task.steps"
            )
        if abs(metrics["sanity"]) >= FAILS_FROM:
            notes.append(
                f"FAILS THE SANITY CHECK: maps of {row['name']} hardly change when the weights are randomised "
                f"(rank correlation {metrics['sanity']:.2f}), so they show the input more than what was learnt"
            )
    return notes


def caveats(spec: DataSpec, history: Iterable[Entry]) -> Iterator[str]:
    """Yield what a reader should know of the network and the features as they were explained."""
    if is_quantized(history):
        yield (
            "integers have no gradients: the network was explained as trained, with simulated integers, "
            "whose steps integrated_gradients cannot sum exactly"
        )
    if not spec.is_image:
        yield "features are called x0, x1, ... in the order of the data, which names none"
