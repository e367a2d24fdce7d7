"""The composition root: the one place where configuration becomes objects, each built when it is first asked for."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from espalier import seeding
from espalier.composition import build, networks, origin, plan, results, trainer
from espalier.compression.base import Compression, Stage, replay, stage_of, without_teacher
from espalier.compression.masks import KeepMasks
from espalier.config import redaction
from espalier.config.conf_dir import TRAINS
from espalier.config.hints import nearest
from espalier.data.module import DataModule
from espalier.errors import ConfigError, StoppedError
from espalier.export import deployed
from espalier.export.bundle import Bundle
from espalier.learners.learner import Learner
from espalier.loggers.fault_tolerant import Guarded, guarded
from espalier.optim.build import require_step
from espalier.processes import shortage
from espalier.processes.stop_signal import requeue
from espalier.profiling import cost
from espalier.reporting import terminal
from espalier.runs import checkpoint
from espalier.runs.checkpoint import Checkpoint, CheckpointIO
from espalier.runs.run_folder import RunFolder
from espalier.spec import Entry, Report

terminal.hush_lightning()
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run. A task pays only for the parts it touches."""

    cfg: DictConfig
    words: Sequence[str]  # of the command line
    folder: Path
    task: str
    sources: Sequence[Checkpoint | Bundle] = ()  # what it starts from; benchmark takes several
    resumed: Checkpoint | None = None

    @property
    def source(self) -> Checkpoint | None:
        """The trained network that this run starts from."""
        return self.sources[0] if self.sources and isinstance(self.sources[0], Checkpoint) else None

    @property
    def bundle(self) -> Bundle | None:
        """The exported network that this run uses, where that is all there is."""
        return self.sources[0] if self.sources and isinstance(self.sources[0], Bundle) else None

    @cached_property
    def data(self) -> DataModule:
        data: DataModule = build.part("data", self.cfg.data, seed=self.cfg.seed)
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
        """The network before training: drawn from the seed, taken from the source, or as a resumed run had built it."""
        return self._start[0]

    @cached_property
    def ledger(self) -> list[Entry]:
        """What was done to the network, in order; grows as the recipe is applied."""
        return self._start[1]

    @cached_property
    def _start(self) -> tuple[nn.Module, list[Entry]]:
        torch.manual_seed(seeding.key(self.cfg.seed))
        model = build.model(self.cfg.model, self.data.spec)
        if self.resumed:  # its weights are loaded by Lightning
            return replay(model, self.resumed.ledger), self.resumed.ledger
        if self.source is None:
            return model, []
        if self.source.config["model"] != self.cfg.model:  # train: another network, which shares weights at most
            return self._warm_start(model, self.source), []
        model = replay(model, self.source.ledger)
        if self.task == "train":
            self._warm_start(model, self.source)
        else:
            checkpoint.load_weights(model, self.source)
        return without_teacher(model, self.source.ledger)

    def _warm_start(self, model: nn.Module, source: Checkpoint) -> nn.Module:
        new = checkpoint.load_fitting_weights(model, source)
        self.say(f"warm start from {source.path}" + (f"; new: {', '.join(new)}" if new else ""))
        return model

    @cached_property
    def compressions(self) -> list[Compression]:
        """The recipe, each method ready to be applied and sure to have something to do."""
        supplied = {
            "spec": self.data.spec,
            "seed": self.cfg.seed,
            "samples": self.data.samples,
            "loss": self.loss,
            "latency_ms": partial(deployed.latency_ms, input_shape=self.data.spec.shape),
            "network": self.network_of,
        }
        recipe: list[Compression] = []
        for name, node in self.cfg.compression.items():
            method: Compression = build.part(f"compression.{name}", node, **supplied)
            method.ledger = self.ledger
            method.is_applied = bool(self.resumed) and method.trains
            if not method.is_applied:
                method.require(self.model)
            recipe.append(method)
        return recipe

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The learner's, which is built when this is first called."""
        return self.learner.loss(output, y)

    def network_of(self, key: str, reference: str) -> nn.Module:
        """The deployable network of another run, frozen: a teacher. `source` is the run that this one starts from.

        Raises:
            ConfigError: there is none, or it was trained on other data.
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
        was_masked = any(stage_of(entry["method"]) == Stage.MASK for entry in self.ledger)
        keeps_masks = any(isinstance(method, KeepMasks) for method in self.compressions)
        return [*([KeepMasks()] if was_masked and not keeps_masks else []), *self.compressions, *watching]

    def _chosen_metric(self, key: str, node: DictConfig) -> dict[str, str]:
        """What a callback watches where the configuration says so, and which way it gets better.

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

    @property
    def has_trained(self) -> bool:
        """Whether it has taken a step, or goes on from one."""
        return "trainer" in self.__dict__ and self.trainer.global_step > 0

    @cached_property
    def checkpoint_io(self) -> CheckpointIO:
        began = {**self._plain_config(), "resume": None}  # or a resumed run would end with another file
        return CheckpointIO(began, self.data.spec, self.ledger)

    def _plain_config(self) -> dict[str, Any]:
        """What is written down of the configuration: plain types, no secrets."""
        return redaction.scrub_tree(OmegaConf.to_container(self.cfg, resolve=True))

    def perform(self) -> float | None:
        """Carry out the task; return what a sweep optimises: the monitored metric of the best checkpoint of a training.

        Raises:
            EspalierError: memory or disk did not suffice, or the training diverged.
        """
        try:
            with shortage.explained(self.folder, self.cfg.data):
                self._introduce()
                instantiate(self.cfg.task, _partial_=True)(self)
                return self.best_score if self.has_trained else None
        except StoppedError:
            if self.cfg.requeue and is_first_rank():
                requeue()
            raise
        finally:
            for logger in self.__dict__.get("loggers", []):  # those that were built
                logger.close()

    def _introduce(self) -> None:
        """Say which files this starts from, and what it does otherwise than before."""
        for source in self.sources if self.task != "serve" else ():  # whose first line has the port
            self.say(f"source: {source.said}")
        if self.resumed is None:
            return
        self.say(f"resume: {self.resumed.said}")
        for line in origin.remarks(self.resumed, self.cfg, self.folder, lambda: self.trainer.world_size):
            self.say(line)

    def fit(self) -> Path | None:
        """Train, then apply what works on a trained network; the checkpoint of the result, None where none is kept.

        Compressing always keeps one. A recipe without a method that trains leaves the source's weights as they are.
        """
        late = [method for method in self.compressions if not method.trains]
        weights = None
        if self.task == "train" or len(late) < len(self.compressions):
            self.trainer.fit(self.learner, self.data, ckpt_path=self.resumed.path if self.resumed else None)
            weights = trainer.kept(self.trainer) or self.learner.save_last()
        if not late and (weights or self.task == "train"):
            return weights
        if weights:
            checkpoint.load_weights(self.learner.model, checkpoint.load("source", weights))
        for method in late:
            self.learner.model, entry = method.apply_to(self.learner.model)
            self.ledger.append(entry)
        weights = RunFolder(self.folder).compressed
        if is_first_rank():
            self.checkpoint_io.save_network(self.learner.model, weights)
        return weights

    def measure(self, split: Literal["train", "val", "test"], weights: Path | None = None) -> dict[str, float]:
        """Metrics of a whole split, named `split/...`, with the given checkpoint's weights or the present ones."""
        self.data.tested_split = split
        [values] = self.trainer.test(self.learner, self.data, ckpt_path=weights, verbose=False)
        return {name.replace("test/", f"{split}/"): value for name, value in values.items()}

    @property
    def best_score(self) -> float | None:
        """The monitored metric of the best checkpoint; None where nothing was saved."""
        return trainer.best_score(self.trainer)

    @property
    def monitored(self) -> dict[str, Any] | None:
        """The metric that the best checkpoint was chosen by, its direction and value; None where nothing was saved."""
        return trainer.monitored(self.trainer)

    def cost(self, weights: Path | None) -> dict[str, Any]:
        """Name, runtime and counted cost of the network in a checkpoint file, or of the present one."""
        model = networks.trained(checkpoint.load("source", weights)) if weights else self.learner.model
        return {
            "name": str(self.cfg.model._target_).rpartition(".")[2],
            "runtime": "torch",
            **cost.counts(model, self.data.spec.shape),
            **({"size_bytes": cost.size_bytes(weights)} if weights else {}),
        }

    def record(self) -> None:
        """Write down what this run is made of: config, overrides, provenance."""
        _ = self.trainer  # built first: a run that cannot be built leaves nothing behind
        self._announce()
        for logger in self.loggers:
            logger.log_hyperparams(self._plain_config())
        if not is_first_rank():
            return
        results.record(self.folder, self._plain_config(), self.words, is_resumed=self.resumed is not None)

    def _announce(self) -> None:
        """Say what is about to be trained, and what is odd about it.

        Raises:
            ConfigError: nothing would be trained, or nothing measured.
        """
        if self.task == "evaluate":
            plan.require_test(self.trainer, self.data, str(self.cfg.task.split))
        trains = self.task == "train" or any(method.trains for method in self.compressions)
        if self.task not in TRAINS or not trains:
            return
        try:
            require_step(self.learner.optimizer_factory, self.learner.model)
        except ValueError as error:
            raise ConfigError(f"optimizer: {error}") from error
        planned = plan.of_training(self.trainer, self.data, is_tested=self.task == "train")
        self.say(plan.line(planned, self.trainer, self.data.spec))
        for warning in planned.warnings if is_first_rank() else ():
            log.warning(warning)

    def publish(
        self, rows: list[dict[str, Any]], notes: Sequence[str], ratios: dict[str, float] | None = None
    ) -> Report:
        """Report what was measured: files, figures, loggers, and the table that the user sees."""
        source = str(self.sources[0].path) if self.sources else None
        found = self.data.notes if "data" in self.__dict__ else []
        warnings = [f"no result: {self.cfg.no_result}"] if self.cfg.no_result else []
        chosen = self.monitored if self.has_trained and not warnings else None
        said = [*warnings, *notes, *found]
        done = Report(self.task, str(self.folder), source, self.cfg.seed, rows, ratios or {}, said, chosen)
        if is_first_rank():
            tables = self.learner.measured.get("test", {}) if "learner" in self.__dict__ else {}
            results.draw(done, self.folder, tables, self.data.spec.class_names if tables else ())
            results.publish(done, self.folder, self.loggers)
        return done

    def say(self, line: str) -> None:
        """One line for the user, from the first rank alone."""
        if is_first_rank():
            terminal.say(line)


def is_first_rank() -> bool:
    """Whether this process is the one that writes and speaks."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)
