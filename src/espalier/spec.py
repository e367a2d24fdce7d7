"""The values that travel: `DataSpec` forwards into the model, `Entry` with its weights, `Report` out of the run."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

Entry = dict[str, Any]  # what one method of compression did to a network: "method" and plain values


Axis = int | str  # a size, or a letter: a length that differs between samples
INPUT, OUTPUT = "input", "logits"  # of a network that takes one tensor and gives one
PAD, UNKNOWN, FIRST = 0, 1, 2  # ids of tokens: what follows a text, what the vocabulary lacks, its first one
Cut = Literal["words", "characters", "bytes"]  # how a text becomes tokens


@dataclass(frozen=True)
class Input:
    """One tensor of a sample: an argument of `forward`, an input of the exported file, a key of a request.

    Images and numbers become `(raw / scale - mean) / std`; tokens stay integers, of which 0 pads and 1 is unknown.
    """

    name: str
    kind: Literal["image", "numbers", "tokens"]
    shape: tuple[Axis, ...]  # of one sample: (channels, height, width), (features,) or ("T",)
    scale: float = 1.0  # raw value that maps to 1.0: 255 for 8-bit images
    mean: tuple[float, ...] = (0.0,)  # of scaled training values, per channel or per feature
    std: tuple[float, ...] = (1.0,)
    background: tuple[int, ...] = (0, 0, 0)  # red, green and blue under what is transparent in a picture file
    vocabulary: tuple[str, ...] = ()  # of tokens, from id 2 on
    cut: Cut = "words"

    @property
    def is_tokens(self) -> bool:
        """Return whether its values are ids, which are neither scaled nor normalised."""
        return self.kind == "tokens"


@dataclass(frozen=True)
class Target:
    """One tensor of an answer."""

    name: str
    kind: Literal["classes", "numbers"]
    names: tuple[str, ...] = ()  # of the classes
    counts: tuple[int, ...] = ()  # training samples per class, for class weights
    mean: float = 0.0  # numbers: the network gives (y - mean) / std
    std: float = 1.0


@dataclass(frozen=True)
class DataSpec:
    """The inputs of one sample, and the targets that are asked of it.

    Model, metrics, checkpoint, export and server all take their sizes from here, so no size is configured twice.
    `shape`, `class_names` and the like are those of the only input and of the only target.
    """

    name: str
    inputs: tuple[Input, ...]
    targets: tuple[Target, ...]
    longest: tuple[tuple[str, int], ...] = ()  # the largest length of each letter in a shape
    fingerprint: str = ""  # of which samples the training split holds, in which order; empty where nobody took it

    @classmethod
    def single(
        cls,
        name: str,
        shape: tuple[int, ...],
        scale: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        class_names: tuple[str, ...] = (),
        class_counts: tuple[int, ...] = (),
        target_mean: float = 0.0,
        target_std: float = 1.0,
        background: tuple[int, ...] = (0, 0, 0),
        fingerprint: str = "",
    ) -> "DataSpec":
        """Return the spec of one tensor of numbers per sample, an image if it has three axes, and of one target.

        The target is one of `class_names`; without any it is a number.
        """
        taken = Input(INPUT, "image" if len(shape) == 3 else "numbers", shape, scale, mean, std, background)
        given = Target(
            OUTPUT, "classes" if class_names else "numbers", class_names, class_counts, target_mean, target_std
        )
        return cls(name, (taken,), (given,), fingerprint=fingerprint)

    @property
    def input(self) -> Input:
        """Return the only input.

        Raises:
            ValueError: there are several.
        """
        return _only(self.inputs, f"{self.name}: several inputs")

    @property
    def target(self) -> Target:
        """Return the only target.

        Raises:
            ValueError: there are several.
        """
        return _only(self.targets, f"{self.name}: several targets")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.input.shape  # type: ignore[return-value]  # letters are for those who ask for inputs

    @property
    def scale(self) -> float:
        return self.input.scale

    @property
    def mean(self) -> tuple[float, ...]:
        return self.input.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.input.std

    @property
    def background(self) -> tuple[int, ...]:
        return self.input.background

    @property
    def is_image(self) -> bool:
        """Return whether a sample is one picture and nothing else."""
        return len(self.inputs) == 1 and self.inputs[0].kind == "image"

    @property
    def is_plain(self) -> bool:
        """Return whether a sample is one tensor of numbers of a fixed shape."""
        return len(self.inputs) == 1 and not self.inputs[0].is_tokens and self.inputs[0].name == INPUT

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.target.names

    @property
    def class_counts(self) -> tuple[int, ...]:
        return self.target.counts

    @property
    def target_mean(self) -> float:
        return self.target.mean

    @property
    def target_std(self) -> float:
        return self.target.std

    @property
    def num_classes(self) -> int:
        """Return the number of classes; 0 for regression."""
        return len(self.class_names)

    @property
    def num_outputs(self) -> int:
        """Return the width of the model's last layer: one logit per class, or one number for regression."""
        return self.num_classes or 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only, as checkpoints and bundles store them; the arguments of `single` where it can be."""
        if self.is_plain:
            names = inspect.signature(DataSpec.single).parameters
            return {name: _plain(getattr(self, name)) for name in names}
        return {**_plain(asdict(self)), "longest": dict(self.longest)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "DataSpec":
        """Return the spec of which `to_dict` made `stored`.

        Raises:
            ValueError: an entry is missing, unknown, or of another type.
        """
        if not isinstance(stored, Mapping):
            raise ValueError("spec: no dictionary")
        if "inputs" not in stored:
            return cls.single(**_checked("spec", stored, cls.single))
        parts = {"inputs": Input, "targets": Target}
        values: dict[str, Any] = {}
        for key, kind in parts.items():
            given = stored.get(key)
            if not isinstance(given, list | tuple) or not given or not all(isinstance(each, Mapping) for each in given):
                raise ValueError(f"spec.{key}: no such value")
            values[key] = tuple(kind(**_checked(f"spec.{key}.{place}", each, kind)) for place, each in enumerate(given))
        lengths = stored.get("longest", {})
        if not isinstance(lengths, Mapping) or not all(_fits(size, int) and size > 0 for size in lengths.values()):
            raise ValueError("spec.longest: no such value")
        rest = {key: value for key, value in stored.items() if key not in (*parts, "longest")}
        plain = _checked("spec", rest, cls, without=(*parts, "longest"))
        return cls(**values, longest=tuple(lengths.items()), **plain)


Kind = TypeVar("Kind")


def of_shape(shape: Sequence[int]) -> DataSpec:
    """Return the spec of samples of which nothing is known but that each is one tensor of numbers of this shape."""
    return DataSpec.single("", tuple(shape), 1.0, (0.0,), (1.0,))


def _only(members: tuple[Kind, ...], several: str) -> Kind:
    if len(members) != 1:
        raise ValueError(several)
    return members[0]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _checked(
    key: str, stored: Mapping[str, Any], made: Callable[..., Any], without: Sequence[str] = ()
) -> dict[str, Any]:
    """Return stored values as the arguments that `made` takes, once each is known, there and of its type."""
    taken = {name: each for name, each in inspect.signature(made).parameters.items() if name not in without}
    wrong = [name for name, value in stored.items() if name not in taken or not _fits(value, taken[name].annotation)]
    missing = [name for name, each in taken.items() if each.default is each.empty and name not in stored]
    if wrong or missing:
        raise ValueError(f"{key}.{ascii((wrong or missing)[0])[1:-1]}: {'no such value' if wrong else 'missing'}")
    background = stored.get("background", (0, 0, 0))
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise ValueError(f"{key}.background: must be three numbers from 0 to 255")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, get_args(kind)[0]) for each in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(kind, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if kind is str:
        return isinstance(value, str)
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return is_number and isfinite(value)


@dataclass(frozen=True)
class Report:
    """What a task measured; written as `report.json`, printed as a table, drawn as figures.

    A row is one measured artifact: `name`, `runtime`, `metrics` and whatever cost was measured for it
    (`params`, `nonzero`, `macs`, `size_bytes`, `latency_ms`).
    """

    task: str
    run: str  # the run folder
    source: str | None
    seed: int
    rows: list[dict[str, Any]]
    ratios: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    monitored: dict[str, Any] | None = None  # metric, mode and value by which a training chose its best checkpoint
    schema: int = 1

    @property
    def objective(self) -> float | None:
        """Return what a sweep optimises, or None if no training chose a checkpoint."""
        return self.monitored["value"] if self.monitored else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only, `schema` first."""
        return {"schema": self.schema, **{key: value for key, value in asdict(self).items() if key != "schema"}}
