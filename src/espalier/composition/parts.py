"""The composition root: the one place where configuration becomes objects, each built when it is first asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from espalier import seeding
from espalier.composition import build, networks, origin, trainer
from espalier.compression.base import Compression, Stage, replay, stage_of, without_teacher
from espalier.compression.masks import KeepMasks
from espalier.config import redaction
from espalier.config.hints import nearest
from espalier.data.module import DataModule
from espalier.errors import ConfigError
from espalier.export import deployed
from espalier.export.bundle import Bundle
from espalier.learners.learner import Learner
from espalier.loggers.fault_tolerant import Guarded, guarded
from espalier.reporting import terminal
from espalier.runs import checkpoint
from espalier.runs.checkpoint import Checkpoint, CheckpointIO
from espalier.runs.run_folder import RunFolder
from espalier.spec import Entry
from espalier.strategies.collective import is_first_rank


@dataclass(frozen=True)
class Parts:
    """The parts of a run."""

    cfg: DictConfig
    words: Sequence[str]  # of the command line
    folder: Path
    task: str
    sources: Sequence[Checkpoint | Bundle] = ()  # what it starts from; benchmark takes several
    resumed: Checkpoint | None = None

    @property
    def source(self) -> Checkpoint | None:
        """Return the trained network that this run starts from, or None."""
        return self.sources[0] if self.sources and isinstance(self.sources[0], Checkpoint) else None

    @property
    def bundle(self) -> Bundle | None:
        """Return the exported network that this run starts from, or None if it starts from no bundle."""
        return self.sources[0] if self.sources and isinstance(self.sources[0], Bundle) else None

    @cached_property
    def data(self) -> DataModule:
        data: DataModule = build.part("data", self.cfg.data, seed=self.cfg.seed)
        if self.resumed or (self.sources and self.task != "train"):
            data.trained = self.resumed.spec if self.resumed else self.sources[0].spec
        if self.task != "train":
            for source in self.sources:
                origin.require_same_data("source", data, source)
                data.notes += origin.changed_samples(data, source)
            if self.sources:
                data.normalise_as(self.sources[0].spec)
        if self.resumed:
            origin.require_same_samples(data, self.resumed)
        _ = data.splits  # which writes the notes
        for line in data.notes:
            self.say(line)
        return data

    @cached_property
    def model(self) -> nn.Module:
        """Return the network before training: drawn from the seed, taken from the source, or rebuilt to resume."""
        return self._start[0]

    @cached_property
    def history(self) -> list[Entry]:
        """Return the steps of compression done to the network, in order; it grows as the recipe is applied."""
        return self._start[1]

    @cached_property
    def _start(self) -> tuple[nn.Module, list[Entry]]:
        torch.manual_seed(seeding.key(self.cfg.seed))
        model = build.model(self.cfg.model, self.data.spec)
        if self.resumed:  # its weights are loaded by Lightning
            return replay(model, self.resumed.history), self.resumed.history
        if self.source is None:
            return model, []
        if self.source.config["model"] != self.cfg.model:  # train: another network, which shares weights at most
            return self._warm_start(model, self.source), []
        model = replay(model, self.source.history)
        if self.task == "train":
            self._warm_start(model, self.source)
        else:
            checkpoint.load_weights(model, self.source)
        return without_teacher(model, self.source.history)

    def _warm_start(self, model: nn.Module, source: Checkpoint) -> nn.Module:
        new = checkpoint.load_fitting_weights(model, source)
        self.say(f"warm start from {source.path}" + (f"; new: {', '.join(new)}" if new else ""))
        return model

    @cached_property
    def compressions(self) -> list[Compression]:
        """Return the methods of the recipe, each ready to be applied and checked to have something to do."""
        supplied = {
            "spec": self.data.spec,
            "seed": self.cfg.seed,
            "samples": self.data.samples,
            "loss": self.loss,
            "latency_ms": partial(deployed.latency_ms, spec=self.data.spec),
            "network": self.network_of,
        }
        recipe: list[Compression] = []
        for name, node in self.cfg.compression.items():
            method: Compression = build.part(f"compression.{name}", node, **supplied)
            method.history = self.history
            method.is_applied = bool(self.resumed) and method.trains
            if not method.is_applied:
                method.require(self.model)
            recipe.append(method)
        return recipe

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss of the learner, which is built when this is first called."""
        return self.learner.loss(output, y)

    def network_of(self, key: str, reference: str) -> nn.Module:
        """Return the network of another run, deployable and frozen, as a teacher; `source` means this run's own source.

        Raises:
            ConfigError: there is no such run, or it was trained on other data.
        """
        stored = networks.of_teacher(key, reference, self.cfg.source, self.data)
        self.say(f"{key}: {stored.said}")
        return networks.deployable(stored).module.requires_grad_(False)

    @cached_property
    def learner(self) -> Learner:
        return build.part(
            "learner",
            self.cfg.learner,
            model=self.model,
            spec=self.data.spec,
            optimizer=instantiate(self.cfg.optimizer, _convert_="all"),
            scheduler=instantiate(self.cfg.scheduler, _convert_="all"),
            seed=self.cfg.seed,
        )

    @cached_property
    def callbacks(self) -> list[L.Callback]:
        supplied = {
            "monitor": self.learner.monitor,
            "mode": self.learner.mode,
            "dirpath": RunFolder(self.folder).checkpoints,
        }
        watching = [
            build.part(f"callbacks.{name}", node, **{**supplied, **self._chosen_metric(f"callbacks.{name}", node)})
            for name, node in self.cfg.callbacks.items()
        ]
        was_masked = any(stage_of(entry["method"]) == Stage.MASK for entry in self.history)
        keeps_masks = any(isinstance(method, KeepMasks) for method in self.compressions)
        return [*([KeepMasks()] if was_masked and not keeps_masks else []), *self.compressions, *watching]

    def _chosen_metric(self, key: str, node: DictConfig) -> dict[str, str]:
        """Return the metric that a callback is configured to watch, and its better direction; empty if it names none.

        Raises:
            ConfigError: the validation has no such metric.
        """
        name = node.get("monitor")
        if name is None:
            return {}
        validation: Any = self.learner.metrics["val"]
        known = {f"val/{metric}": value for metric, value in validation.items(keep_base=True)}
        if name not in known:
            raise ConfigError(
                f"{key}.monitor={name}: no such metric{nearest(name, [*known])}; it is one of {', '.join(known)}"
            )
        return {"monitor": name, "mode": "max" if known[name].higher_is_better else "min"}

    @cached_property
    def loggers(self) -> list[Guarded]:
        step = self.resumed.content["global_step"] if self.resumed else None
        supplied = {"folder": self.folder, "run_name": self.folder.name, "resumed_step": step}
        return [
            guarded(partial(build.part, f"logger.{name}", node, **supplied)) for name, node in self.cfg.logger.items()
        ]

    @cached_property
    def trainer(self) -> L.Trainer:
        node, folder = self.cfg.trainer, self.folder
        profiler = trainer.profiler_of(node, folder)
        return trainer.build_trainer(node, profiler, self.callbacks, self.loggers, self.checkpoint_io, folder)

    @cached_property
    def checkpoint_io(self) -> CheckpointIO:
        began = {**self.plain_config(), "resume": None}  # or a resumed run would end with another file
        return CheckpointIO(began, self.data.spec, self.history)

    def plain_config(self) -> dict[str, Any]:
        """Return the configuration as it is written down: plain types, no secrets."""
        return redaction.scrub_tree(OmegaConf.to_container(self.cfg, resolve=True))

    def say(self, line: str) -> None:
        """Print one line for the user, on the first rank alone."""
        if is_first_rank():
            terminal.say(line)
