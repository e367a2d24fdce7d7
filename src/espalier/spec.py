"""The values that travel: `DataSpec` forwards into the model, `Entry` with its weights, `Report` out of the run."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import isfinite
from typing import Any, get_args, get_origin

Entry = dict[str, Any]  # what one method of compression did to a network: "method" and plain values


@dataclass(frozen=True)
class DataSpec:
    """What one sample looks like and how raw values become model input: `x = (raw / scale - mean) / std`.

    Model, metrics, checkpoint, export and server all take their sizes from here, so no size is configured twice.
    """

    name: str
    shape: tuple[int, ...]  # one sample: (channels, height, width) or (features,)
    scale: float  # raw value that maps to 1.0: 255 for 8-bit images
    mean: tuple[float, ...]  # of scaled training values, per channel or per feature
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()  # empty for regression
    class_counts: tuple[int, ...] = ()  # training samples per class, for class weights
    target_mean: float = 0.0  # regression: models predict (y - target_mean) / target_std
    target_std: float = 1.0
    background: tuple[int, ...] = (0, 0, 0)  # red, green and blue under what is transparent in a picture file
    fingerprint: str = ""  # of which samples the training split holds, in which order; empty where nobody took it

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    @property
    def num_classes(self) -> int:
        """Return the number of classes; 0 for regression."""
        return len(self.class_names)

    @property
    def num_outputs(self) -> int:
        """Return the width of the model's last layer: one logit per class, or one number for regression."""
        return self.num_classes or 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only, as checkpoints and bundles store them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "DataSpec":
        """Return the spec of which `to_dict` made `stored`.

        Raises:
            ValueError: an entry is missing, unknown, or of another type.
        """
        if not isinstance(stored, Mapping):
            raise ValueError("spec: no dictionary")
        kinds = {each.name: each.type for each in fields(cls)}
        wrong = [key for key, value in stored.items() if key not in kinds or not _fits(value, kinds[key])]
        missing = [each.name for each in fields(cls) if each.default is MISSING and each.name not in stored]
        if wrong or missing:
            raise ValueError(f"spec.{ascii((wrong or missing)[0])[1:-1]}: {'no such value' if wrong else 'missing'}")
        background = stored.get("background", (0, 0, 0))
        if len(background) != 3 or not all(0 <= value <= 255 for value in background):
            raise ValueError("spec.background: must be three numbers from 0 to 255")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
        }
        return cls(**values)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, get_args(kind)[0]) for each in value)
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
        """What a sweep optimises; None where no training chose a checkpoint."""
        return self.monitored["value"] if self.monitored else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only, `schema` first."""
        return {"schema": self.schema, **{key: value for key, value in asdict(self).items() if key != "schema"}}
