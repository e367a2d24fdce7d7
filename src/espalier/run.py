"""The composition root: the one place where configuration becomes objects, each built when it is first asked for."""

import inspect
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from espalier import checkpoint, global_batch, plan, runs, secret, seeding, terminal
from espalier.callbacks.guarded import Guarded, guarded
from espalier.callbacks.monitor import Monitor
from espalier.callbacks.wandb_log import log_report
from espalier.catalog import TRAINS
from espalier.checkpoint import Checkpoint, CheckpointIO
from espalier.compression.base import (
    Compression,
    Entry,
    Stage,
    replay,
    stage_of,
    without_teacher,
)
from espalier.compression.masks import KeepMasks
from espalier.data.module import DataModule
from espalier.errors import ConfigError, EspalierError, StoppedError
from espalier.export import deployed
from espalier.export.bundle import Bundle
from espalier.export.deployed import Deployable
from espalier.hints import nearest
from espalier.learners.environment import environments
from espalier.learners.interrupt import requeue
from espalier.learners.learner import Learner
from espalier.learners.position import FitLoop
from espalier.learners.precision import HalfNetwork
from espalier.measure import cost, figures, provenance, report
from espalier.optim.build import require_step
from espalier.runs import BEST, RESUMED
from espalier.spec import DataSpec, Report
from espalier.storage import DISK_IS_FULL
from espalier.targets import check

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)
for not_for_users in (
    ".*isinstance.treespec, LeafSpec",  # Lightning 2.6 under torch 2.13
    ".*does not have many workers",  # tensors in memory need none
    "The number of training batches",  # epochs shorter than log_every_n_steps are logged at their end
    "It is recommended to use `self.log",  # torchmetrics has summed over ranks already
    "The `srun` command is available",  # and `launchers.py` knows whether it was used
    "Checkpoint directory .* exists and is not empty",  # a resumed run continues in its own folder
):
    warnings.filterwarnings("ignore", not_for_users)

COMPRESSED = "compressed.ckpt"  # best.ckpt after the methods that work on a trained network
EVALUATED = (COMPRESSED, BEST, *RESUMED)  # what `source=FOLDER` means, in this order
log = logging.getLogger(__name__)

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
PROFILE = "profile"  # in the names of their files
TOO_LARGE = ("can't allocate memory", "Storage size calculation overflowed", "numel: integer multiplication overflow")
CPU_IS_FULL = "DefaultCPUAllocator: can't allocate memory"  # torch has no class for this error


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
        data: DataModule = _build("data", self.cfg.data, seed=self.cfg.seed)
        if self.task != "train":
            for source in self.sources:
                require_same_data("source", data, source)
            if self.sources:
                data.normalise_as(self.sources[0].spec)
        if self.resumed:
            require_same_samples(data, self.resumed)
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
        model = _new_model(self.cfg.model, self.data.spec)
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
            method: Compression = _build(f"compression.{name}", node, **supplied)
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
        if reference == "source" and not self.cfg.source:
            raise ConfigError(f"{key}=source: this run starts from no source; name the RUN of the teacher")
        stored = checkpoint.load_run(key, self.cfg.source if reference == "source" else reference, EVALUATED)
        require_same_data(key, self.data, stored)
        self.say(f"{key}: {stored.said}")
        return self.deployable(stored).module.requires_grad_(False)

    def network(self, stored: Checkpoint) -> nn.Module:
        """The network of a checkpoint as it was trained: masks, adapters and quantizers in place."""
        model = replay(_stored_model(stored), stored.ledger)
        checkpoint.load_weights(model, stored)
        return model

    def deployable(self, stored: Checkpoint) -> Deployable:
        """The network of a checkpoint as it is shipped, beside what it was trained as."""
        return deployed.deployable(self.network(stored), stored.ledger)

    def float_network(self, stored: Checkpoint) -> tuple[nn.Module, list[Entry]]:
        """The same weights without the quantizers, and the ledger of that."""
        ledger = [entry for entry in stored.ledger if stage_of(entry["method"]) < Stage.QUANTIZE]
        model = replay(_stored_model(stored), ledger)
        checkpoint.load_fitting_weights(model, stored)
        return model, ledger

    @cached_property
    def learner(self) -> Learner:
        return _build(
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
        supplied = {"monitor": self.learner.monitor, "mode": self.learner.mode, "dirpath": self.folder / "checkpoints"}
        watching = [
            _build(f"callbacks.{name}", node, **{**supplied, **self._chosen_metric(f"callbacks.{name}", node)})
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
        return [guarded(partial(_build, f"logger.{name}", node, **supplied)) for name, node in self.cfg.logger.items()]

    @cached_property
    def trainer(self) -> L.Trainer:
        trainer = _build(
            "trainer",
            self.cfg.trainer,
            **self._profiler(),
            callbacks=self.callbacks,
            logger=self.loggers,
            plugins=[self.checkpoint_io, *environments()],
            default_root_dir=self.folder,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in self.callbacks),
            enable_progress_bar=False,  # conf/callbacks/progress.yaml and summary.yaml stand for Lightning's own
            enable_model_summary=False,
            num_sanity_val_steps=0,  # a resumed run would skip them, an unbroken one not
            use_distributed_sampler=False,  # data/loaders.py shards, and loses or repeats no sample
        )
        trainer.fit_loop = FitLoop(trainer)
        # At SIGTERM Lightning would wait for all ranks, inside of the handler and wherever they are.
        trainer._signal_connector._sigterm_notifier_fn = lambda number, frame: None
        # It would ask the first rank for that before every batch, and wait for the answer (learners/interrupt.py).
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        actual, wanted = trainer.world_size, trainer.num_devices * trainer.num_nodes
        if actual != wanted:  # each of them would train and be tested on its part of the data alone
            raise ConfigError(f"trainer.devices: {wanted} in all, but only {actual} take part in this run")
        if isinstance(trainer.precision_plugin, HalfPrecision):
            trainer.strategy.precision_plugin = HalfNetwork(trainer.precision_plugin.precision)
        return trainer

    def _profiler(self) -> dict[str, Profiler]:
        """Lightning's profiler of that name, which writes into the run folder; none where there is no name."""
        name = self.cfg.trainer.get("profiler")
        if not isinstance(name, str):
            return {}
        if name not in PROFILERS:
            raise ConfigError(
                f"trainer.profiler={name}: no such profiler; it is one of {', '.join(PROFILERS)}, or null"
            )
        return {"profiler": PROFILERS[name](dirpath=self.folder, filename=PROFILE)}

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
        return secret.scrub_tree(OmegaConf.to_container(self.cfg, resolve=True))

    def perform(self) -> float | None:
        """Carry out the task; return what a sweep optimises: the monitored metric of the best checkpoint of a training.

        Raises:
            EspalierError: memory or disk did not suffice, or the training diverged.
        """
        try:
            self._introduce()
            instantiate(self.cfg.task, _partial_=True)(self)
            return self.best_score if self.has_trained else None
        except StoppedError:
            if self.cfg.requeue and is_first_rank():
                requeue()
            raise
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and CPU_IS_FULL not in str(error):
                raise
            raise EspalierError(
                f"out of memory: {str(error).splitlines()[0]}; try a data.batch_size below {self.cfg.data.batch_size} "
                "with as much more trainer.accumulate_grad_batches, or trainer.precision=bf16-mixed"
            ) from error
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            where = error.filename or self.folder
            raise EspalierError(f"{where}: not written, {error.strerror}; make room") from error
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
        before, now = global_batch.of(self.resumed.content), self._split
        if before and now and now != before:
            self.say(f"goes on with {now}, after {before}: {now.samples_of_step} in a step, as before")
        kept = () if before is None else runs.DEVICES if before == now else (*runs.DEVICES, *runs.BATCHES)
        changes = runs.changes(self.resumed.config, self.cfg, but=kept)
        if changes:
            self.say(f"goes on, but is no longer the run it was: {', '.join(changes)}")
        if self.resumed.content.get("has_stopped"):
            self.say(
                "its training had stopped by itself, so no more is trained; "
                f"to train its network further: espalier train source={self.folder}"
            )

    @property
    def _split(self) -> global_batch.Split | None:
        """How the samples of a step are spread now; None where the checkpoint that this goes on from does not say."""
        before = global_batch.of(self.resumed.content) if self.resumed else None
        return before and replace(
            before,
            num_devices=self.trainer.world_size,
            batch_size=self.cfg.data.batch_size,
            accumulate=self.cfg.trainer.accumulate_grad_batches,
        )

    def fit(self) -> Path | None:
        """Train, then apply what works on a trained network; the checkpoint of the result, None where none is kept.

        Compressing always keeps one. A recipe without a method that trains leaves the source's weights as they are.
        """
        late = [method for method in self.compressions if not method.trains]
        weights = None
        if self.task == "train" or len(late) < len(self.compressions):
            self.trainer.fit(self.learner, self.data, ckpt_path=self.resumed.path if self.resumed else None)
            weights = self.best_checkpoint or self.last_checkpoint or self.learner.save_last()
        if not late and (weights or self.task == "train"):
            return weights
        if weights:
            checkpoint.load_weights(self.learner.model, checkpoint.load("source", weights))
        for method in late:
            self.learner.model, entry = method.apply_to(self.learner.model)
            self.ledger.append(entry)
        weights = self.folder / "checkpoints" / COMPRESSED
        if is_first_rank():
            self.checkpoint_io.save_network(self.learner.model, weights)
        return weights

    def measure(self, split: Literal["train", "val", "test"], weights: Path | None = None) -> dict[str, float]:
        """Metrics of a whole split, named `split/...`, with the given checkpoint's weights or the present ones."""
        self.data.tested_split = split
        [values] = self.trainer.test(self.learner, self.data, ckpt_path=weights, verbose=False)
        return {name.replace("test/", f"{split}/"): value for name, value in values.items()}

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint that this run's training found best; None where it saved nothing."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        return Path(best) if best and Path(best).is_file() else None

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint of its last step; None where it saved none."""
        keeper = self.trainer.checkpoint_callback
        if isinstance(keeper, ModelCheckpoint) and keeper.save_last and self.trainer.global_step > 0:
            return Path(keeper.last_model_path)
        return None

    @property
    def best_score(self) -> float | None:
        """The monitored metric of the best checkpoint; None where nothing was saved."""
        score = getattr(self.trainer.checkpoint_callback, "best_model_score", None)
        return None if score is None else float(score)

    def cost(self, weights: Path | None) -> dict[str, Any]:
        """Name, runtime and counted cost of the network in a checkpoint file, or of the present one."""
        model = self.network(checkpoint.load("source", weights)) if weights else self.learner.model
        return {
            "name": str(self.cfg.model._target_).rpartition(".")[2],
            "runtime": "torch",
            **cost.counts(model, self.data.spec.shape),
            **({"size_bytes": cost.size_bytes(weights)} if weights else {}),
        }

    def speed(self) -> dict[str, float]:
        """Seconds and throughput of the training so far; empty without the monitor."""
        for callback in self.callbacks:
            if isinstance(callback, Monitor):
                return {"seconds": callback.train_seconds, "samples_per_second": callback.samples_per_second}
        return {}

    def record(self) -> None:
        """Write down what this run is made of: config, overrides, provenance."""
        _ = self.trainer  # built first: a run that cannot be built leaves nothing behind
        self._announce()
        for logger in self.loggers:
            logger.log_hyperparams(self._plain_config())
        if not is_first_rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            (self.folder / "metrics.csv").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        OmegaConf.save(OmegaConf.create(self._plain_config()), self.folder / "config.yaml")
        OmegaConf.save(OmegaConf.create(secret.scrub_words(self.words)), self.folder / "overrides.yaml")
        (self.folder / "provenance.json").write_text(json.dumps(provenance.collect(), indent=2) + "\n")

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
        planned, spec = plan.of_training(self.trainer, self.data, is_tested=self.task == "train"), self.data.spec
        outputs = f"{spec.num_classes} classes" if spec.num_classes else "one number"
        samples, steps = planned.lines
        shape = " x ".join(map(str, spec.shape))
        self.say(f"{plan.device(self.trainer)}; {spec.name}: {samples} of {shape}, {outputs}; {steps}")
        for warning in planned.warnings if is_first_rank() else ():
            log.warning(warning)

    def publish(
        self, rows: list[dict[str, Any]], notes: Sequence[str], ratios: dict[str, float] | None = None
    ) -> Report:
        """Report what was measured: files, figures, loggers, and the table that the user sees."""
        source = str(self.sources[0].path) if self.sources else None
        found = self.data.notes if "data" in self.__dict__ else []
        done = Report(self.task, str(self.folder), source, self.cfg.seed, rows, ratios or {}, [*notes, *found])
        if is_first_rank():
            self._draw(rows)
            for logger in self.loggers:
                log_report(logger, done)
            report.write(done, self.folder)  # last: a folder with a report is a finished run
            console = terminal.console()
            console.print(report.table(done, console.width))
            for profile in sorted(self.folder.glob(f"*-{PROFILE}.txt")):
                self.say(f"profile: {profile}")
            self.say(f"report: {self.folder / report.MARKDOWN_NAME}")
        return done

    def _draw(self, rows: list[dict[str, Any]]) -> None:
        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        if (self.folder / "metrics.csv").exists() and self.task in TRAINS:
            figures.curves(self.folder / "metrics.csv", folder / "curves.png")
        if self.task == "compress":
            figures.trade_off(rows, folder / "trade_off.png")
        tables = self.learner.measured.get("test", {}) if "learner" in self.__dict__ else {}
        if "test/confusion_KK" in tables:
            names = self.data.spec.class_names
            figures.confusion_matrix(tables["test/confusion_KK"], names, folder / "confusion.png")
        if "test/pairs_N2" in tables:
            predicted, true = tables["test/pairs_N2"].unbind(1)
            figures.predicted_vs_true(predicted, true, folder / "predictions.png")

    def say(self, line: str) -> None:
        """One line for the user, from the first rank alone."""
        if is_first_rank():
            terminal.console(soft_wrap=True).print(terminal.printable(line))


def is_first_rank() -> bool:
    """Whether this process is the one that writes and speaks."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)


def require_same_data(key: str, data: DataModule, source: Checkpoint | Bundle) -> None:
    """Raise `ConfigError` if samples or classes are not those that the source was trained with."""
    now, then = data.spec, source.spec
    if (now.shape, now.class_names) != (then.shape, then.class_names):
        raise ConfigError(
            f"{key}={source.path}: trained on {then.name} {then.shape} with {then.num_outputs} outputs, "
            f"but data is {now.name} {now.shape} with {now.num_outputs}"
        )


def require_same_samples(data: DataModule, resumed: Checkpoint) -> None:
    """Raise `ConfigError` if a run cannot go on as it began, because its data have changed since."""
    now, then = data.spec, resumed.spec
    if (now.shape, now.class_names, now.class_counts) != (then.shape, then.class_names, then.class_counts):
        raise ConfigError(
            f"resume={resumed.path}: began with {sum(then.class_counts)} training samples of {then.num_outputs} "
            f"outputs, and the data have {sum(now.class_counts)} of {now.num_outputs} now; bring them back as they "
            "were, or start a new run with source="
        )


def _new_model(node: DictConfig, spec: DataSpec) -> nn.Module:
    return _build("model", node, input_shape=spec.shape, num_outputs=spec.num_outputs)


def _stored_model(stored: Checkpoint) -> nn.Module:
    """Of a checkpoint, which may name only what is trusted, wherever it was read."""
    node = OmegaConf.create({"model": stored.config.get("model")})
    check(node, untrusted=True)
    return _new_model(node.model, stored.spec)


def _build(key: str, node: DictConfig, **supplied: Any) -> Any:
    """The object that a config node describes, given the arguments of `targets.SUPPLIED` that it accepts.

    Raises:
        ConfigError: the object refuses its arguments; the message names `key`.
    """
    secret.require_told(OmegaConf.to_container(node, resolve=True), key)
    factory = instantiate(node, _partial_=True, _convert_="all")
    accepted = inspect.signature(factory.func).parameters
    try:
        return factory(**{name: value for name, value in supplied.items() if name in accepted})
    except (ValueError, TypeError, ImportError, MisconfigurationException, InstantiationException) as error:
        raise ConfigError(f"{key}: {error}") from error
    except RuntimeError as error:
        if not any(reason in str(error) for reason in TOO_LARGE):
            raise
        raise ConfigError(f"{key}: does not fit into memory, {str(error).splitlines()[0]}") from error
