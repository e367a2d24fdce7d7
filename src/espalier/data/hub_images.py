"""Any labelled image data set: from the Hugging Face hub by its id, or a local folder of images or parquet files.

Official splits are kept. Validation images come out of the training split if there is no official validation split,
test images likewise; both are stratified and the same for every run. All but a folder of classes needs the extra
`hub`. Every label and picture is looked at before anything is trained, and what was found is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from annotated_types import Gt, Lt
from torch import Tensor

from espalier.config.ranges import Count, Index
from espalier.data import image_reader, picture_folder, pictures
from espalier.data.augment import Augmentation
from espalier.data.image_reader import Files, ImageReader
from espalier.data.loaders import Reader, Samples
from espalier.data.module import DataModule, Splits, class_counts
from espalier.data.picture_folder import WORDS, shown, some
from espalier.data.picture_table import Table, choose, open_table
from espalier.data.splits import statistics, stratified
from espalier.errors import ConfigError
from espalier.spec import DataSpec

PartShare = Annotated[float, Gt(0), Lt(1)]
Broken = Literal["refuse", "skip"]  # what to do about pictures and labels that cannot be used
MAX_VALUE = 255
NUM_FOR_STATISTICS = 1024  # images, evenly spaced, that stand for a training split that does not fit in memory
NUM_LISTED = 10  # of what cannot be used
NUM_CLASSES_LISTED = 5


class Part(Protocol):
    """One official split, before its pictures are read."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the declared classes; empty if the data set has labels alone."""

    def __len__(self) -> int: ...

    def labels(self) -> Sequence[Any]: ...

    def pictures(self, places: Sequence[int]) -> Files: ...


@dataclass(frozen=True)
class Labelled:
    """Pictures of an official split with valid labels."""

    part: Part
    places: list[int]
    labels: list[Any]

    def some(self, chosen: Sequence[int]) -> "Labelled":
        """Return the pictures at the given positions."""
        return Labelled(self.part, [self.places[at] for at in chosen], [self.labels[at] for at in chosen])


class HubImages(DataModule):
    """Images (channels, image_size, image_size): the shorter side is scaled to size, then the middle square is cut out.

    `val_split` and `test_split` name official splits; None takes `validation` or `test` if there is one, else carves
    `val_share` or `test_share` out of the training split. `mean` and `std` None are measured on training images.
    Transparent pictures lie on `background`, a colour. `broken` pictures and labels end the run before it starts, or
    are left out.
    """

    def __init__(
        self,
        path: str,
        subset: str | None,
        image_column: str,
        label_column: str,
        train_split: str,
        val_split: str | None,
        test_split: str | None,
        val_share: PartShare,
        test_share: PartShare,
        channels: Literal[1, 3],
        image_size: Count,
        mean: list[float] | None,
        std: list[float] | None,
        in_memory: bool,
        num_workers: Index,
        batch_size: Count,
        augment: dict[str, Augmentation],
        seed: int,
        background: str,
        broken: Broken,
    ) -> None:
        super().__init__(batch_size, seed, augment, num_workers)
        _require_statistics(mean, std, channels)
        self.path = path
        self.subset = subset
        self.columns = (image_column, label_column)
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.val_share = val_share
        self.test_share = test_share
        self.shape = (channels, image_size, image_size)
        self.mean_and_std = (mean, std)
        self.in_memory = in_memory
        self.background = pictures.colour(background)
        self.broken = broken

    def load(self) -> Splits:
        official, left_out = self._open()
        bad: list[str] = []
        parts = self._divide(official, bad)
        names, values = self._classes(parts["train"])
        readers = {split: self._reader(part, split, values) for split, part in parts.items()}
        num_pictures = sum(map(len, readers.values())) + len(bad)
        splits: dict[str, Samples | Reader] = {}
        for split, reader in list(readers.items()):
            samples, found = reader.all() if self.in_memory else (None, reader.broken())
            bad += [f"{each.name}: {each.reason}" for each in found]
            readers[split] = rest = reader.without(found)
            splits[split] = image_reader.without(samples, found) if samples is not None else rest
        self._settle(bad, num_pictures)
        label_N = {split: reader.label_N for split, reader in readers.items()}
        self._require_samples(label_N)
        self.notes += self._remarks(names, label_N, left_out)
        spec = replace(self._spec(names, splits["train"], label_N["train"]), fingerprint=readers["train"].fingerprint())
        return Splits(spec, splits["train"], splits["val"], splits["test"])

    def _open(self) -> tuple[Mapping[str, Part], list[str]]:
        """Return all official splits by name, and remarks on the other content of a folder."""
        folder = Path(self.path).expanduser()
        found = picture_folder.find(str(folder)) if folder.is_dir() and self.subset is None else None
        if found is None:
            return open_table(self.path, self.subset, *self.columns), []
        return found.parts, found.remarks()

    def _divide(self, official: Mapping[str, Part], bad: list[str]) -> dict[str, Labelled]:
        """Return the training, validation and test split; a missing one is carved out of training."""
        train = self._chosen(official, self.train_split, "data.train_split", bad)
        test_name = self.test_split or ("test" if "test" in official else None)
        val_name = self.val_split or ("validation" if "validation" in official else None)
        if val_name == test_name and self.val_split is None:
            val_name = None  # the official validation split serves as test
        parts = {}
        for split, name, share in (("test", test_name, self.test_share), ("val", val_name, self.val_share)):
            if name is not None:
                parts[split] = self._chosen(official, name, f"data.{split}_split", bad)
            else:
                parts[split], train = self._carved(train, split, share)
        return {"train": train, "val": parts["val"], "test": parts["test"]}

    def _chosen(self, official: Mapping[str, Part], name: str, key: str, bad: list[str]) -> Labelled:
        """Return a split without the rows that have no valid label, which are added to `bad`."""
        known = WORDS.get(name.casefold(), name)  # a folder may be called Valid
        part = choose(official, name if name in official else known if known in official else name, key)
        if isinstance(part, Table):
            part.require_columns()
        places, labels = [], []
        for place, value in enumerate(part.labels()):
            label, problem = _label(value)
            if problem is None:
                places.append(place)
                labels.append(label)
            else:
                bad.append(f"{name} row {place}: {problem}")
        if any(isinstance(label, int) and label < 0 for label in labels):
            raise ConfigError(
                f"data.label_column={self.columns[1]}: a split has labels below 0, so none; name another split"
            )
        if not labels:
            self._settle(bad, len(bad))
            raise ConfigError(f"data.path={shown(self.path)}: the {name} split holds no picture with a label")
        return Labelled(part, places, labels)

    def _carved(self, train: Labelled, split: str, share: float) -> tuple[Labelled, Labelled]:
        """Return a stratified part of training, and the rest."""
        _, label_N = np.unique(train.labels, return_inverse=True)
        try:
            carved, rest = stratified(torch.from_numpy(label_N), [share])
        except ConfigError as error:
            raise ConfigError(f"data.path={shown(self.path)}: data.{split}_share={share}: {error}") from error
        return train.some(carved.tolist()), train.some(rest.tolist())

    def _classes(self, train: Labelled) -> tuple[tuple[str, ...], list[Any]]:
        """Return the names of the classes in the order of the model's outputs, and the labels that stand for them.

        Declared classes if the data set declares them, else the distinct labels of training, sorted.
        """
        names = train.part.class_names
        if names:
            values: list[Any] = list(range(len(names))) if isinstance(train.part, Table) else list(names)
        else:
            values = np.unique(train.labels).tolist()
            names = tuple(str(value) for value in values)
        if len(names) < 2:
            raise ConfigError(
                f"data.path={shown(self.path)}: one class alone, {shown(names[0])}; a classifier needs two"
            )
        return names, values

    def _reader(self, labelled: Labelled, split: str, values: Sequence[Any]) -> ImageReader:
        number_of = {value: number for number, value in enumerate(values)}
        unknown = sorted({str(value) for value in labelled.labels if value not in number_of})
        if unknown:
            raise ConfigError(
                f"data.path={shown(self.path)}: the {split} split has labels that training lacks: "
                f"{', '.join(unknown[:5])}; name another split with data.{split}_split"
            )
        label_N = torch.tensor([number_of[value] for value in labelled.labels], dtype=torch.int64)
        files = labelled.part.pictures(labelled.places)
        return ImageReader(files, label_N, self.shape, self.background, f"data.path={shown(self.path)}")

    def _settle(self, bad: Sequence[str], num_pictures: int) -> None:
        """Raise `ConfigError` for pictures or labels that cannot be used, or note that they are left out."""
        if not bad:
            return
        listed = some(bad, NUM_LISTED)
        if self.broken == "refuse":
            raise ConfigError(
                f"data.path={shown(self.path)}: {len(bad)} of {num_pictures} pictures cannot be used: {listed}; "
                "mend or remove them, or leave them out with data.broken=skip"
            )
        self.notes.append(f"left out by data.broken=skip: {len(bad)} of {num_pictures} pictures: {listed}")

    def _require_samples(self, label_N: Mapping[str, Tensor]) -> None:
        for split, label in label_N.items():
            if not len(label):
                raise ConfigError(f"data.path={shown(self.path)}: the {split} split holds no picture that can be used")

    def _remarks(self, names: Sequence[str], label_N: Mapping[str, Tensor], left_out: Sequence[str]) -> list[str]:
        """Return one line on what was found, and one on the classes that a split lacks."""
        present = {split: set(label.tolist()) for split, label in label_N.items()}
        sizes = [f"{split} {len(label)} of {len(present[split])}" for split, label in label_N.items()]
        sizes[0] = sizes[0].replace(" of ", " pictures of ") + " classes"
        said = ", ".join([sizes[0], *sizes[1:]])
        listed = some([shown(name) for name in names], NUM_CLASSES_LISTED)
        found = f"{shown(self.path)}: {len(names)} classes ({listed}); {said}"
        remarks = [f"{found}; left out: {', '.join(left_out)}" if left_out else found]
        lacking = [
            f"no {'training' if split == 'train' else split} picture of {some(missing, NUM_CLASSES_LISTED)}"
            for split in label_N
            if (missing := [shown(name) for number, name in enumerate(names) if number not in present[split]])
        ]
        if len(present["train"]) < len(names):
            lacking.append("a class without training pictures is an output that learns nothing")
        return [*remarks, *(["; ".join(lacking)] if lacking else [])]

    def _spec(self, names: tuple[str, ...], train: Samples | Reader, label_N: Tensor) -> DataSpec:
        mean, std = (tuple(values) if values is not None else () for values in self.mean_and_std)
        if isinstance(train, Samples):
            seen = train
        else:
            step = max(1, len(train) // NUM_FOR_STATISTICS)
            seen = train.__getitems__(list(range(0, len(train), step)))
            self.notes += self.constant(seen)
        if not mean:
            mean, std = statistics(seen.x, MAX_VALUE)
        return DataSpec.single(
            name=Path(self.path).stem,
            shape=self.shape,
            scale=float(MAX_VALUE),
            mean=mean,
            std=std,
            class_names=names,
            class_counts=class_counts(label_N, len(names)),
            background=self.background,
        )


def _label(value: Any) -> tuple[Any, str | None]:
    """Return a label as a class, or the reason why it is none."""
    if value is None or value != value:  # NaN is not
        return None, "no label"
    if isinstance(value, float):
        return (int(value), None) if isfinite(value) and value == int(value) else (None, f"the label {value:g}")
    if isinstance(value, list | dict | bytes):
        return None, f"the label {str(value)[:40]}"
    return value, None


def _require_statistics(mean: list[float] | None, std: list[float] | None, channels: int) -> None:
    if (mean is None) != (std is None):
        raise ValueError(f"data.mean={mean} and data.std={std}: give both or neither; null measures both")
    if mean is None or std is None:
        return
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"data.mean={mean} and data.std={std}: {channels} numbers each are needed, one per channel")
    if not all(map(isfinite, [*mean, *std])) or min(std) <= 0:
        raise ValueError(f"data.mean={mean} and data.std={std}: must be finite, and data.std above 0")
