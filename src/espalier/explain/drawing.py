"""Explained samples as figures: one per class, and an overview."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from espalier.explain.selection import Shown
from espalier.reporting import attributions
from espalier.reporting.attributions import Explained
from espalier.reporting.lettering import plain
from espalier.spec import DataSpec


def draw(spec: DataSpec, predicted: Tensor, shown: Shown, maps: Mapping[str, Tensor], split: str, folder: Path) -> None:
    """One figure per class, and `explain.png`: the first sample of each class, or for a table the mean of all."""
    samples = [
        Explained(
            _label(spec, shown, predicted, place),
            (shown.raw[place].float() / spec.scale).numpy(),
            {name: maps_S[place].numpy() for name, maps_S in maps.items()},
        )
        for place in range(len(shown))
    ]
    data = plain(spec.name)
    drawing = attributions.pictures if spec.is_image else attributions.bars
    groups: dict[int, list[Explained]] = {}
    for sample, y in zip(samples, shown.y.tolist(), strict=True):
        groups.setdefault(y if spec.num_classes else 0, []).append(sample)
    for number, group in groups.items():
        name = spec.class_names[number] if spec.num_classes else "output"
        title = f"{data}, {split} split, " + (f"true class {attributions.short(name)}" if spec.num_classes else name)
        drawing(group, title, folder / f"explain_{_file_name(name, number, spec)}.png")
    overview = [group[0] for group in groups.values()] if spec.is_image else samples
    drawing(overview, f"{data}, {split} split", folder / "explain.png")


def _label(spec: DataSpec, shown: Shown, predicted: Tensor, place: int) -> str:
    number, y = int(shown.index[place]), shown.y[place]
    if not spec.num_classes:
        return f"sample {number}\ntrue {float(y):.4g}\nsays {float(predicted[place]):.4g}"
    probability, says = shown.output[place].softmax(dim=0).max(dim=0)
    names = [attributions.short(spec.class_names[int(each)]) for each in (y, says)]
    return f"sample {number}\ntrue {names[0]}\nsays {names[1]}\nat {float(probability):.1%}"


def _file_name(name: str, number: int, spec: DataSpec) -> str:
    """Return the class name where a file can have it, and its number where that would not be one of its own."""
    plain = [re.sub(r"[^\w.-]+", "_", each) for each in spec.class_names or (name,)]
    own = plain[number]
    return own if plain.count(own) == 1 else f"{number}_{own}"
