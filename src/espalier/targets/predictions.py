"""The answers of a network, sample by sample. Letters: N samples, K outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier.spec import DataSpec
from espalier.targets.kind import TargetKind
from espalier.targets.kinds import kind_of


@dataclass(frozen=True)
class Predictions:
    """The answers to some samples of a split, in the order of `index`."""

    spec: DataSpec
    index: Tensor  # (N,): of the sample in its split
    y: Tensor  # (N,): classes, or numbers of a regression
    output: Tensor  # (N, K), as the network gives it: logits, or numbers that are not yet in the unit of the target

    @property
    def kind(self) -> TargetKind:
        """Return what the answers mean."""
        return kind_of(self.spec)

    @property
    def predicted(self) -> Tensor:
        """Return the one answer to each sample, (N,): the most probable class, or the number in its unit."""
        return self.kind.predicted(self.output)

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, start: int, stop: int) -> "Predictions":
        """Return those from `start` up to `stop`."""
        part = slice(start, stop)
        return Predictions(self.spec, self.index[part], self.y[part], self.output[part])

    def columns(self, *, is_full: bool) -> dict[str, NDArray[Any]]:
        """Return them as columns of a file, by name; `is_full` adds one per output."""
        index_N, y_N, output_NK = (values.numpy() for values in (self.index, self.y, self.output))
        return {"index": index_N, "true": self.kind.true(y_N), **self.kind.columns(output_NK, is_full=is_full)}


def join(parts: Sequence[Predictions]) -> Predictions:
    """Put predictions one after the other; at least one part."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*((part.index, part.y, part.output) for part in parts), strict=True)
    return Predictions(parts[0].spec, *(torch.cat(values) for values in columns))
