"""The base of all data options: splits and their `DataSpec`, loaders with and without a Trainer."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from espalier import seeding
from espalier.data.augment import Augmentation
from espalier.data.loaders import Batch, BatchLoader, Loader, Order, Reader, Samples, StreamLoader
from espalier.data.splits import constant, require_finite
from espalier.data.transforms import NormaliseAll, Prepare
from espalier.spec import DataSpec

Split = Literal["train", "val", "test"]
Place = tuple[int, int, torch.device]  # rank and number of data-parallel processes, and the device of this one
SAMPLES_STREAM = 3  # keeps the choice of samples apart from other users of the seed


@dataclass(frozen=True)
class Splits:
    """The three splits of a data option, which share no sample, and the spec that its training split gives."""

    spec: DataSpec
    train: Samples | Reader
    val: Samples | Reader
    test: Samples | Reader


class DataModule(L.LightningDataModule):
    """The base of all data options; a subclass implements `load` and is built as `Target(**yaml, seed=seed)`.

    `batch_size` is per device. `seed` keys order and augmentation, never the splits. `augment` acts on training
    batches only, in the order of the dict, and is empty for tables.
    """

    def __init__(self, batch_size: int, seed: int, augment: Mapping[str, Augmentation], num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.num_workers = num_workers
        self.notes: list[str] = []  # what `load` has found, for the user and the report
        self.tested_split: Split = "test"  # what `Trainer.test` sees; evaluation may point it at another
        self.trained: DataSpec | None = None  # of the network that the samples are for, where there is one already
        self._training: Loader | None = None
        self._resumed: dict[str, Any] | None = None  # position of the training loader that will be asked for next

    @abstractmethod
    def load(self) -> Splits:
        """Read the data set; called once, at its first use."""

    @cached_property
    def splits(self) -> Splits:
        """Return all splits, read at the first use; add a remark to `notes` if values are constant in all samples.

        Raises:
            ConfigError: a value is NaN or infinite.
        """
        splits = self.load()
        for split in ("train", "val", "test"):
            samples = getattr(splits, split)
            if isinstance(samples, Samples):
                for part, what in ((samples.inputs, "samples"), (samples.targets, "targets")):
                    for values in part:
                        require_finite(values, f"{split} {what}")
        if isinstance(splits.train, Samples) and splits.spec.is_plain:
            self.notes += self.constant(splits.train)
        return splits

    def constant(self, train: Samples) -> list[str]:
        """Return remarks on channels, features, samples or targets that are constant and so teach nothing."""
        x, y = train.x, train.y
        if len(x) > 1 and torch.equal(x, x[:1].expand_as(x)):
            return [f"all {len(x)} training samples are the same, so nothing can be learnt from them"]
        remarks = []
        if numbers := constant(x):
            what = "channels" if x.ndim > 2 else "features"
            listed = ", ".join(map(str, numbers[:10])) + (" ..." if len(numbers) > 10 else "")
            remarks.append(f"constant in all training samples: {what} {listed}; they are only centred")
        if y.is_floating_point() and y.ndim == 1 and len(y) > 1 and bool((y == y[0]).all()):
            remarks.append(f"all training targets are {float(y[0]):g}, so nothing can be learnt from them")
        return remarks

    @property
    def spec(self) -> DataSpec:
        return self.splits.spec

    def train_dataloader(self) -> Loader:
        """Return the training batches in keyed order, augmented, in whole global batches only.

        A resumed run starts after the batches that it has done.
        """
        self._training = self._loader("train", self.batch_size, self._place(), is_training=True)
        if self._resumed:
            then, now = self._resumed.get("global_batch"), self._training.sampler.global_batch
            done = self._resumed["num_batches"] * then // now if then else self._resumed["num_batches"]
            self._training.load_state_dict({"epoch": self._resumed["epoch"], "num_batches": done})
            self._resumed = None
        return self._training

    def val_dataloader(self) -> Loader:
        return self.loader("val")

    def test_dataloader(self) -> Loader:
        return self.loader(self.tested_split)

    def loader(self, split: Split, batch_size: int | None = None, *, is_whole: bool = False) -> Loader:
        """Return a split as evaluation needs it: every sample once, in order, not augmented.

        Each rank gets its part, on its device; with `is_whole` this process gets all samples, on the CPU.
        """
        place = (0, 1, torch.device("cpu")) if is_whole else self._place()
        size = self.batch_size if batch_size is None else batch_size
        return self._loader(split, size, place, is_training=False)

    def normalise_as(self, trained: DataSpec) -> None:
        """Normalise with the statistics of the data that a network was trained on, not with those of the present data.

        The unit of raw values stays that of the present data.
        """
        pairs = zip(self.spec.inputs, trained.inputs, strict=True)
        inputs = tuple(replace(own, mean=other.mean, std=other.std) for own, other in pairs)
        target = replace(self.spec.target, mean=trained.target_mean, std=trained.target_std)
        self.splits = replace(self.splits, spec=replace(self.spec, inputs=inputs, targets=(target,)))

    def raw(self, split: Split, index_B: Tensor) -> Samples:
        """Return samples of a split as they were read, by their positions."""
        return pick(getattr(self.splits, split), index_B)

    def samples(self, num: int) -> Batch:
        """Return at most `num` random training samples, normalised, not augmented; each call and rank gets the same."""
        order_N = torch.randperm(len(self.splits.train), generator=seeding.generator(self.seed, SAMPLES_STREAM))
        index_B = order_N[:num]
        raw = self.raw("train", index_B)
        return Batch(NormaliseAll(self.spec, torch.device("cpu"))(raw.inputs), raw.targets, index_B)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training split.

        Lightning keeps the states of loaders as well, but has no chance to restore them once a learner has asked for
        the number of training steps: that builds the loaders before the checkpoint reaches them.
        """
        if self._training is None:
            return {}
        return {**self._training.state_dict(), "global_batch": self._training.sampler.global_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch as it is: loaders build it on the device, and Lightning's search for tensors takes time."""
        return batch if batch.index.device == device else batch.to(device)

    def _loader(self, split: Split, batch_size: int, place: Place, is_training: bool) -> Loader:
        data: Samples | Reader = getattr(self.splits, split)
        rank, world_size, device = place
        order = Order(len(data), batch_size, self.seed if is_training else None, rank, world_size)
        augment = list(self.augment.values()) if is_training else []
        finish = Prepare(self.spec, augment, self.seed, device)
        if not isinstance(data, Samples):
            return StreamLoader(data, order, finish, self.num_workers, device)
        on_device = Samples(tuple(x.to(device) for x in data.inputs), tuple(y.to(device) for y in data.targets))
        if augment:
            return BatchLoader(on_device, order, finish)
        normalise = NormaliseAll(self.spec, device)  # the same for each epoch, so once and for all
        return BatchLoader(Samples(normalise(on_device.inputs), on_device.targets), order, finish=None)

    def _place(self) -> Place:
        if self.trainer is None:
            return 0, 1, torch.device("cpu")
        sharding: dict[str, Any] = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return sharding["rank"], sharding["num_replicas"], self.trainer.strategy.root_device


def pick(data: Samples | Reader, index_B: Tensor) -> Samples:
    """Return raw samples by their positions in a split."""
    if isinstance(data, Samples):
        return Samples(tuple(x[index_B] for x in data.inputs), tuple(y[index_B] for y in data.targets))
    return data.__getitems__(index_B.tolist())


def class_counts(label_N: Tensor, num_classes: int) -> tuple[int, ...]:
    """Return samples of each class."""
    return tuple(label_N.bincount(minlength=num_classes).tolist())
