"""`espalier explain source=RUN`: which parts of the input made a network answer as it does.

Letters: N samples of the split, S samples that are explained, K outputs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from espalier.compression.base import Stage, stage_of
from espalier.config import nearest
from espalier.data.loaders import Samples
from espalier.data.module import DataModule, Split
from espalier.data.prepare import Normalise
from espalier.errors import ConfigError
from espalier.explain import base, drawing, measured, verdict
from espalier.explain.base import Setting
from espalier.explain.shown import Order, Shown, choose
from espalier.measure.report import duration
from espalier.ranges import Count, Positive
from espalier.run import Run
from espalier.spec import DataSpec, Report

FILE = "attributions.safetensors"
MAX_CLASSES = 10  # shown where nobody named some
NUM_BACKGROUND = 64  # training samples


def explain(
    run: Run,
    method: Sequence[str] | None,
    split: Split,
    classes: Sequence[str] | None,
    samples: Count,
    order: Order,
    output: Literal["predicted", "label"],
    baseline: Literal["mean", "zero"],
    patch: Count | None,
    layer: str | None,
    steps: Count,
    copies: Count,
    noise: Positive,
    evaluations: Count,
) -> Report:
    """Attribution maps of some samples of each class, drawn, saved, and measured: completeness, sanity, faithfulness.

    Raises:
        ConfigError: no source, a method that does not fit the network, a class without samples.
    """
    if run.source is None:
        raise ConfigError("source=null: explain needs the trained RUN that it looks into; try source=latest")
    names = (
        [name for name in base.methods() if base.is_default(name)] if method is None else list(dict.fromkeys(method))
    )
    base.check(names)
    spec, numbers = run.data.spec, class_numbers(run.data.spec, classes)
    width = piece_width(spec, patch)
    model = run.model.to(run.trainer.strategy.root_device).eval().requires_grad_(False)
    shown, notes = select(run, model, split, numbers, samples, order, output)
    setting = Setting(
        baseline=zero_or_mean(spec, baseline).to(shown.x),
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
    settings, left_out = fitting(names, model, shown.x[0], setting, must_fit=method is not None or layer is not None)
    run.record()
    maps: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for name, of_method in settings.items():
        start = perf_counter()
        maps[name], row = measured.measure(name, model, shown, of_method)
        run.say(f"{name}: {len(shown)} samples, explained and checked in {duration(perf_counter() - start)}")
        rows.append(row)
    save(shown, maps, run.folder / FILE)
    drawing.draw(spec, run.learner.predict(shown.output), shown, maps, split, run.folder / "figures")
    notes = [what_was_explained(run, shown, split, output, baseline), *notes, *left_out, *verdict.untrustworthy(rows)]
    if shown.has_classes:
        areas = measured.random_order(model, shown, setting)
        notes.append("in random order: " + ", ".join(f"{name} {area:.4f}" for name, area in areas.items()))
    return run.publish(rows, [*notes, *caveats(run)])


def select(
    run: Run,
    model: nn.Module,
    split: Split,
    numbers: Sequence[int],
    samples: int,
    order: Order,
    output: Literal["predicted", "label"],
) -> tuple[Shown, list[str]]:
    """The samples to explain, class by class, and remarks on the classes that are not shown.

    Raises:
        ConfigError: the split holds no sample of any of these classes.
    """
    spec, device = run.data.spec, run.trainer.strategy.root_device
    with torch.no_grad():
        parts = [(model(batch.x.to(device)).cpu(), batch.y) for batch in run.data.loader(split, is_whole=True)]
    output_NK, y_N = (torch.cat(part) for part in zip(*parts, strict=True))
    if spec.num_classes:
        confidence_N, predicted_N = output_NK.softmax(dim=1).max(dim=1)
        is_wrong_N, class_N = predicted_N != y_N, y_N
    else:
        error_N = (run.learner.predict(output_NK) - y_N).abs()
        predicted_N = class_N = torch.zeros(len(y_N), dtype=torch.long)
        is_wrong_N = error_N > error_N.median()
        confidence_N = torch.where(is_wrong_N, error_N, -error_N)  # the best of the good, the worst of the bad
    members = {number: (class_N == number).nonzero().flatten() for number in numbers}
    empty = [spec.class_names[number] for number, member_N in members.items() if not len(member_N)]
    if len(empty) == len(members):
        raise ConfigError(f"task.classes=[{','.join(empty)}]: the {split} split holds no sample; name other classes")
    chosen = [choose(member_N, is_wrong_N, confidence_N, samples, order) for member_N in members.values()]
    index_S = torch.tensor([place for places in chosen for place in places])
    target_S = (y_N if output == "label" and spec.num_classes else predicted_N)[index_S]
    raw = gather(run.data, split, index_S)
    x = Normalise(spec, torch.device("cpu"))(raw.x).to(device)
    notes = [f"no sample in the {split} split: {', '.join(empty)}"] if empty else []
    if len(numbers) < spec.num_classes:
        notes.append(f"{len(numbers)} of {spec.num_classes} classes; name others in task.classes")
    return Shown(x, raw.x, raw.y, index_S, target_S, output_NK[index_S]), notes


def class_numbers(spec: DataSpec, names: Sequence[str] | None) -> list[int]:
    """The classes to show; the one output of a regression counts as one.

    Raises:
        ConfigError: there is no such class.
    """
    if names is None:
        return list(range(min(spec.num_outputs, MAX_CLASSES)))
    key = f"task.classes=[{','.join(names)}]"
    if not spec.num_classes or not names:
        allowed = f"name some of the {spec.num_classes} classes" if spec.num_classes else "a regression has none"
        raise ConfigError(f"{key}: {allowed}, or say null")
    for name in names:
        if name not in spec.class_names:
            raise ConfigError(f"{key}: {spec.name} has no class {name}{nearest(name, spec.class_names)}")
    return [spec.class_names.index(name) for name in dict.fromkeys(names)]


def piece_width(spec: DataSpec, patch: int | None) -> int:
    """Pixels a side of what is taken away together.

    Raises:
        ConfigError: more than the image has, or no image.
    """
    if patch is None:
        return base.default_patch(spec.shape)
    if not spec.is_image:
        raise ConfigError(f"task.patch={patch}: {spec.name} is a table and loses one feature at a time; say null")
    if patch > min(spec.shape[1:]):
        raise ConfigError(f"task.patch={patch}: images are {spec.shape[1]} x {spec.shape[2]} pixels; choose fewer")
    return patch


def zero_or_mean(spec: DataSpec, name: Literal["mean", "zero"]) -> Tensor:
    """A normalised sample without content: raw zeros, or the mean of the training samples, which is 0 by definition."""
    mean = torch.zeros(spec.shape)
    return mean if name == "mean" else Normalise(spec, torch.device("cpu"))(mean)


def gather(data: DataModule, split: Split, index_S: Tensor) -> Samples:
    """Raw samples of a split by their positions."""
    stored = getattr(data.splits, split)
    if isinstance(stored, Samples):
        return Samples(stored.x[index_S], stored.y[index_S])
    return stored.__getitems__(index_S.tolist())


def fitting(
    names: Sequence[str], model: nn.Module, x: Tensor, setting: Setting, must_fit: bool
) -> tuple[dict[str, Setting], list[str]]:
    """Each method that fits the network with what it has to know of it; remarks on those that do not fit.

    Raises:
        ConfigError: a method does not fit although it must.
    """
    settings: dict[str, Setting] = {}
    notes = []
    for name in names:
        try:
            settings[name] = base.prepare(name, model, x, setting)
        except ConfigError as error:
            if must_fit:
                raise
            notes.append(f"{name} left out: {str(error).partition(': ')[2]}")
    return settings, notes + [f"{name} looks at {each.layer}" for name, each in settings.items() if each != setting]


def save(shown: Shown, maps: Mapping[str, Tensor], path: Path) -> None:
    """Samples, targets and maps as tensors, for whoever wants to go on with them."""
    tensors = {"x": shown.x.cpu(), "y": shown.y, "index": shown.index, "target": shown.target, "output": shown.output}
    tensors |= {f"map.{name}": maps_S for name, maps_S in maps.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def what_was_explained(run: Run, shown: Shown, split: str, output: str, baseline: str) -> str:
    """The first line below the table."""
    what = (
        {"predicted": "the predicted class", "label": "the true class"}[output] if shown.has_classes else "the output"
    )
    return f"{len(shown)} samples of the {split} split; explained: {what}; baseline: {baseline}; maps: {FILE}"


def caveats(run: Run) -> list[str]:
    """What was not explained as it is."""
    notes = []
    if any(stage_of(entry["method"]) == Stage.QUANTIZE for entry in run.ledger):
        notes.append(
            "integers have no gradients: the network was explained as trained, with simulated integers, "
            "whose steps integrated_gradients cannot sum exactly"
        )
    if not run.data.spec.is_image:
        notes.append("features are called x0, x1, ... in the order of the data, which names none")
    return notes
