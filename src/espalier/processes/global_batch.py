"""Keep the samples of an optimizer step the same when a run resumes on another number of devices.

A step takes devices x batch size x accumulated batches. The checkpoint says how they were split; on resume the batch
size of a device is changed to fit, or the accumulation, so that each step, epoch and validation sees the samples that
it would have seen. If no split fits, the run is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from espalier.errors import ConfigError

RECORD = "global_batch"  # in a checkpoint
PROGRESS = "epoch_loop.batch_progress"  # of Lightning's loops


@dataclass(frozen=True)
class Split:
    """The devices, batch size and accumulation of a step, and the number of batches in an epoch."""

    num_devices: int
    batch_size: int  # of a device
    accumulate: int  # batches of a device in a step
    num_batches: int  # of an epoch
    val_check_batch: int  # batches from one validation to the next; 0 where the clock decides
    num_val_batches: int  # of a validation

    @property
    def samples(self) -> int:
        """Return the number of samples of a batch over all devices."""
        return self.num_devices * self.batch_size

    @property
    def samples_of_step(self) -> int:
        return self.samples * self.accumulate

    def __str__(self) -> str:
        devices = "1 device" if self.num_devices == 1 else f"{self.num_devices} devices"
        accumulated = f" x {self.accumulate} batches" if self.accumulate > 1 else ""
        return f"{devices} x {self.batch_size} samples{accumulated}"


def of(content: Mapping[str, Any]) -> Split | None:
    """Return how a checkpoint's steps were split, or None if it is too old to say.

    Raises:
        ConfigError: the entry holds values that no training writes.
    """
    if RECORD not in content:
        return None
    try:
        split = Split(**content[RECORD])
    except TypeError:
        split = Split(0, 0, 0, 0, 0, 0)
    parts = astuple(split)
    if not all(type(part) is int and part >= 0 for part in parts) or not all(parts[:4]):
        raise ConfigError(f"resume: the checkpoint's {RECORD} is wrong; start anew with source=")
    return split


def follow(content: Mapping[str, Any], num_devices: int, accumulate: int, scales_validation: bool) -> Split | None:
    """Return the split for so many devices that leaves the steps as they were, or None if nothing changes.

    `accumulate` is a wish if it differs from that of the checkpoint. `scales_validation`: only part of a split is
    validated on.

    Raises:
        ConfigError: there is no such split.
    """
    before = of(content)
    if before is None or (num_devices, accumulate) == (before.num_devices, before.accumulate):
        return None
    problem = f"steps of {before.samples_of_step} samples do not divide by {num_devices * accumulate}"
    kept = [before.num_batches, _position(content), before.val_check_batch]
    kept += [before.num_val_batches] if scales_validation else []
    for share in _shares(before, num_devices, accumulate):
        samples = share * num_devices
        if all(num * before.samples % samples == 0 for num in kept):
            return Split(
                num_devices=num_devices,
                batch_size=share,
                accumulate=before.samples_of_step // samples,
                num_batches=before.num_batches * before.samples // samples,
                val_check_batch=before.val_check_batch * before.samples // samples,
                num_val_batches=-(-before.num_val_batches * before.samples // samples),
            )
        problem = f"epochs of {before.num_batches * before.samples} samples, or their parts, do not divide so"
    wish = f", trainer.accumulate_grad_batches={accumulate}" if accumulate != before.accumulate else ""
    raise ConfigError(
        f"trainer.devices={num_devices}{wish}: the run was trained by {before}, and {problem}; resume it with "
        f"trainer.devices={before.num_devices} or another number that divides, or start a new run with source="
    )


def _shares(before: Split, num_devices: int, accumulate: int) -> Iterator[int]:
    """Yield batch sizes per device that keep the samples of a step the same, the best first."""
    if before.samples_of_step % num_devices:
        return
    share = before.samples_of_step // num_devices
    if share % accumulate == 0:
        yield share // accumulate
    if accumulate == before.accumulate:
        others = [size for size in range(1, share + 1) if share % size == 0]
        yield from sorted(others, key=lambda size: (size > before.batch_size, abs(size - before.batch_size)))


def _position(content: Mapping[str, Any]) -> int:
    """Return the number of batches per device that are done in the epoch.

    Raises:
        ConfigError: the checkpoint does not say so, or it lies between two batches of the same step.
    """
    before = of(content)
    try:
        done = int(content["loops"]["fit_loop"][PROGRESS]["current"]["ready"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError("resume: the checkpoint does not say how far it is; start anew with source=") from None
    if before and done % before.accumulate and done != before.num_batches:
        raise ConfigError(
            f"trainer.devices: the checkpoint is one of batch {done} of an epoch, within a step of {before.accumulate} "
            f"batches, and cannot be split otherwise; resume it with {before}"
        )
    return done


def translate(content: Mapping[str, Any], num_devices: int, batch_size: int) -> None:
    """Convert the batch counters of a checkpoint to those of another split, in place."""
    before = of(content)
    if before is None or before.samples == num_devices * batch_size:
        return
    for counts in (content["loops"]["fit_loop"][PROGRESS][name] for name in ("total", "current")):
        ready = counts["ready"] * before.samples // (num_devices * batch_size)
        counts.update({name: ready - (counts["ready"] - count) for name, count in counts.items()})
