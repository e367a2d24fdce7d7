"""The contract of a kind of target: all that training, measuring, explaining and serving know about an answer.

What serving uses is numpy alone; torch is imported where a method needs it. Letters: N samples, K outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from espalier.spec import DataSpec

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from torchmetrics import Metric, MetricCollection

    from espalier.targets.predictions import Predictions

Raw = Callable[["Tensor"], "Tensor"]  # positions (N,) in a split to raw samples (N, *shape)


class Judged(NamedTuple):
    """Answers sorted into groups and into right and wrong ones, each of shape (N,)."""

    group: "Tensor"  # place in `groups`
    is_wrong: "Tensor"
    confidence: "Tensor"  # the higher, the more typical of right or of wrong answers


class TargetKind(ABC):
    """The meaning of the answers that a network gives to samples of some data."""

    word: ClassVar[str]  # what the targets are, in the plural
    learner: ClassVar[str]  # the option that trains for them
    monitor: ClassVar[str]  # the validation metric that decides which checkpoint is best
    mode: ClassVar[Literal["min", "max"]]
    statistics: ClassVar[tuple[str, ...]]  # of a training, each summed over the samples of an epoch
    has_probabilities: ClassVar[bool]

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    # What is said of it.

    @property
    @abstractmethod
    def said(self) -> str:
        """Say how many outputs there are, of what."""

    @property
    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """Name the groups that samples are shown in."""

    # With numpy alone: what a server, a file and a program get.

    @abstractmethod
    def answer(self, output_NK: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what a user reads, (N, K), of what a network says."""

    @abstractmethod
    def reply(self, values: Sequence[float], best: int) -> dict[str, Any]:
        """Return the answer to one sample as JSON has it; `best` is the place of the largest of its values."""

    @abstractmethod
    def true(self, y_N: NDArray[Any]) -> NDArray[Any]:
        """Return targets as a file has them."""

    @abstractmethod
    def columns(self, output_NK: NDArray[np.float32], *, is_full: bool) -> dict[str, NDArray[Any]]:
        """Return the answers as columns of a file, by name; `predicted` is one, and `is_full` adds one per output."""

    @abstractmethod
    def score(self, parts: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, float]:
        """Return metrics of the columns `true` and `predicted` of some files together."""

    # With torch: what a training and its measurements use.

    @abstractmethod
    def predicted(self, output: "Tensor") -> "Tensor":
        """Return the one answer to each sample, (N,), as targets are given."""

    @abstractmethod
    def measured(self, output: "Tensor") -> "Tensor":
        """Return what the metrics compare with the targets."""

    @abstractmethod
    def sums(self, output: "Tensor", y: "Tensor", loss: "Tensor") -> "Tensor":
        """Return one number per name in `statistics`, summed over the batch, then the batch size."""

    @abstractmethod
    def metrics(self, split: str) -> "dict[str, Metric | MetricCollection]":
        """Return fresh metrics by name, to be updated with (`measured(output)`, y); more of them for `test`."""

    @abstractmethod
    def num_same(self, ours_NK: "Tensor", theirs_NK: "Tensor") -> int:
        """Count the samples to which two networks give the same label; all, where there are no labels."""

    @abstractmethod
    def distance(self, student_NK: "Tensor", teacher_NK: "Tensor", temperature: float) -> "Tensor":
        """Return how far a student is from its teacher, scalar."""

    # What is looked at: tables, figures, explanations.

    @abstractmethod
    def draw(self, tables: Mapping[str, "Tensor"], folder: Path) -> None:
        """Draw those metrics of a test that are tables, by name, into the folder `figures` of a run."""

    @abstractmethod
    def report_errors(self, found: "Predictions", raw: Raw, folder: Path) -> Iterator[str]:
        """Draw and write into the folder of a run where the network errs; yield what a reader must know, in words."""

    @abstractmethod
    def table(self, found: "Predictions") -> "Table | None":
        """Return what is printed beside the report, if anything is."""

    @abstractmethod
    def judge(self, output_NK: "Tensor", y_N: "Tensor") -> Judged:
        """Sort answers into groups, and right ones from wrong ones."""

    @abstractmethod
    def explained(self, output_NK: "Tensor", y_N: "Tensor", which: Literal["predicted", "label"]) -> "Tensor":
        """Return the place of the output that is explained for each sample, (N,)."""

    @abstractmethod
    def named(self, which: Literal["predicted", "label"]) -> str:
        """Say which output is explained."""

    @abstractmethod
    def caption(self, output_K: "Tensor", y: "Tensor") -> str:
        """Return the lines below a sample that say what is true, and what the network says."""

    @abstractmethod
    def titled(self, group: int) -> str:
        """Return what a figure of one group is called."""
