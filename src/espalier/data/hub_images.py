"""Any labelled image data set: of the Hugging Face hub by its id, or a local folder of images or parquet files.

Official splits are kept. Validation images come out of the training split where there is no official validation split,
test images likewise; both are stratified and the same for every run. Needs the extra `hub`.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Gt, Lt
from PIL import Image, ImageOps
from torch import Tensor

from espalier.data.augment import Augmentation
from espalier.data.loaders import Reader, Samples
from espalier.data.module import DataModule, Splits, class_counts
from espalier.data.splits import statistics, stratified
from espalier.errors import ConfigError, require
from espalier.ranges import Count, Index
from espalier.spec import DataSpec

PartShare = Annotated[float, Gt(0), Lt(1)]
MAX_VALUE = 255
DECODE = 1024  # images decoded at a time while a split is read into memory
NUM_FOR_STATISTICS = 1024  # images, evenly spaced, that stand for a training split that does not fit in memory


class HubImages(DataModule):
    """Images (channels, image_size, image_size); others are scaled to the shorter side and cut to the middle square.

    `val_split` and `test_split` name official splits; None takes `validation` or `test` if there is one, else carves
    `val_share` or `test_share` out of the training split. `mean` and `std` None are measured on training images.
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
    ) -> None:
        super().__init__(batch_size, seed, augment, num_workers)
        if (mean is None) != (std is None):
            raise ValueError(f"data.mean={mean} and data.std={std}: give both or neither; null measures both")
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

    def load(self) -> Splits:
        parts = self._divide(_open(self.path, self.subset))
        classes = _classes(parts["train"], self.columns[1])
        readers = {split: self._reader(part, classes, split) for split, part in parts.items()}
        splits: dict[str, Samples | Reader] = dict(readers)
        if self.in_memory:
            splits = {split: reader.all() for split, reader in readers.items()}
        spec = self._spec(classes.names, splits["train"], readers["train"].label_N)
        return Splits(spec, splits["train"], splits["val"], splits["test"])

    def _divide(self, official: Mapping[str, Any]) -> dict[str, Any]:
        """The official splits under our names; what is missing is carved out of training."""
        train = _choose(official, self.train_split, "data.train_split")
        test_name = self.test_split or ("test" if "test" in official else None)
        val_name = self.val_split or ("validation" if "validation" in official else None)
        if val_name == test_name and self.val_split is None:
            val_name = None  # the official validation split serves as test
        parts = {}
        for split, name, share in (("test", test_name, self.test_share), ("val", val_name, self.val_share)):
            if name is not None:
                parts[split] = _choose(official, name, f"data.{split}_split")
            else:
                _, label_N = np.unique(_labels(train, self.columns[1]), return_inverse=True)
                carved, rest = stratified(torch.from_numpy(label_N), [share])
                parts[split], train = train.select(carved.numpy()), train.select(rest.numpy())
        return {"train": train, **parts}

    def _reader(self, part: Any, classes: "Classes", split: str) -> "ImageReader":
        number_of = {value: number for number, value in enumerate(classes.values)}
        values = _labels(part, self.columns[1]).tolist()
        unknown = sorted({str(value) for value in values if value not in number_of})
        if unknown:
            raise ConfigError(
                f"data.path={self.path}: the {split} split has labels that training lacks: {', '.join(unknown[:5])}; "
                f"name another split with data.{split}_split"
            )
        images = _images(part, self.columns[0])
        return ImageReader(images, torch.tensor([number_of[value] for value in values]), self.shape)

    def _spec(self, names: tuple[str, ...], train: Samples | Reader, label_N: Tensor) -> DataSpec:
        mean, std = (tuple(values) if values is not None else () for values in self.mean_and_std)
        if not mean:
            step = max(1, len(train) // NUM_FOR_STATISTICS)
            seen = train if isinstance(train, Samples) else train.__getitems__(list(range(0, len(train), step)))
            mean, std = statistics(seen.x, MAX_VALUE)
        if len(mean) != self.shape[0] or len(std) != self.shape[0]:
            raise ValueError(
                f"data.mean and data.std need {self.shape[0]} numbers each, one per channel: {mean}, {std}"
            )
        return DataSpec(
            name=Path(self.path).stem,
            shape=self.shape,
            scale=float(MAX_VALUE),
            mean=mean,
            std=std,
            class_names=names,
            class_counts=class_counts(label_N, len(names)),
        )


class Classes(NamedTuple):
    """What the label column holds, in the order of the model's outputs, and how each class is called."""

    values: list[Any]
    names: tuple[str, ...]


class ImageReader:
    """Decodes images of one split, (C, S, S) uint8, when they are asked for."""

    def __init__(self, images: Any, label_N: Tensor, shape: tuple[int, int, int]) -> None:
        self.images = images
        self.label_N = label_N
        self.shape = shape

    def __len__(self) -> int:
        return len(self.label_N)

    def __getitems__(self, indices: list[int]) -> Samples:
        x = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        images = self.images[indices][self.images.column_names[0]] if indices else []
        for target, image in zip(x, images, strict=True):
            target.copy_(to_tensor(image, self.shape))
        return Samples(x, self.label_N[indices])

    def all(self) -> Samples:
        """The whole split."""
        starts = range(0, len(self), DECODE)
        parts = [self.__getitems__(list(range(start, min(start + DECODE, len(self))))) for start in starts]
        return Samples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


def to_tensor(image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """The middle of an image as (C, H, W) uint8, in grey for one channel and in RGB for three."""
    channels, height, width = shape
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)


def _open(path: str, subset: str | None) -> Mapping[str, Any]:
    """All official splits of a local folder, a parquet file or a data set of the hub, by their names.

    Raises:
        ConfigError: there is nothing at `path`, here or on the hub, or it holds no data set.
    """
    datasets = require("datasets", "hub")
    local = Path(path).expanduser()
    if not local.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1 or local.suffix == ".parquet"):
        raise ConfigError(f"data.path={path}: no such file or folder; give a folder, a parquet file or a hub id")
    try:
        if local.is_file():
            return dict(datasets.load_dataset("parquet", data_files=str(local)))
        return dict(datasets.load_dataset(str(local) if local.exists() else path, subset))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        where = "holds no data set" if local.exists() else "is neither a folder here nor to be had from the hub"
        raise ConfigError(f"data.path={path}: {where} ({reason}); give a folder, a parquet file or a hub id") from error


def _choose(official: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in official:
        raise ConfigError(f"{key}={name}: no such split{_nearest(name, official)}; there are {', '.join(official)}")
    return official[name]


def _labels(part: Any, column: str) -> np.ndarray:
    """The label column, without touching an image."""
    _check_column(part, column, "data.label_column")
    values: np.ndarray = part.with_format("numpy").select_columns([column])[:][column]
    if values.dtype.kind in "iu" and len(values) and values.min() < 0:
        raise ConfigError(f"data.label_column={column}: a split has labels below 0, so none; name another split")
    return values


def _classes(train: Any, column: str) -> Classes:
    """Declared classes if the data set declares them, else the distinct labels of training, sorted."""
    declared = getattr(train.features[column], "names", None)
    if declared:
        return Classes(list(range(len(declared))), tuple(declared))
    values = np.unique(_labels(train, column)).tolist()
    return Classes(values, tuple(str(value) for value in values))


def _images(part: Any, column: str) -> Any:
    """The image column alone; plain bytes are read as image files."""
    _check_column(part, column, "data.image_column")
    kind = require("datasets", "hub").Image
    alone = part.select_columns([column])
    if isinstance(alone.features[column], kind):
        return alone
    try:
        return alone.cast_column(column, kind())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"data.image_column={column}: holds no images but {part.features[column]}") from error


def _check_column(part: Any, column: str, key: str) -> None:
    if column not in part.column_names:
        columns = part.column_names
        raise ConfigError(f"{key}={column}: no such column{_nearest(column, columns)}; there are {', '.join(columns)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
