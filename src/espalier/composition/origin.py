"""Check the checkpoint that a run starts from or resumes: whether the data fit, and which settings changed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from espalier.config import inherit
from espalier.data.module import DataModule
from espalier.errors import ConfigError
from espalier.export.bundle import Bundle
from espalier.processes import global_batch
from espalier.runs.checkpoint import Checkpoint
from espalier.spec import DataSpec

NUM_NAMED = 5  # classes in a message


def require_same_data(key: str, data: DataModule, source: Checkpoint | Bundle) -> None:
    """Raise `ConfigError` if samples or classes are not those that the source was trained with."""
    now, then = data.spec, source.spec
    if _asked(now) != _asked(then):
        differing = sorted(set(now.class_names) ^ set(then.class_names))
        named = f"; not in both: {', '.join(differing[:NUM_NAMED])}" if now.num_outputs == then.num_outputs else ""
        raise ConfigError(
            f"{key}={source.path}: trained on {then.name} {_said(then)} with {then.num_outputs} outputs, "
            f"but data is {now.name} {_said(now)} with {now.num_outputs}{named}"
        )


def _asked(spec: DataSpec) -> tuple[Any, ...]:
    """Return what has to be the same for a network to be used on other data."""
    inputs = [(each.name, each.kind, each.shape, each.vocabulary) for each in spec.inputs]
    return inputs, [(each.name, each.kind, each.names) for each in spec.targets]


def _said(spec: DataSpec) -> str:
    if spec.is_plain:
        return str(spec.shape)
    words = (f"{each.name} {each.shape}" + f" of {len(each.vocabulary)} words" * each.is_tokens for each in spec.inputs)
    return f"({', '.join(words)})"


def changed_samples(data: DataModule, source: Checkpoint | Bundle) -> list[str]:
    """Return a remark if the data have changed since the source was trained: test samples may have been trained on."""
    now, then = data.spec, source.spec
    if now.name != then.name or not then.class_counts:
        return []
    if now.class_counts != then.class_counts:
        found = f"has {sum(now.class_counts)} training samples where {source.path} was trained on "
        found += f"{sum(then.class_counts)}"
    elif _are_others(now, then):
        found = f"its {sum(now.class_counts)} training samples are not those that {source.path} was trained on"
    else:
        return []
    return [f"{now.name}: {found}; the data have changed, so samples of other splits may be among those it has seen"]


def _are_others(now: DataSpec, then: DataSpec) -> bool:
    """Return whether samples have other names, sizes, labels or another order, as far as both specs tell."""
    return bool(now.fingerprint and then.fingerprint) and now.fingerprint != then.fingerprint


def require_same_samples(data: DataModule, resumed: Checkpoint) -> None:
    """Raise `ConfigError` if a run cannot resume because its data have changed since."""
    now, then = data.spec, resumed.spec
    bring_back = "bring them back as they were, or start a new run with source="
    if (_asked(now), now.class_counts) != (_asked(then), then.class_counts):
        raise ConfigError(
            f"resume={resumed.path}: began with {sum(then.class_counts)} training samples of {then.num_outputs} "
            f"outputs, and the data have {sum(now.class_counts)} of {now.num_outputs} now; {bring_back}"
        )
    if _are_others(now, then):
        raise ConfigError(
            f"resume={resumed.path}: its {sum(now.class_counts)} training samples are not those that it began with: "
            f"they were renamed, replaced or edited; {bring_back}"
        )


def remarks(resumed: Checkpoint, cfg: DictConfig, folder: Path, num_devices: Callable[[], int]) -> Iterator[str]:
    """Yield what a resumed run does otherwise than before; devices are only counted if that matters."""
    before = global_batch.of(resumed.content)
    now = before and replace(
        before,
        num_devices=num_devices(),
        batch_size=cfg.data.batch_size,
        accumulate=cfg.trainer.accumulate_grad_batches,
    )
    if before and now and now != before:
        yield f"goes on with {now}, after {before}: {now.samples_of_step} in a step, as before"
    kept = () if before is None else inherit.DEVICES if before == now else (*inherit.DEVICES, *inherit.BATCHES)
    changes = inherit.changes(resumed.config, cfg, but=kept)
    if changes:
        yield f"goes on, but is no longer the run it was: {', '.join(changes)}"
    if resumed.content.get("has_stopped"):
        yield (
            "its training had stopped by itself, so no more is trained; "
            f"to train its network further: espalier train source={folder}"
        )
