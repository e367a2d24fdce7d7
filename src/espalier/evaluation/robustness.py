"""Samples of a split, harmed: corrupted by chance or attacked on purpose, as the batches that a network will see."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from espalier.data.loaders import Batch
from espalier.data.transforms import Normalise
from espalier.errors import ConfigError
from espalier.evaluation import attacks, corruptions
from espalier.evaluation.attacks import Loss
from espalier.spec import DataSpec

UNBOUNDED = (-float("inf"), float("inf"))
OF_TABLES = ("noise", *attacks.NAMES)

Harm = Literal["noise", "blur", "contrast", "brightness", "rotation", "fgsm", "pgd"]
Curves = Mapping[str, Sequence[float]]  # a metric at each severity, by what did the harm


def require_applicable(key: str, names: Sequence[str], spec: DataSpec) -> None:
    """Raise `ConfigError` if one of these does nothing sensible to such samples, or is there twice."""
    if len(set(names)) < len(names):
        raise ConfigError(f"{key}=[{','.join(names)}]: one is listed twice; once is enough")
    wrong = [name for name in names if not spec.is_image and name not in OF_TABLES]
    if wrong:
        raise ConfigError(
            f"{key}=[{','.join(wrong)}]: {spec.name} holds tables, and only images can be harmed so; "
            f"tables take {', '.join(OF_TABLES)}"
        )


def harmed(
    batches: Iterable[Batch],
    name: str,
    severity: int,
    spec: DataSpec,
    seed: int,
    largest: float | None,
    loss: Loss | None,
) -> Iterator[Batch]:
    """Normalised batches after one corruption or attack; images are harmed as pixels in [0, 1].

    `largest` is the change that an attack makes at severity 5, None for the usual one; `loss` takes normalised samples
    and targets, and is followed by attacks alone.
    """
    normalise = Normalise(spec, torch.device("cpu"))
    limits = (0.0, 1.0) if spec.is_image else UNBOUNDED
    usual = attacks.PIXEL_EPSILON if spec.is_image else attacks.TABLE_EPSILON
    epsilon = attacks.epsilon(usual if largest is None else largest, severity)
    for batch in batches:
        x = (batch.x * normalise.std + normalise.mean).clamp(0, 1) if spec.is_image else batch.x
        if name in attacks.NAMES:
            assert loss is not None
            of_input = (lambda x, y_B: loss(normalise.of_scaled(x), y_B)) if spec.is_image else loss
            x = attacks.attack(name, of_input, x, batch.y, epsilon, limits, seed, batch.index)
        elif spec.is_image:
            x = corruptions.corrupt_images(name, x, severity, seed, batch.index)
        else:
            x = corruptions.corrupt_table(x, severity, seed, batch.index)
        yield batch._replace(x=normalise.of_scaled(x) if spec.is_image else x)


def severities(
    batches: Iterable[Batch], name: str, spec: DataSpec, seed: int, largest: float | None, loss: Loss | None
) -> Iterator[Iterator[Batch]]:
    """All batches, `harmed` at each severity in turn."""
    for severity in corruptions.SEVERITIES:
        yield harmed(batches, name, severity, spec, seed, largest, loss)


def rows(curves: Curves, split: str, runtime: str) -> list[dict[str, Any]]:
    """One row of a report per harm: the metric at each severity, and its mean."""
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
