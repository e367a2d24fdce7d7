"""`espalier.load`: one interface to a trained run (with torch) and to a bundle (without).

Letters: B batch, N samples.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.api.answers import Answers, answers
from espalier.api.samples import Given, raw_samples
from espalier.errors import ConfigError, require
from espalier.reporting import report
from espalier.runs import references, run_folder
from espalier.runs.run_folder import RunFolder
from espalier.spec import DataSpec
from espalier.trust import archive

if TYPE_CHECKING:
    from torch import nn

CHUNK = 256  # samples of one call of the network

Network = Callable[[NDArray[Any]], NDArray[np.float32]]  # raw (B, *shape) to probabilities, or the value (B, 1)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network that predicts, with its classes, sizes and history."""

    path: Path  # the checkpoint file, or the folder of the bundle
    spec: DataSpec = field(repr=False)  # shape, classes and preprocessing
    config: dict[str, Any] = field(repr=False)  # of its training; of a bundle data, model and learner alone
    metrics: dict[str, float]  # what its report measured, such as test/accuracy; empty where there is none
    network: Network = field(repr=False)
    module: "nn.Module | None" = field(default=None, repr=False)

    @property
    def model(self) -> "nn.Module":
        """Return the torch network, on the CPU and in evaluation mode; it takes normalised input.

        Raises:
            ConfigError: a bundle was loaded, which has no torch network.
        """
        if self.module is None:
            raise ConfigError(f"{self.path}: a bundle holds no torch module; load the RUN that was exported for .model")
        return self.module

    def predict(self, given: Given) -> Answers:
        """Return the answers for raw samples: an array, pictures, paths of pictures or of a CSV file, or texts.

        Raises:
            ConfigError: the samples do not fit the network, or cannot be read.
            EspalierError: an output is not finite.
        """
        raw = raw_samples(self.spec, given)
        parts = [self.network(raw[start : start + CHUNK]) for start in range(0, len(raw), CHUNK)]
        return answers(self.spec, np.concatenate(parts))


def load(run: str | os.PathLike[str]) -> Loaded:
    """Load a run folder, a checkpoint file, `latest`, or the folder of a bundle, which needs no torch.

    Raises:
        ConfigError: there is no such run, or its file is damaged or not to be trusted.
    """
    path = references.find("source", os.fspath(run))
    bundle = references.bundle_in(path)
    if bundle is not None and not RunFolder(path).checkpoints.is_dir():
        return _of_bundle(bundle)
    return _of_checkpoint(path)


def _of_bundle(folder: Path) -> Loaded:
    require("orjson", "serve")
    from espalier.serving.predictor import FORMAT, Predictor

    predictor = Predictor(folder, threads=1)
    rows = [row for row in predictor.bundle.content.get("report", []) if row.get("name") == FORMAT]
    return Loaded(folder, predictor.spec, predictor.bundle.config, _numbers(rows[:1]), predictor.predict)


def _of_checkpoint(path: Path) -> Loaded:
    archive.refuse_unsafe_loading()
    import torch

    from espalier.composition import networks
    from espalier.compression.base import without_teacher
    from espalier.export.preprocess import prepared
    from espalier.runs import checkpoint
    from espalier.targets.kinds import kind_of

    stored = checkpoint.load_run("source", str(path), run_folder.EVALUATED)
    spec = stored.spec
    module, _ = without_teacher(networks.trained(stored), stored.history)
    module.eval()

    def network(raw: NDArray[Any]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits = module(*map(torch.from_numpy, prepared(spec, [raw])))
        return kind_of(spec).answer(logits.float().numpy())

    return Loaded(stored.path, spec, stored.config, _measured(stored.path), network, module)


def _measured(file: Path) -> dict[str, float]:
    """Return the metrics of this checkpoint from its run's report; empty if there is none, or it measured another."""
    folder = RunFolder.of(file).path
    try:
        is_measured = references.checkpoint_in("source", folder, run_folder.EVALUATED).samefile(file)
        rows = report.read(folder).rows if is_measured else []
    except (ConfigError, OSError, ValueError, TypeError):
        return {}
    return _numbers(rows[-1:])


def _numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metrics of the only row, without those that were not finite (null in JSON)."""
    return {
        name: float("nan") if value is None else float(value)
        for row in rows
        for name, value in row.get("metrics", {}).items()
    }
