"""Explained samples as figures: one per class, and an overview."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from espalier.explain.selection import Shown
from espalier.reporting import attributions
from espalier.reporting.attributions import Explained
from espalier.reporting.lettering import plain
from espalier.spec import DataSpec


def draw(spec: DataSpec, shown: Shown, maps: Mapping[str, Tensor], split: str, folder: Path) -> None:
    """Draw one figure per class, and `explain.png`: the first sample of each class, or for a table the mean of all."""
    kind, group_S = shown.kind, shown.kind.judge(shown.output, shown.y).group
    samples = [
        Explained(
            f"sample {int(shown.index[place])}\n{kind.caption(shown.output[place], shown.y[place])}",
            (shown.raw[place].float() / spec.scale).numpy(),
            {name: maps_S[place].numpy() for name, maps_S in maps.items()},
        )
        for place in range(len(shown))
    ]
    data = plain(spec.name)
    drawing = attributions.pictures if spec.is_image else attributions.bars
    groups: dict[int, list[Explained]] = {}
    for sample, number in zip(samples, group_S.tolist(), strict=True):
        groups.setdefault(number, []).append(sample)
    for number, group in groups.items():
        title = f"{data}, {split} split, {kind.titled(number)}"
        drawing(group, title, folder / f"explain_{_file_name(kind.groups, number)}.png")
    overview = [group[0] for group in groups.values()] if spec.is_image else samples
    drawing(overview, f"{data}, {split} split", folder / "explain.png")


def _file_name(names: Sequence[str], number: int) -> str:
    """Return the class name where a file can have it, and its number where that would not be one of its own."""
    plain = [re.sub(r"[^\w.-]+", "_", each) for each in names]
    own = plain[number]
    return own if plain.count(own) == 1 else f"{number}_{own}"
