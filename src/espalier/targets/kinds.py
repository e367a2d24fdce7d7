"""Which kind of target some data have."""

from functools import lru_cache

from espalier.spec import DataSpec
from espalier.targets.classes import Classes
from espalier.targets.kind import TargetKind
from espalier.targets.numbers import Numbers


@lru_cache(maxsize=64)
def kind_of(spec: DataSpec) -> TargetKind:
    """Return what the answers of a network to such samples mean."""
    return Classes(spec) if spec.num_classes else Numbers(spec)
