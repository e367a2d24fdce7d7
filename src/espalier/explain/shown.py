"""The samples that are explained: of each class some that the network gets right and some that it gets wrong.

Letters: N samples of a split, S samples that are explained, K outputs.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Order = Literal["confident", "unsure", "first"]


@dataclass(frozen=True)
class Shown:
    """The samples that are explained, by class and then as `choose` ordered them."""

    x: Tensor  # (S, *shape), normalised
    raw: Tensor
    y: Tensor
    index: Tensor  # of the split
    target: Tensor  # the output that is explained
    output: Tensor  # (S, K) of the network, on the CPU

    def __len__(self) -> int:
        return len(self.index)

    @property
    def has_classes(self) -> bool:
        """False for regression."""
        return not self.y.is_floating_point()


def choose(member_N: Tensor, is_wrong_N: Tensor, confidence_N: Tensor, num: int, order: Order) -> list[int]:
    """At most `num` of the samples `member_N` (positions in the other two), right ones first.

    A third of the places, at least one of two or more, is for wrong ones; where one kind is rare the other fills up.
    `confident` takes the highest confidence first, `unsure` the lowest, `first` the order of the split.
    """
    ranked = {"confident": -confidence_N, "unsure": confidence_N, "first": member_N}
    rank_N = ranked[order] if order == "first" else ranked[order][member_N]
    sorted_N = member_N[rank_N.argsort(stable=True)]
    wrong = sorted_N[is_wrong_N[sorted_N]].tolist()
    right = sorted_N[~is_wrong_N[sorted_N]].tolist()
    places = max(num // 3, 1) if num > 1 else 0
    num_wrong = min(len(wrong), max(places, num - len(right)))
    return right[: num - num_wrong] + wrong[:num_wrong]
