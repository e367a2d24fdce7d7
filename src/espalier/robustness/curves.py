"""A metric over the severity of a harm: samples of a split as a network will see them, and what a report says of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from espalier.data.loaders import Batch
from espalier.data.transforms import Normalise
from espalier.robustness import base
from espalier.robustness.base import Loss, Setting
from espalier.spec import DataSpec

Curves = Mapping[str, Sequence[float]]  # a metric at each severity, by what did the harm


def harmed(
    batches: Iterable[Batch],
    name: str,
    severity: int,
    spec: DataSpec,
    seed: int,
    largest: float | None,
    loss: Loss | None,
) -> Iterator[Batch]:
    """Yield normalised batches after one corruption or attack; images are harmed as pixels in [0, 1].

    `largest` is the change that an attack makes at severity 5, None for the usual one; `loss` takes normalised samples
    and targets, and is followed by attacks alone.
    """
    harm = base.named(name)
    normalise = Normalise(spec, torch.device("cpu"))
    if not spec.is_image:
        setting = Setting(base.kind_of(spec), seed, largest, loss)
        yield from (batch._replace(inputs=(harm.harm(batch, severity, setting),)) for batch in batches)
        return
    of_pixels = None if loss is None else lambda x, y_B: loss(normalise.of_scaled(x), y_B)
    setting = Setting(base.kind_of(spec), seed, largest, of_pixels)
    for batch in batches:
        pixels = batch._replace(inputs=((batch.x * normalise.std + normalise.mean).clamp(0, 1),))
        yield batch._replace(inputs=(normalise.of_scaled(harm.harm(pixels, severity, setting)),))


def severities(
    batches: Iterable[Batch], name: str, spec: DataSpec, seed: int, largest: float | None, loss: Loss | None
) -> Iterator[Iterator[Batch]]:
    """Yield all batches, `harmed`, at each severity in turn."""
    for severity in base.SEVERITIES:
        yield harmed(batches, name, severity, spec, seed, largest, loss)


def rows(curves: Curves, split: str, runtime: str) -> list[dict[str, Any]]:
    """Return one row of a report per harm: the metric at each severity, and its mean."""
    return [
        {
            "name": name,
            "runtime": runtime,
            "metrics": {
                **{f"{split}/severity {severity}": value for severity, value in enumerate(values, start=1)},
                f"{split}/mean": sum(values) / len(values),
            },
        }
        for name, values in curves.items()
    ]


def summary(curves: Curves, metric: str, clean: float, mode: Literal["min", "max"]) -> str:
    """Return what the rows show, and which harm does most."""
    weakest = (min if mode == "max" else max)(curves, key=lambda name: sum(curves[name]))
    return (
        f"under {', '.join(curves)} the table shows {metric}; weakest under {weakest}: "
        f"{curves[weakest][-1]:.4g} at severity 5, {clean:.4g} unharmed"
    )
