"""The samples that are explained: of each class some that the network gets right and some that it gets wrong.

Letters: N samples of a split, S samples that are explained, K outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from espalier.config.hints import nearest
from espalier.errors import ConfigError
from espalier.spec import DataSpec
from espalier.targets.kind import TargetKind
from espalier.targets.kinds import kind_of
from espalier.targets.predictions import Predictions

FILE = "attributions.safetensors"
MAX_CLASSES = 10  # shown where nobody named some

Output = Literal["predicted", "label"]
Order = Literal["confident", "unsure", "first"]


@dataclass(frozen=True)
class Shown:
    """The samples to explain, class by class, within a class as `choose` ordered them."""

    kind: TargetKind  # what the answers mean
    x: Tensor  # (S, *shape), normalised
    raw: Tensor
    y: Tensor
    index: Tensor  # of the split
    target: Tensor  # the output that is explained
    output: Tensor  # (S, K) of the network, on the CPU

    def __len__(self) -> int:
        return len(self.index)

    def save(self, maps: Mapping[str, Tensor], folder: Path) -> None:
        """Save samples, targets and maps as tensors in `FILE`, for whoever wants to go on with them."""
        tensors = {"x": self.x.cpu(), "y": self.y, "index": self.index, "target": self.target, "output": self.output}
        tensors |= {f"map.{name}": maps_S for name, maps_S in maps.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)

    def describe(self, split: str, output: Output, baseline: str) -> str:
        """Return the first line below the table."""
        return (
            f"{len(self)} samples of the {split} split; explained: {self.kind.named(output)}; baseline: {baseline}; "
            f"maps: {FILE}"
        )


def class_numbers(spec: DataSpec, names: Sequence[str] | None) -> list[int]:
    """Return the classes to show; the one output of a regression counts as one.

    Raises:
        ConfigError: there is no such class.
    """
    if names is None:
        return list(range(min(len(kind_of(spec).groups), MAX_CLASSES)))
    key = f"task.classes=[{','.join(names)}]"
    if not spec.class_names or not names:
        allowed = f"name some of the {len(spec.class_names)} classes" if spec.class_names else "a regression has none"
        raise ConfigError(f"{key}: {allowed}, or say null")
    for name in names:
        if name not in spec.class_names:
            raise ConfigError(f"{key}: {spec.name} has no class {name}{nearest(name, spec.class_names)}")
    return [spec.class_names.index(name) for name in dict.fromkeys(names)]


def select(found: Predictions, split: str, numbers: Sequence[int], num: int, order: Order) -> tuple[Tensor, list[str]]:
    """Return positions in `found`, at most `num` of each class, class by class; and remarks on classes left out.

    Raises:
        ConfigError: the split holds no sample of any of these classes.
    """
    judged, groups = found.kind.judge(found.output, found.y), found.kind.groups
    members = {number: (judged.group == number).nonzero().flatten() for number in numbers}
    empty = [groups[number] for number, member_N in members.items() if not len(member_N)]
    if len(empty) == len(members):
        raise ConfigError(f"task.classes=[{','.join(empty)}]: the {split} split holds no sample; name other classes")
    chosen = [choose(member_N, judged.is_wrong, judged.confidence, num, order) for member_N in members.values()]
    notes = [f"no sample in the {split} split: {', '.join(empty)}"] if empty else []
    if len(numbers) < len(groups):
        notes.append(f"{len(numbers)} of {len(groups)} classes; name others in task.classes")
    return torch.tensor([place for places in chosen for place in places]), notes


def choose(member_N: Tensor, is_wrong_N: Tensor, confidence_N: Tensor, num: int, order: Order) -> list[int]:
    """Return at most `num` of the samples `member_N` (positions in the other two), correct ones first.

    A third of them, at least one of two or more, are wrong ones; if one kind is rare, the other fills up. `confident`
    takes the highest confidence first, `unsure` the lowest, `first` the order of the split.
    """
    ranked = {"confident": -confidence_N, "unsure": confidence_N, "first": member_N}
    rank_N = ranked[order] if order == "first" else ranked[order][member_N]
    sorted_N = member_N[rank_N.argsort(stable=True)]
    wrong = sorted_N[is_wrong_N[sorted_N]].tolist()
    right = sorted_N[~is_wrong_N[sorted_N]].tolist()
    places = max(num // 3, 1) if num > 1 else 0
    num_wrong = min(len(wrong), max(places, num - len(right)))
    return right[: num - num_wrong] + wrong[:num_wrong]
