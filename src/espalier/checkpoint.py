"""What a checkpoint holds, how it reaches the disk whole, and how it is read back without running any of it.

A checkpoint is Lightning's dictionary plus `espalier: {version, config, spec, compression}`, so nobody retypes
overrides, and a network with fewer channels, masks or quantizers is rebuilt from the ledger of what was done to it.
Only tensors and plain types, so `torch.load(path, weights_only=True)` reads it anywhere.
"""

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from espalier import runs
from espalier.compression.base import Entry
from espalier.errors import ConfigError, EspalierError
from espalier.spec import DataSpec

VERSION = 1
PREFIX = "model."  # the learner's attribute; everything else in its state dict is not the network


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    path: Path
    content: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.content["espalier"]["config"])

    @property
    def spec(self) -> DataSpec:
        return DataSpec.from_dict(self.content["espalier"]["spec"])

    @property
    def ledger(self) -> list[Entry]:
        """What was done to the network, in order; see `compression/base.py`."""
        return [dict(entry) for entry in self.content["espalier"].get("compression", [])]

    @property
    def weights(self) -> dict[str, Tensor]:
        """State dict of the model alone."""
        state = self.content["state_dict"]
        return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def load(key: str, path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Raises:
        ConfigError: the file is damaged, holds more than tensors and plain types, or was not written by espalier.
    """
    content = _read(key, path)
    described = isinstance(content, dict) and {"espalier", "state_dict"} <= content.keys()
    if not described or content["espalier"].get("version") != VERSION:
        raise ConfigError(f"{key}={path}: not a checkpoint of this version of espalier; train it with: espalier train")
    return Checkpoint(path, content)


def load_run(key: str, reference: str, names: Sequence[str]) -> Checkpoint:
    """The first of `names` among the checkpoints of a RUN, as `load` reads it."""
    return load(key, runs.checkpoint_in(key, runs.find(key, reference), names))


def _read(key: str, path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{key}={path}: damaged, or not a checkpoint of tensors and plain types alone") from error


class CheckpointIO(TorchCheckpointIO):
    """Writes self-describing checkpoints: a temporary file in the same folder, synced, then renamed."""

    def __init__(self, config: Mapping[str, Any], spec: DataSpec, ledger: list[Entry]) -> None:
        self.description = {"version": VERSION, "config": dict(config), "spec": spec.to_dict()}
        self.ledger = ledger  # grows as the recipe is applied

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")  # one name: what a kill left is written over
        try:
            with temporary.open("wb") as file:
                torch.save({**checkpoint, "espalier": {**self.description, "compression": self.ledger}}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except (OSError, RuntimeError) as error:  # torch's own, where a write of its archive fails
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise EspalierError(
                f"{target}: not written, {reason.strerror}; what was there before is whole. "
                f"Make room, then go on with: espalier train resume={target.parent.parent}"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def save_network(self, model: nn.Module, path: Path) -> None:
        """A checkpoint of the network alone, which tests and starts new runs, but does not resume."""
        state = {f"{PREFIX}{name}": value for name, value in model.state_dict().items()}
        self.save_checkpoint({"state_dict": state, "pytorch-lightning_version": L.__version__}, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """What `save_checkpoint` wrote; a spawned process hands its bare weights over in this way, too."""
        return dict(_read("checkpoint", Path(path)))


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill the model with exactly the checkpoint's weights.

    Raises:
        ConfigError: they belong to another architecture.
    """
    new = _misfits(model.state_dict(), checkpoint.weights)
    unused = checkpoint.weights.keys() - model.state_dict().keys()
    if new or unused:
        example = (new or sorted(unused))[0]
        raise ConfigError(
            f"source={checkpoint.path}: a checkpoint of another architecture; {len(new)} tensors of the model have no "
            f"counterpart and {len(unused)} are left over, such as {example}"
        )
    model.load_state_dict(checkpoint.weights)


def load_fitting_weights(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Fill every tensor that fits by name and shape; return the names of those that stay new (the head, as a rule).

    Raises:
        ConfigError: fewer than half of the tensors fit, so this is another architecture.
    """
    state, stored = model.state_dict(), checkpoint.weights
    new = _misfits(state, stored)
    if 2 * len(new) > len(state):
        raise ConfigError(
            f"source={checkpoint.path}: a checkpoint of another architecture; only {len(state) - len(new)} of "
            f"{len(state)} tensors fit this model"
        )
    model.load_state_dict(
        {name: value for name, value in stored.items() if name in state and name not in new}, strict=False
    )
    return new


def _misfits(state: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in state.items() if name not in stored or stored[name].shape != value.shape]
