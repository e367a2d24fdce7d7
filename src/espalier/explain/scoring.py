"""Make the maps of one method for many samples, and measure them: one row of the report.

Letters: S samples, H height, W width, F features.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from espalier import seeding
from espalier.explain import base, quality
from espalier.explain.base import Setting
from espalier.explain.selection import Shown
from espalier.reporting import terminal

NUM_SANITY = 16  # samples whose maps are compared with those of a randomised network


def measure(name: str, model: nn.Module, shown: Shown, setting: Setting) -> tuple[Tensor, dict[str, Any]]:
    """Return the maps of one method, (S, H, W) or (S, F), and its row of the report.

    Seconds are the median, because the first sample of some methods waits for a compiler.
    """
    maps_S, seconds = attribute(name, model, shown, range(len(shown)), setting)
    metrics: dict[str, float] = {}
    method = base.method_named(name)
    references = {target: method.reference(model, target, setting) for target in set(shown.target.tolist())}
    reference_S = torch.tensor([value for value in map(references.get, shown.target.tolist()) if value is not None])
    if len(reference_S):
        output_S = shown.output.gather(1, shown.target[:, None])[:, 0]
        metrics["completeness_error"] = quality.completeness_error(maps_S.flatten(1).sum(dim=1), output_S, reference_S)
    compared = range(0, len(shown), -(-len(shown) // NUM_SANITY))
    blank = quality.randomised(model, setting.seed)
    blank_maps, _ = attribute(name, blank, shown, compared, setting)
    metrics["sanity"] = fmean(map(quality.rank_correlation, maps_S[list(compared)], blank_maps))
    if shown.kind.has_probabilities:
        metrics |= faithfulness(model, shown, maps_S, setting)
    return maps_S, {"name": name, "runtime": "torch", "metrics": metrics, "seconds_per_sample": median(seconds)}


def attribute(
    name: str, model: nn.Module, shown: Shown, places: Sequence[int], setting: Setting
) -> tuple[Tensor, list[float]]:
    """Return maps of the samples at these positions, and the seconds of each; a sample's seed follows its index."""
    console = terminal.console()
    maps: list[Tensor] = []
    seconds: list[float] = []
    for place in track(places, name, console=console, transient=True, disable=not console.is_terminal):
        start = perf_counter()
        own = replace(setting, seed=seeding.key(setting.seed, int(shown.index[place])))
        maps.append(base.attribute(name, model, shown.x[place], int(shown.target[place]), own))
        seconds.append(perf_counter() - start)
    return torch.stack(maps), seconds


def faithfulness(model: nn.Module, shown: Shown, maps_S: Tensor, setting: Setting) -> dict[str, float]:
    """Return the mean areas under the deletion and insertion curves."""
    areas = [
        quality.deletion_and_insertion(model, x, target, map_, setting.baseline, seeding.key(setting.seed, index))
        for x, target, map_, index in zip(shown.x, shown.target.tolist(), maps_S, shown.index.tolist(), strict=True)
    ]
    deletion, insertion = (fmean(values) for values in zip(*areas, strict=True))
    return {"deletion": deletion, "insertion": insertion}


def random_order(model: nn.Module, shown: Shown, setting: Setting) -> dict[str, float]:
    """Return the `faithfulness` of maps that rank positions at random, which a useful map has to beat."""
    constant_S = torch.stack([base.by_position(torch.zeros_like(x, device="cpu")) for x in shown.x])
    return faithfulness(model, shown, constant_S, setting)
