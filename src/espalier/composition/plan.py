"""The plan of a training in numbers, made once the data are known: batches, steps, samples left out, or an error.

Lightning finds limits that leave nothing to do in the middle of a run, or not at all. Here they cost one line before
anything is written.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import lightning as L
import torch

from espalier.data.loaders import Order
from espalier.data.module import DataModule
from espalier.errors import ConfigError
from espalier.spec import DataSpec
from espalier.targets.kinds import kind_of

FEW_BATCHES = 10  # per epoch; with fewer, batch statistics and schedules are coarse
MUCH_LEFT_OUT = 0.05  # of the training samples, in each epoch


@dataclass(frozen=True)
class Plan:
    """The numbers of a training; batches are those of one process, as in Lightning."""

    num_samples: tuple[int, int, int]  # training, validation, test
    num_devices: int
    batch_size: int  # per device
    num_batches: int  # of an epoch, before any limit
    num_train: int  # of an epoch, as limited
    steps_per_epoch: int
    num_steps: int | None  # in all; None where only time limits them

    @property
    def lines(self) -> Iterator[str]:
        """Yield the lines that the user reads before the first epoch, without the warnings."""
        train, val, test = self.num_samples
        yield f"{train} training, {val} validation and {test} test samples"
        in_all = "" if self.num_steps is None else f", {self.num_steps} in all"
        devices = f" on each of {self.num_devices} devices" if self.num_devices > 1 else ""
        yield f"{self.steps_per_epoch} steps per epoch{in_all}, batch size {self.batch_size}{devices}"

    @property
    def warnings(self) -> Iterator[str]:
        """Yield one line per warning, each with a remedy."""
        train, size = self.num_samples[0], self.batch_size * self.num_devices
        if self.num_batches < FEW_BATCHES and train >= FEW_BATCHES * self.num_devices:
            best = train // (FEW_BATCHES * self.num_devices)
            batches = "1 batch" if self.num_batches == 1 else f"{self.num_batches} batches"
            yield f"an epoch has only {batches}; data.batch_size={best} makes {train // (best * self.num_devices)}"
        left_out = train - self.num_batches * size
        if left_out > MUCH_LEFT_OUT * train and self.num_train == self.num_batches:  # else a limit leaves out more
            whole = next(
                batch
                for batch in range(self.batch_size, 0, -1)
                if train % (batch * self.num_devices) <= MUCH_LEFT_OUT * train
            )
            remedy = f"; data.batch_size={whole} leaves out {train % (whole * self.num_devices)}"
            yield (
                f"each epoch leaves out {left_out} of {train} training samples ({100 * left_out / train:.1f} %), "
                f"others each time, as whole batches are {size}{remedy}"
            )


def of_training(trainer: L.Trainer, data: DataModule, *, is_tested: bool, finished: tuple[int, int] = (0, 0)) -> Plan:
    """Return the plan of a fit, and of a test if `is_tested`; `finished` epochs, of so many steps, are done before.

    Raises:
        ConfigError: it would train nothing, or never validate although it should; one line per problem.
    """
    splits = data.splits
    sizes = (len(splits.train), len(splits.val), len(splits.test))
    num_batches, num_val, num_test = _lengths(data, trainer.world_size)
    num_train = _limited(num_batches, trainer.limit_train_batches)
    problems = [*_without_end(trainer), *_without_batches("train", num_batches, trainer.limit_train_batches)]
    if not trainer.limit_train_batches:
        problems.append("trainer.limit_train_batches=0: trains nothing; say 1 to try a single batch")
    problems += _without_batches("val", num_val, trainer.limit_val_batches)
    problems += _without_test(num_test, trainer.limit_test_batches) if is_tested else []
    interval = trainer.val_check_interval
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and 0 < num_train < interval:
        problems.append(
            f"trainer.val_check_interval={interval}: an epoch has {num_train} batches, so it would never validate; say "
            f"at most {num_train}, or trainer.check_val_every_n_epoch=null to count across epochs"
        )
    if problems:
        raise ConfigError(*problems)
    per_epoch = math.ceil(num_train / trainer.accumulate_grad_batches)
    limits = [trainer.max_steps] if trainer.max_steps != -1 else []
    if trainer.max_epochs not in (None, -1):
        num_epochs, num_steps = finished
        limits.append(num_steps + max(trainer.max_epochs - num_epochs, 0) * per_epoch)
    return Plan(
        sizes, trainer.world_size, data.batch_size, num_batches, num_train, per_epoch, min(limits) if limits else None
    )


def line(planned: Plan, trainer: L.Trainer, spec: DataSpec) -> str:
    """Return the line that the user reads before the first epoch: device, data, steps."""
    samples, steps = planned.lines
    shape = " and ".join(" x ".join(map(str, each.shape)) for each in spec.inputs)
    return f"{device(trainer)}; {spec.name}: {samples} of {shape}, {kind_of(spec).said}; {steps}"


def require_test(trainer: L.Trainer, data: DataModule, split: str) -> None:
    """Raise `ConfigError` if the limits leave no batch of the split that is measured."""
    num_samples = len(getattr(data.splits, split))
    num_batches = len(Order(num_samples, data.batch_size, None, 0, trainer.world_size))
    if problems := _without_test(num_batches, trainer.limit_test_batches):
        raise ConfigError(*problems)


def device(trainer: L.Trainer) -> str:
    """Return what the trainer runs on: `cpu, 2 threads`, `2 x NVIDIA A100`."""
    kind = trainer.strategy.root_device.type
    if kind == "cpu":
        threads = torch.get_num_threads()
        processes = f"{trainer.world_size} processes of " if trainer.world_size > 1 else ""
        return f"cpu, {processes}{threads} thread{'s' if threads > 1 else ''}"
    name = torch.cuda.get_device_name(trainer.strategy.root_device) if kind == "cuda" else kind
    return f"{trainer.world_size} x {name}"


def _lengths(data: DataModule, world_size: int) -> tuple[int, int, int]:
    """Return the number of batches of the three splits before any limit."""
    splits, size = data.splits, data.batch_size
    evaluated = (len(Order(len(samples), size, None, 0, world_size)) for samples in (splits.val, splits.test))
    return len(Order(len(splits.train), size, 0, 0, world_size)), *evaluated  # type: ignore[return-value]


def _limited(num_batches: int, limit: float) -> int:
    """Return the number of batches within a limit, as Lightning counts: an integer is a number, a float a share."""
    return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)


def _without_batches(stage: str, num_batches: int, limit: float) -> list[str]:
    if not limit or not num_batches or _limited(num_batches, limit):
        return []
    return [
        f"trainer.limit_{stage}_batches={limit:g}: of {num_batches} batches this is none; "
        f"say at least {math.ceil(1e4 / num_batches) / 1e4:g}, or a number of batches"
    ]


def _without_test(num_batches: int, limit: float) -> list[str]:
    if not limit:
        return ["trainer.limit_test_batches=0: the report would hold no number; say 1 to measure a single batch"]
    return _without_batches("test", num_batches, limit)


def _without_end(trainer: L.Trainer) -> Iterator[str]:
    for key in ("max_epochs", "max_steps"):
        if getattr(trainer, key) == 0:
            yield f"trainer.{key}=0: trains nothing; to measure a network say: espalier evaluate source=RUN"
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        yield "trainer.max_epochs=-1: a schedule needs an end; set trainer.max_steps as well"
