"""Loaders whose order is a function of (seed, epoch), whose position is saved, and whose batches are ready to train on.

Both kinds follow the same `Order` and hand out the same `Batch`: `BatchLoader` gathers from tensors that lie on the
device; `StreamLoader` reads what does not fit with worker processes and finishes each batch on the device.

Lightning calls `iter()` on a loader before it restores a checkpoint and before it sets the epoch, so iterators here
look at epoch and position only when the first batch is asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from espalier import seeding
from espalier.errors import ConfigError, EspalierError
from espalier.spec import PAD

ORDER_STREAM = 1  # keeps the order apart from other users of (seed, epoch)
PREFETCH = 2  # batches that each worker prepares ahead


class Batch(NamedTuple):
    """The input of a learner, all on one device; B may be 0 on a rank that has run out of samples to evaluate."""

    inputs: tuple[Tensor, ...]  # as the network takes them, (B, *shape) each: float32, normalised; tokens int64
    targets: tuple[Tensor, ...]  # classes (B,) int64, (B, K) float32 where samples are mixed; numbers (B,) float32
    index: Tensor  # type: ignore[assignment]  # (B,) int64: sample of the split; hides a method of tuple nobody needs

    @classmethod
    def single(cls, x: Tensor, y: Tensor, index: Tensor) -> "Batch":
        """Return a batch of one input and one target."""
        return cls((x,), (y,), index)

    @property
    def x(self) -> Tensor:
        """Return the only input."""
        (x,) = self.inputs
        return x

    @property
    def y(self) -> Tensor:
        """Return the only target."""
        (y,) = self.targets
        return y

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        inputs, targets = (tuple(each.to(device, non_blocking=True) for each in part) for part in self[:2])
        return Batch(inputs, targets, self.index.to(device, non_blocking=True))

    def split(self, size: int) -> "Iterator[Batch]":
        """Yield batches of at most `size` of the samples."""
        for place in range(0, len(self.index), size):
            part = slice(place, place + size)
            yield Batch(tuple(x[part] for x in self.inputs), tuple(y[part] for y in self.targets), self.index[part])


@dataclass(frozen=True, init=False)
class Samples:
    """A split or a piece of one: raw values (N, *shape), uint8, float32 or int64; targets (N,), int64 or float32."""

    inputs: tuple[Tensor, ...]  # tokens are padded with 0 to the longest of all
    targets: tuple[Tensor, ...]

    def __init__(self, inputs: Tensor | tuple[Tensor, ...], targets: Tensor | tuple[Tensor, ...]) -> None:
        object.__setattr__(self, "inputs", (inputs,) if isinstance(inputs, Tensor) else inputs)
        object.__setattr__(self, "targets", (targets,) if isinstance(targets, Tensor) else targets)

    @property
    def x(self) -> Tensor:
        """Return the only input."""
        (x,) = self.inputs
        return x

    @property
    def y(self) -> Tensor:
        """Return the only target."""
        (y,) = self.targets
        return y

    @property
    def has_lengths(self) -> bool:
        """Return whether samples are of different lengths: token ids, padded with 0."""
        return any(map(_is_tokens, self.inputs))

    def lengths(self) -> Tensor:
        """Return the number of tokens of each sample, (N,)."""
        counts = [(x != PAD).sum(1) for x in self.inputs if _is_tokens(x)]
        return torch.stack(counts).amax(0)

    def __len__(self) -> int:
        return len(self.targets[0])


def _is_tokens(x: Tensor) -> bool:
    return x.dtype == torch.int64 and x.ndim == 2


class Reader(Protocol):
    """A split that is read piece by piece: raw values and targets of the named samples, as in `Samples`."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Samples: ...


Finish = Callable[[Batch, int], Batch]  # a raw batch and the epoch to a finished one, on the same device


class Order:
    """The order of the samples: which of them make each batch of this rank.

    Training (`seed` given): batch i of all ranks together is `order[i * B * W:(i + 1) * B * W]` of a permutation keyed
    by (seed, epoch); rank r takes its r-th part of B and an incomplete last one is left out. Evaluation (`seed` None):
    each sample once over all ranks, the same number of batches on each, as even as possible, the last perhaps empty.

    Raises:
        ConfigError: training has fewer samples than one global batch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int | None, rank: int, world_size: int) -> None:
        global_batch = batch_size * world_size
        if seed is not None and num_samples < global_batch:
            on_devices = f"on {world_size} devices makes a global batch of {global_batch}, but " * (world_size > 1)
            raise ConfigError(
                f"data.batch_size={batch_size}: {on_devices}there are only {num_samples} training samples; "
                f"choose at most {num_samples // world_size}"
            )
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of batches per epoch, equal on all ranks."""
        whole = self.num_samples // self.global_batch
        return whole if self.seed is not None else -(-self.num_samples // self.global_batch)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def batches(self, device: torch.device) -> Sequence[Tensor]:
        """Return the sample indices of each batch of the current epoch."""
        if self.seed is None:
            whole = torch.arange(self.num_samples, device=device).split(self.batch_size * self.world_size)
            return [part.tensor_split(self.world_size)[self.rank] for part in whole]
        order = torch.randperm(self.num_samples, generator=seeding.generator(self.seed, self.epoch, ORDER_STREAM))
        used = order[: len(self) * self.batch_size * self.world_size].view(len(self), self.world_size, self.batch_size)
        return used[:, self.rank].to(device).unbind(0)


class Loader(ABC):
    """Batches of one split, with a position that a checkpoint can hold (Lightning's Stateful protocol)."""

    def __init__(self, order: Order, device: torch.device) -> None:
        self.sampler = order  # Lightning calls `loader.sampler.set_epoch` at the start of each epoch
        self.batch_sampler = None  # what has a sampler must have this too: Lightning looks whether it shuffles
        self.device = device
        self._done = (0, 0)  # the epoch of the batch handed out last, and how many batches of it are done
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.sampler.epoch
        resume, self._resume = self._resume, None
        start = resume[1] if resume and resume[0] == epoch else 0
        for done, batch in enumerate(self._batches(start), start=start + 1):
            self._done = (epoch, done)
            yield batch

    def state_dict(self) -> dict[str, int]:
        epoch, num_batches = self._done
        return {"epoch": epoch, "num_batches": num_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that are done when the epoch of `state` is iterated next; other epochs are whole."""
        self._done = self._resume = (state["epoch"], state["num_batches"])

    @abstractmethod
    def _batches(self, start: int) -> Iterator[Batch]:
        """Yield the batches of the current epoch from number `start` on."""


class BatchLoader(Loader):
    """Gives batches out of tensors on the device: one gather each for x and y, no Python per sample.

    `finish` None means that `samples.x` is model input already.
    """

    def __init__(self, samples: Samples, order: Order, finish: Finish | None) -> None:
        super().__init__(order, samples.targets[0].device)
        self.samples = samples
        self.finish = finish
        self.lengths_N = samples.lengths().cpu() if samples.has_lengths else None

    def _batches(self, start: int) -> Iterator[Batch]:
        inputs, targets, finish, epoch = self.samples.inputs, self.samples.targets, self.finish, self.sampler.epoch
        longest = self._longest(start)
        for place, index_B in enumerate(self.sampler.batches(self.device)[start:]):
            picked = tuple([x.index_select(0, index_B) for x in inputs])
            if longest:
                picked = tuple([x[:, : longest[place]] if _is_tokens(x) else x for x in picked])
            batch = Batch(picked, tuple([y.index_select(0, index_B) for y in targets]), index_B)
            yield batch if finish is None else finish(batch, epoch)

    def _longest(self, start: int) -> list[int]:
        """Return the most tokens of a sample in each batch; from the order on the CPU, as a device makes us wait."""
        if (length_N := self.lengths_N) is None:
            return []
        batches = self.sampler.batches(torch.device("cpu"))[start:]
        return [int(length_N[index_B].max()) if len(index_B) else 1 for index_B in batches]


class StreamLoader(Loader):
    """Gives batches read by `num_workers` processes (0: by this one), then moved to the device and finished there."""

    def __init__(self, reader: Reader, order: Order, finish: Finish, num_workers: int, device: torch.device) -> None:
        super().__init__(order, device)
        self.finish = finish
        self._plan = _Plan()
        self._loader: DataLoader[Batch | EspalierError] = DataLoader(
            _Indexed(reader),
            batch_sampler=self._plan,
            collate_fn=_unchanged,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=PREFETCH if num_workers else None,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # or DataLoader draws from the global one in every epoch
        )

    @property
    def _iterator(self) -> Any:
        """Return the worker pool under the name by which Lightning finds it and stops it when a fit ends or fails.

        Garbage collection would stop it too, but inside a reference cycle that takes 5 s per worker.
        """
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value

    def _batches(self, start: int) -> Iterator[Batch]:
        epoch = self.sampler.epoch
        self._plan.batches = [index_B.tolist() for index_B in self.sampler.batches(torch.device("cpu"))[start:]]
        for read in self._loader:
            if isinstance(read, EspalierError):
                raise read
            yield self.finish(read.to(self.device), epoch)


class _Plan:
    """The batches still to be read; the batch sampler of a DataLoader that is kept for many epochs."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Indexed(torch.utils.data.Dataset[Any]):
    """A reader whose batches carry the indices of their samples."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitems__(self, indices: list[int]) -> Batch | EspalierError:
        """Return the samples with their indices, or an `EspalierError` as a value.

        An error raised in a worker would arrive with its traceback as its message.
        """
        try:
            samples = self.reader.__getitems__(indices)
        except EspalierError as error:
            return error
        return Batch(samples.inputs, samples.targets, torch.tensor(indices, dtype=torch.int64))


def _unchanged(batch: Any) -> Any:
    """Return the batch as it is: `__getitems__` makes whole batches, so there is nothing to collate."""
    return batch
