"""Texts of your own with a class or a number each: a CSV, TSV or JSON-lines file."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from espalier.config.ranges import Count
from espalier.data import tokens
from espalier.data.loaders import Samples
from espalier.data.module import DataModule, Splits, class_counts
from espalier.data.splits import stratified
from espalier.data.table_file import Rows, read
from espalier.errors import ConfigError
from espalier.spec import OUTPUT, Cut, DataSpec, Input, Target

TEST_SHARE, VAL_SHARE = 0.20, 0.16
MAX_CLASSES = 100  # of a column of whole numbers; with more it is a quantity
LENGTH = "T"


class Text(DataModule):
    """Texts in one column of a file, and in another what is asked of them; splits are 64 / 16 / 20 %, stratified."""

    def __init__(
        self,
        path: str,
        text: str,
        target: str,
        task: Literal["auto", "class", "number"],
        cut: Cut,
        vocabulary: Count,
        longest: Count,
        batch_size: Count,
        seed: int,
    ) -> None:
        super().__init__(batch_size, seed, augment={})
        self.path = Path(path)
        self.text = text
        self.target = target
        self.task = task
        self.cut: Cut = cut
        self.vocabulary = vocabulary
        self.longest = longest

    def read(self) -> Rows:
        """Return the rows of the file, those without a text or an answer left out with a remark."""
        rows = read("data.path", self.path)
        rows.require("data.text", self.text)
        rows.require("data.target", self.target)
        kept = rows.without_empty((self.text, self.target))
        if left := len(rows) - len(kept):
            self.notes.append(f"{self.path.name}: {left} of {len(rows)} rows have no text or no answer; left out")
        return kept

    def load(self) -> Splits:
        rows = self.read()
        target, y_N = answers(rows, self.target, self.task, self.trained.target if self.trained else None)
        parts = stratified(y_N if target.kind == "classes" else torch.zeros(len(y_N)), [TEST_SHARE, VAL_SHARE])
        return self.encoded(rows.column(self.text), target, y_N, parts)

    def encoded(self, texts: Sequence[str], target: Target, y_N: Tensor, parts: Sequence[Tensor]) -> Splits:
        """Return splits of texts, `parts` being the places of test, validation and training samples.

        The vocabulary is that of the training texts, or that of the network that they are for.
        """
        test, val, train = parts
        known = self.trained.inputs[0].vocabulary if self.trained else None
        if known is None:
            known = tokens.vocabulary((texts[place] for place in train.tolist()), self.cut, self.vocabulary)
        entry = Input("tokens", "tokens", (LENGTH,), vocabulary=known, cut=self.cut)
        encode = tokens.Encoder(entry, self.longest)
        ids = [encode(text) for text in texts]
        target = of_training(target, y_N[train])
        seen = fingerprint([texts[place] for place in train.tolist()], y_N[train])
        spec = DataSpec(self.path.stem, (entry,), (target,), ((LENGTH, self.longest),), seen)
        x = torch.from_numpy(tokens.padded(ids))
        full = [text for text, row in zip(texts, ids, strict=True) if len(row) == self.longest]
        cut_off = sum(len(tokens.pieces(text, self.cut)) > self.longest for text in full)
        if cut_off:
            self.notes.append(
                f"{cut_off} of {len(texts)} texts are longer than {self.longest} {self.cut} and cut off there; "
                "data.longest=NUMBER takes more"
            )
        return Splits(spec, *(Samples(x[part], y_N[part]) for part in (train, val, test)))


def answers(
    rows: Rows, name: str, task: Literal["auto", "class", "number"], trained: Target | None
) -> tuple[Target, Tensor]:
    """Return the target that a column holds, and its values: classes (N,) int64, or numbers (N,) float32.

    A column is one of numbers if all values are, and if they are no small set of whole numbers. The target of a network
    that is `trained` decides for it.

    Raises:
        ConfigError: there is one class alone, or a value is no number.
    """
    values = rows.column(name)
    numbers = rows.numbers(name)
    if trained:
        task = "class" if trained.kind == "classes" else "number"
    if task == "number" and numbers is None:
        wrong = next(value for value in values if not rows.is_number(value))
        raise ConfigError(f"data.target={name}: {wrong!r} is no number; data.task=class takes the values as classes")
    is_whole = numbers is not None and all(value == int(value) for value in numbers)
    is_quantity = numbers is not None and (not is_whole or len(set(numbers)) > MAX_CLASSES)
    if task == "number" or (task == "auto" and is_quantity):
        assert numbers is not None
        return Target(OUTPUT, "numbers"), torch.tensor(numbers, dtype=torch.float32)
    names = sorted(set(values), key=lambda value: (float(value), "") if numbers is not None else (0.0, value))
    if trained and (unknown := sorted(set(names) - set(trained.names))):
        raise ConfigError(
            f"data.target={name}: {unknown[0]!r} is none of the classes of the network, {', '.join(trained.names)}"
        )
    names = list(trained.names) if trained else names
    if len(names) == 1:
        raise ConfigError(f"data.target={name}: every row says {names[0]!r}, so there is nothing to tell apart")
    places = {value: place for place, value in enumerate(names)}
    return Target(OUTPUT, "classes", tuple(names)), torch.tensor([places[value] for value in values])


def fingerprint(texts: Sequence[str], y_N: Tensor) -> str:
    """Return the hex digest of training texts and their answers, in their order."""
    content = json.dumps([texts, y_N.tolist()], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", errors="replace")).hexdigest()


def of_training(target: Target, y_N: Tensor) -> Target:
    """Return a target with what the training split says of it: class counts, or mean and standard deviation."""
    if target.kind == "classes":
        return Target(target.name, "classes", target.names, class_counts(y_N, len(target.names)))
    std = float(y_N.double().std(correction=0))
    return Target(target.name, "numbers", mean=float(y_N.double().mean()), std=std if std > 0 else 1.0)
