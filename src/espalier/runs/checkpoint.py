"""The content of a checkpoint, and how to read it without running any of it; `storage.py` writes it to disk.

A checkpoint is Lightning's dictionary plus `espalier: {version, config, spec, compression}`, so nobody retypes
overrides, and a network with fewer channels, masks or quantizers is rebuilt from the history of what was done to it.
Only tensors and plain types, so `torch.load(path, weights_only=True)` reads it anywhere.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from espalier.config import conf_dir
from espalier.config.overrides import typed
from espalier.errors import ConfigError, EspalierError
from espalier.runs import references, run_folder, storage
from espalier.runs.run_folder import RunFolder
from espalier.spec import DataSpec, Entry
from espalier.trust import archive, metadata

VERSION = 1
KEEPER = {"monitor", "best_model_path", "best_k_models"}  # in the state of a callback that keeps checkpoints
PREFIX = "model."  # the learner's attribute; everything else in its state dict is not the network

Job = Callable[[storage.Folder, str, str | None], None]  # makes the file of that name, keeping what was there as ...

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, with the file it came from."""

    path: Path
    content: Mapping[str, Any]
    why: str = ""  # this file was taken, where that is not plain

    @property
    def said(self) -> str:
        """Return the file, the step and the validation metric of its weights, as the user reads them."""
        step = self.content.get("global_step")
        last = self.content.get("validation") or {}
        parts = [str(self.path)]
        if (score := self._score()) is not None:
            parts.append("{} {:.4f}".format(*score))
        elif last:
            parts.append(f"step {step}, last validated at step {last['step']}")
        elif step is not None:
            parts.append(f"step {step}")
        return ", ".join([*parts, *filter(None, [self.why])])

    def _score(self) -> tuple[str, float] | None:
        """Return the monitored metric and its value for these weights, or None if they were not validated."""
        last = self.content.get("validation")
        if last:
            return (
                (last["monitor"], last["metrics"][last["monitor"]])
                if last["step"] == self.content["global_step"]
                else None
            )
        for state in self._keepers():  # before version 0.2 the file did not say it
            for name, score in state["best_k_models"].items():
                if Path(str(name)).name == self.path.name and isinstance(score, Tensor | float):
                    return str(state["monitor"]), float(score)
        return None

    def best_name(self) -> str:
        """Return the name of the best file at the time this one was written; empty if there was none."""
        return next((Path(str(state["best_model_path"])).name for state in self._keepers()), "")

    def _keepers(self) -> list[dict[str, Any]]:
        states = self.content.get("callbacks", {})
        return [state for state in states.values() if isinstance(state, dict) and state.keys() >= KEEPER]

    @property
    def config(self) -> dict[str, Any]:
        return conf_dir.completed(self.content["espalier"]["config"])

    @property
    def spec(self) -> DataSpec:
        return DataSpec.from_dict(self.content["espalier"]["spec"])

    @property
    def history(self) -> list[Entry]:
        """Return the steps of compression done to the network, in order; see `compression/base.py`."""
        return [dict(entry) for entry in self.content["espalier"].get("compression", [])]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Return the state dict of the model alone."""
        state = self.content["state_dict"]
        return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def load(key: str, path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Raises:
        ConfigError: the file is damaged, holds more than tensors and plain types, or was not written by espalier.
    """
    content = _read(key, path)
    described = isinstance(content, dict) and {"espalier", "state_dict"} <= content.keys()
    if not described or not isinstance(content["espalier"], dict) or content["espalier"].get("version") != VERSION:
        raise ConfigError(f"{key}={path}: not a checkpoint of this version of espalier; train it with: espalier train")
    metadata.require_credible(key, path, content)
    return Checkpoint(path, content)


def load_run(key: str, reference: str, names: Sequence[str]) -> Checkpoint:
    """Read the first of `names` among the checkpoints of a RUN, as `load` does; for a damaged last the one before it.

    Raises:
        ConfigError: the RUN holds none of them, or what it holds cannot be read.
    """
    path = references.checkpoint_in(key, references.find(key, reference), names)
    found = _last_or_previous(key, path)
    if run_folder.BEST in names and path.name in run_folder.RESUMED and path != Path(reference):
        return _unrecorded(key, found)
    return found


def _last_or_previous(key: str, path: Path) -> Checkpoint:
    previous = path.with_name(run_folder.PREVIOUS)
    if path.name != run_folder.LAST or not previous.is_file():
        return load(key, path)
    try:
        return load(key, path)
    except ConfigError as error:
        found = load(key, previous)
        log.warning("%s; going on from %s, step %s", error, previous.name, found.content.get("global_step"))
        return found


def _unrecorded(key: str, last: Checkpoint) -> Checkpoint:
    """Return the best of a folder without a record: the best that the last checkpoint knew, else the last itself."""
    best = last.path.with_name(last.best_name() or last.path.name)
    if best == last.path:
        return replace(last, why="as no best was kept")
    if not best.is_file():
        return replace(last, why=f"as {best.name}, which was the best, is not there any more")
    return replace(load(key, best), why=f"the best by {last.path.name}, as nothing recorded it")


def _read(key: str, path: Path) -> Any:
    try:
        if storage.is_damaged(path):
            raise ConfigError(f"{key}={path}: damaged, its sha256 is not the one in {storage.SUMS}")
        archive.require_safe(key, path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # whatever a file that was made by hand makes torch stumble over
        raise ConfigError(f"{key}={path}: damaged, or not a checkpoint of tensors and plain types alone") from error


class CheckpointIO(TorchCheckpointIO):
    """Writes self-describing checkpoints, whole or not at all, and keeps the one before the last."""

    def __init__(self, config: Mapping[str, Any], spec: DataSpec, history: list[Entry]) -> None:
        self.description = {"version": VERSION, "config": dict(config), "spec": spec.to_dict()}
        self.history = history  # grows as the recipe is applied
        self.is_asynchronous = False  # write in the background, from a copy
        self.mirror: storage.Mirror | None = None
        self._folders: dict[Path, storage.Folder] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint, at once or in the background.

        Raises:
            EspalierError: there is no room for it, or for the one written in the background before it.
        """
        content = {**checkpoint, "espalier": {**self.description, "compression": list(self.history)}}
        self.teardown()
        if self.is_asynchronous:
            content = storage.snapshot(content)
        self._store(Path(path), lambda folder, name, keep: folder.write(content, name, keep))

    def save_again(self, saved: Path, path: Path) -> None:
        """Give the checkpoint that was saved last another name in its folder as well; raise as `save_checkpoint`."""
        self._store(path, lambda folder, name, keep: folder.link(saved.name, name, keep))

    def record_best(self, folder: Path, name: str | None) -> None:
        """Record which file of the folder is the best, after those being written; raise as `save_checkpoint`."""
        if name is not None or (folder / run_folder.BEST).exists():
            self._store(folder / run_folder.BEST, lambda files, _, keep: files.record_best(name))

    def teardown(self) -> None:
        """Wait for what is written in the background; Lightning calls this at the end of a fit.

        Raises:
            EspalierError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _store(self, target: Path, job: Job) -> None:
        """Write the checkpoint now, or in the background after those that are being written."""
        if self.is_asynchronous:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._writing = self._thread.submit(self._store_after, self._writing, target, job)
        else:
            self._store_after(None, target, job)

    def _store_after(self, writing: Future[None] | None, target: Path, job: Job) -> None:
        if writing is not None:
            writing.result()  # or what failed to be written would be given a second name
        try:
            if target.parent not in self._folders:
                self._folders[target.parent] = storage.Folder(target.parent)
            keep = run_folder.PREVIOUS if target.name == run_folder.LAST else None
            job(self._folders[target.parent], target.name, keep)
        except OSError as error:
            what_to_do = "Make room" if error.errno in storage.DISK_IS_FULL else "Mend that"
            raise EspalierError(
                f"{target}: not written, {error.strerror}; what was there before is whole. "
                f"{what_to_do}, then go on with: espalier train {typed('resume', RunFolder.of(target).path)}"
            ) from error
        if self.mirror:
            try:
                self.mirror.copy(target)
            except Exception as error:  # of whatever library reaches it; the file itself is safe
                log.warning("%s: not copied to %s, training goes on: %s", target, self.mirror.root, error)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file that was replaced, and its line in the list; if it is still being written, do so afterwards."""
        self.teardown()
        storage.remove(Path(path))
        if self.mirror:
            try:
                self.mirror.remove(Path(path).name)
            except Exception as error:  # as above
                log.warning("%s: not removed from %s, training goes on: %s", path, self.mirror.root, error)

    def save_network(self, model: nn.Module, path: Path) -> None:
        """Save a checkpoint of the network alone, for tests and new runs; no run resumes from it."""
        state = {f"{PREFIX}{name}": value for name, value in model.state_dict().items()}
        self.save_checkpoint({"state_dict": state, "pytorch-lightning_version": L.__version__}, path)
        self.teardown()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what `save_checkpoint` wrote, or the bare weights that a spawned process hands over."""
        self.teardown()
        return dict(_read("checkpoint", Path(path)))


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill the model with exactly the checkpoint's weights.

    Raises:
        ConfigError: the weights belong to another architecture.
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
