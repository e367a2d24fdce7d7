"""`espalier explain source=RUN`: show which parts of the input made a network answer as it does.

Letters: N samples of the split, S samples that are explained.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.config.ranges import Count, Positive
from espalier.data.module import Split
from espalier.data.transforms import Normalise
from espalier.errors import ConfigError
from espalier.evaluation.predictions import collect
from espalier.explain import base, conclusions, drawing, scoring
from espalier.explain.base import Setting
from espalier.explain.selection import Order, Output, Shown, class_numbers, select
from espalier.reporting.report import duration
from espalier.run import Run
from espalier.spec import Report

NUM_BACKGROUND = 64  # training samples


def explain(
    run: Run,
    method: Sequence[str] | None,
    split: Split,
    classes: Sequence[str] | None,
    samples: Count,
    order: Order,
    output: Output,
    baseline: Literal["mean", "zero"],
    patch: Count | None,
    layer: str | None,
    steps: Count,
    copies: Count,
    noise: Positive,
    evaluations: Count,
) -> Report:
    """Draw, save and measure attribution maps of some samples of each class.

    Measured are completeness, sanity and faithfulness.

    Raises:
        ConfigError: no source, a method that does not fit the network, a class without samples.
    """
    if run.source is None:
        raise ConfigError("source=null: explain needs the trained RUN that it looks into; try source=latest")
    names, spec = base.chosen(method), run.data.spec
    base.require_explained(spec)
    numbers, width = class_numbers(spec, classes), base.piece_width(spec, patch)
    model = run.model.to(run.trainer.strategy.root_device).eval().requires_grad_(False)
    shown, unshown = look_at(run, model, split, numbers, samples, order, output)
    setting = Setting(
        baseline=base.without_content(spec, baseline).to(shown.x),
        background=run.data.samples(NUM_BACKGROUND).x.to(shown.x),
        patch=width,
        layer=layer,
        steps=steps,
        copies=copies,
        noise=noise,
        evaluations=evaluations,
        batch_size=run.data.batch_size,
        seed=run.cfg.seed,
    )
    must_fit = method is not None or layer is not None
    settings, left_out = base.fitting(names, model, shown.x[0], setting, must_fit)
    run.record()
    maps, rows = measure(run, model, shown, settings)
    shown.save(maps, run.folder)
    drawing.draw(spec, shown, maps, split, run.folder / "figures")
    notes = [shown.describe(split, output, baseline), *unshown, *left_out, *conclusions.untrustworthy(rows)]
    if shown.kind.has_probabilities:
        areas = scoring.random_order(model, shown, setting)
        notes.append("in random order: " + ", ".join(f"{name} {area:.4f}" for name, area in areas.items()))
    return run.publish(rows, [*notes, *conclusions.caveats(spec, run.history)])


def look_at(
    run: Run, model: nn.Module, split: Split, numbers: Sequence[int], samples: int, order: Order, output: Output
) -> tuple[Shown, list[str]]:
    """Return the samples to explain, and remarks on the classes that are not shown."""
    spec, device = run.data.spec, run.trainer.strategy.root_device
    found = collect(lambda x: model(x.to(device)).cpu(), spec, run.data.loader(split, is_whole=True))
    index_S, notes = select(found, split, numbers, samples, order)
    raw = run.data.raw(split, index_S)
    x = Normalise(spec, torch.device("cpu"))(raw.x).to(device)
    explained_N = found.kind.explained(found.output, found.y, output)
    return Shown(found.kind, x, raw.x, raw.y, index_S, explained_N[index_S], found.output[index_S]), notes


def measure(
    run: Run, model: nn.Module, shown: Shown, settings: dict[str, Setting]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return maps and a row of the report per method."""
    maps: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for name, setting in settings.items():
        start = perf_counter()
        maps[name], row = scoring.measure(name, model, shown, setting)
        run.say(f"{name}: {len(shown)} samples, explained and checked in {duration(perf_counter() - start)}")
        rows.append(row)
    return maps, rows
