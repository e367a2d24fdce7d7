"""Random commands that espalier takes, of small trainings, and what they start from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

OPTIMIZERS = ["adafactor", "adam", "adamw", "lamb", "lion", "momentum", "muon", "nesterov", "rmsprop", "sgd"]
SCHEDULERS = ["constant", "cosine", "one_cycle", "plateau", "step", "warmup_cosine", "warmup_stable_decay"]
SHIFTS = ["crop", "rotation", "cutout", "resized_crop", "rand_augment", "mixup", "cutmix", "flip"]
RECIPES = ("prune_magnitude", "qat", "prune_channels", "distill", "prune_channels,distill")
SOURCE = (  # what compress starts from
    *("train", "data=digits", "model=cnn", "model.channels=[8,8,8]", "model.hidden=[16]", "trainer.max_epochs=2"),
    *("trainer.limit_train_batches=12", "callbacks=[checkpoint]", "logger=[]", "strategy=cpu"),
)
PICTURES_PER_CLASS = 20
DATA = {  # the words, and the number of training samples
    "digits": (["data=digits"], 1151),
    "breast_cancer": (["data=breast_cancer"], 364),
    "diabetes": (["data=diabetes"], 282),
    "synthetic": (
        [
            *("data=synthetic_images", "data.height=8", "data.width=8", "data.num_classes=4"),
            *("data.num_train=150", "data.num_val=50", "data.num_test=40"),
        ],
        150,
    ),
    "pictures": (
        ["data=hub_images", "data.path={pictures}", "data.image_size=8", "data.channels=1", "data.in_memory=false"],
        140,
    ),
}


@dataclass
class Case:
    """A command, and what was drawn for it, by the name of the option."""

    words: list[str]
    drawn: dict[str, str] = field(default_factory=dict)
    num_ranks: int = 1
    draws: bool = False


class Length(NamedTuple):
    """Of a training: batches in an epoch, whole epochs, batches of one that is cut short."""

    num_batches: int
    num_epochs: int
    rest: int


class Draw:
    """Draws options for a case and writes down what it has drawn."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.case = Case([])

    def among(self, option: str, values: Any, *weights: float) -> Any:
        """One of them."""
        value = self.random.choices(list(values), weights or None)[0]
        self.case.drawn[option] = str(value)
        return value

    def chance(self, share: float) -> bool:
        """Whether it comes to pass."""
        return self.random.random() < share

    def say(self, *words: str) -> None:
        """Add words to the command."""
        self.case.words += words


def case(random: Random, pictures: Path, source: Path) -> Case:
    """Return a legal combination of everything that a training can be told."""
    draw = Draw(random)
    recipe = draw.among("recipe", ("none", *RECIPES), 12 * len(RECIPES), *([1] * len(RECIPES)))
    if recipe == "none":
        draw.say("train")
        num_samples, batch_size = _data(draw, pictures)
    else:
        draw.say("compress", f"source={source}", "task.batches=[1]", *_recipe(draw, recipe))
        num_samples, batch_size = DATA["digits"][1], 64
    draw.case.num_ranks = draw.among("ranks", (1, 2), 5, 1)
    draw.say("strategy=ddp_cpu" if draw.case.num_ranks == 2 else "strategy=cpu")
    length = _limits(draw, num_samples // (batch_size * draw.case.num_ranks))
    is_validated_within, validates = _validations(draw, length)
    _optimizer(draw, validates)
    _callbacks(draw, is_validated_within, validates)
    draw.say("logger=[csv]", f"trainer.log_every_n_steps={random.randint(1, 5)}", f"seed={random.randint(0, 99)}")
    draw.case.draws = draw.among("figures", (False, True), 5, 1)
    return draw.case


def _data(draw: Draw, pictures: Path) -> tuple[int, int]:
    """Return the number of training samples, and of those in a batch."""
    name = draw.among("data", DATA, 4, 3, 1, 3, 2)
    words, num_samples = DATA[name]
    batch_size = draw.random.choice({"digits": (31, 64), "pictures": (8, 13)}.get(name, (16, 29)))
    draw.say(*(word.format(pictures=pictures) for word in words), f"data.batch_size={batch_size}")
    is_image = name not in ("breast_cancer", "diabetes")
    if name == "pictures":
        draw.say(f"data.num_workers={draw.among('workers', (0, 2))}")
    if is_image:
        names = [each for each in (*SHIFTS, *(["colour_jitter"] if name == "synthetic" else [])) if draw.chance(0.25)]
        draw.say(f"data/augment=[{','.join(names)}]")
        draw.case.drawn |= {f"augment {each}": "on" for each in names}
    _model(draw, is_image)
    if name != "diabetes":
        if draw.among("label smoothing", (0.0, 0.1), 4, 1):
            draw.say("learner.label_smoothing=0.1")
        if draw.among("class weights", ("none", "balanced"), 4, 1) == "balanced":
            draw.say("learner.class_weights=balanced")
    draw.say(f"trainer.precision={draw.among('precision', ('32-true', 'bf16-mixed'), 4, 1)}")
    return num_samples, batch_size


def _model(draw: Draw, is_image: bool) -> None:
    models: dict[str, Callable[[], list[str]]] = {
        "mlp": lambda: ["model.hidden=[12]", f"model.norm={draw.random.choice(('none', 'batch', 'layer', 'rms'))}"],
        "cnn": lambda: ["model.channels=[4,6]", "model.hidden=[8]"],
        "vit": lambda: ["model.patch=4", "model.width=8", "model.depth=1", "model.heads=2"],
        "resnet": lambda: ["model.depth=8", "model.width=4"],
        "densenet": lambda: ["model.depth=[1,1]", "model.growth=4"],
    }
    name = draw.among("model", models if is_image else ["mlp"], *([6, 3, 3, 1, 1] if is_image else [1]))
    draw.say(f"model={name}", *models[name](), f"model.dropout={draw.among('dropout', (0.0, 0.2))}")


def _recipe(draw: Draw, recipe: str) -> list[str]:
    words = [f"compression=[{recipe}]"]
    if recipe == "prune_magnitude":
        words += ["compression.prune_magnitude.every_n_steps=2"]
    if "prune_channels" in recipe:
        words += ["compression.prune_channels.round_to=4"]
    return words


def _limits(draw: Draw, num_all: int) -> Length:
    """How long to train, and on how much."""
    num_batches = num_all
    kind = draw.among("limit_train_batches", ("all", "count", "share"), 1 if num_all < 15 else 0, 3, 1)
    if kind == "count":
        num_batches = draw.random.randint(2, min(9, num_all))
        draw.say(f"trainer.limit_train_batches={num_batches}")
    if kind == "share":
        share = round(draw.random.uniform(min(1.0, 2.1 / num_all), min(1.0, 9 / num_all)), 3)
        num_batches = int(num_all * share)
        draw.say(f"trainer.limit_train_batches={share}")
    for split in ("val", "test"):
        limit = draw.among(f"limit_{split}_batches", ("1.0", "1", "2", "0.5"), 3, 1, 1, int(num_all >= 14))
        if limit != "1.0":
            draw.say(f"trainer.limit_{split}_batches={limit}")
    accumulated = draw.among("accumulate_grad_batches", (1, 2, 3), 3, 1, 1)
    if accumulated > 1:
        draw.say(f"trainer.accumulate_grad_batches={accumulated}")
    num_epochs, steps_per_epoch = draw.random.randint(2, 4), -(-num_batches // accumulated)
    num_steps = draw.random.randint(2, num_epochs * steps_per_epoch)
    ends = {
        "epochs": [f"trainer.max_epochs={num_epochs}"],
        "steps": ["trainer.max_epochs=-1", f"trainer.max_steps={num_steps}"],
        "both": [f"trainer.max_epochs={num_epochs}", f"trainer.max_steps={num_steps}"],
    }
    end = draw.among("end", ends, 3, 1, 1)
    draw.say(*ends[end])
    if end == "epochs":
        return Length(num_batches, num_epochs, 0)
    num_whole, rest = divmod(num_steps, steps_per_epoch)
    return Length(num_batches, num_whole, rest * accumulated)


def _validations(draw: Draw, length: Length) -> tuple[bool, bool]:
    """Whether there may be several in an epoch, and whether there is one at all."""
    num_batches = length.num_batches
    every = draw.among("check_val_every_n_epoch", (1, 2, 3, "null"), 12, 3, 1, 2)
    if every != 1:
        draw.say(f"trainer.check_val_every_n_epoch={every}")
    kind = draw.among("val_check_interval", ("1.0", "count", "share"), 4, 2, 1) if every != "null" else "of all"
    interval: float = num_batches
    if kind == "count":
        interval = draw.random.randint(1, num_batches)
    if kind == "share":
        interval = draw.random.choice((0.5, 0.34)) if num_batches > 2 else 0.5
    if kind == "of all":
        interval = draw.random.randint(1, 2 * num_batches)
        validates = interval <= length.num_epochs * num_batches + length.rest
    else:
        num_first = interval if isinstance(interval, int) else int(interval * num_batches)
        validates = length.num_epochs >= every or (length.num_epochs + 1 == every and length.rest >= num_first)
    if kind != "1.0":
        draw.say(f"+trainer.val_check_interval={interval}")
    return kind != "1.0", validates


def _optimizer(draw: Draw, validates: bool) -> None:
    schedulers = [name for name in SCHEDULERS if validates or name != "plateau"]
    draw.say(f"optimizer={draw.among('optimizer', OPTIMIZERS)}", f"scheduler={draw.among('scheduler', schedulers)}")
    if draw.case.drawn["scheduler"] == "plateau":
        draw.say("scheduler.patience=0", "scheduler.threshold=0.3")
    clip = draw.among("gradient_clip_val", ("1.0", "0.1", "null"), 3, 1, 1)
    if clip != "1.0":
        draw.say(f"trainer.gradient_clip_val={clip}")


def _callbacks(draw: Draw, is_validated_within: bool, validates: bool) -> None:
    names = ["checkpoint"]
    follows_no_plan = draw.case.drawn["recipe"] in ("none", "prune_channels")  # which an early end would cut short
    stops_early = 0.3 * (validates and follows_no_plan)
    chances = {"monitor": 0.7, "ema": 0.35, "early_stopping": stops_early, "progress": 0.1, "summary": 0.1}
    for name, share in chances.items():
        if draw.chance(share):
            names.append(name)
            draw.case.drawn[f"callback {name}"] = "on"
    draw.say(f"callbacks=[{','.join(names)}]")
    if "ema" in names:
        draw.say("callbacks.ema.decay=0.8", f"callbacks.ema.every_n_steps={draw.random.choice((1, 1, 2, 3))}")
    if "early_stopping" in names:
        patience, least = draw.random.choice((1, 1, 2)), draw.random.choice((0.0, 0.02, 0.3))
        draw.say(f"callbacks.early_stopping.patience={patience}", f"callbacks.early_stopping.min_delta={least}")
    _checkpoints(draw, is_validated_within)


def _checkpoints(draw: Draw, is_validated_within: bool) -> None:
    """Of which kind, and how often."""
    settings: dict[str, Any] = {}
    kept = draw.among("save_top_k", (1, 2, 3, -1, 0), 6, 2, 2, 2, 1)
    if kept != 1:
        settings |= {"save_top_k": kept}
    if kept not in (0, 1) or draw.chance(0.2):
        settings |= {"filename": "'best-{epoch}-{step}'" if is_validated_within else "'best-{epoch}'"}
    if (every := draw.among("every_n_epochs", (1, 2, 3), 6, 1, 1)) != 1:
        settings |= {"every_n_epochs": every}
    if not draw.among("save_last", (True, False), 12, 1):
        settings |= {"save_last": "false"}
    elif draw.among("last within an epoch", ("no", "steps", "minutes"), 2, 3, 1) == "steps":
        settings |= {"every_n_steps": draw.random.choice((1, 2, 3, 5))}
    elif draw.case.drawn["last within an epoch"] == "minutes":
        settings |= {"every_n_minutes": "1e-9"}
    if draw.among("asynchronous", (False, True), 3, 1):
        settings |= {"asynchronous": "true"}
    draw.say(*(f"callbacks.checkpoint.{name}={value}" for name, value in settings.items()))


def write_pictures(folder: Path) -> None:
    """Digits as picture files, a folder per class."""
    pixels, labels = load_digits(return_X_y=True)
    for number in range(10):
        place = folder / str(number)
        place.mkdir(parents=True)
        for index, picture in enumerate(pixels[labels == number][:PICTURES_PER_CLASS]):
            grey = (picture.reshape(8, 8) * 15.9).astype(np.uint8)
            Image.fromarray(grey).save(place / f"{index}.png")
