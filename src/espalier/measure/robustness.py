"""Samples of a split, harmed: corrupted by chance or attacked on purpose, as the batches that a network will see."""

from collections.abc import Iterable, Iterator

import torch

from espalier.data.loaders import Batch
from espalier.data.prepare import Normalise
from espalier.errors import ConfigError
from espalier.measure import attacks, corruptions
from espalier.measure.attacks import Loss
from espalier.spec import DataSpec

UNBOUNDED = (-float("inf"), float("inf"))
OF_TABLES = ("noise", *attacks.NAMES)


def require_applicable(key: str, names: Iterable[str], spec: DataSpec) -> None:
    """Raise `ConfigError` if one of these does nothing sensible to such samples."""
    wrong = [name for name in names if not spec.is_image and name not in OF_TABLES]
    if wrong:
        raise ConfigError(
            f"{key}=[{','.join(wrong)}]: {spec.name} holds tables, and only images can be harmed so; "
            f"tables take {', '.join(OF_TABLES)}"
        )


def renormalised(batches: Iterable[Batch], of_data: DataSpec, of_network: DataSpec) -> Iterator[Batch]:
    """Batches that were normalised as `of_data` says, as a network that was trained on `of_network` wants them."""
    before, after = (Normalise(spec, torch.device("cpu")) for spec in (of_data, of_network))
    is_same = (of_data.mean, of_data.std) == (of_network.mean, of_network.std)
    for batch in batches:
        yield batch if is_same else batch._replace(x=after.of_scaled(batch.x * before.std + before.mean))


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
