"""Build Lightning's trainer with this project's replacements, and read its state after a training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from omegaconf import DictConfig

from espalier.composition import build
from espalier.composition.results import PROFILE
from espalier.errors import ConfigError
from espalier.learners.position import FitLoop
from espalier.loggers.fault_tolerant import Guarded
from espalier.runs.checkpoint import CheckpointIO
from espalier.runs.run_folder import RESUMED, RunFolder
from espalier.strategies.environment import environments
from espalier.strategies.precision import HalfNetwork

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def build_trainer(
    node: DictConfig,
    profiler: Profiler | None,
    callbacks: Sequence[L.Callback],
    loggers: Sequence[Guarded],
    checkpoint_io: CheckpointIO,
    folder: Path,
) -> L.Trainer:
    """Return the trainer of a run that writes into `folder`.

    Raises:
        ConfigError: Lightning refuses the settings, or not all of the launched devices take part.
    """
    trainer = build.part(
        "trainer",
        node,
        **({"profiler": profiler} if profiler else {}),
        callbacks=callbacks,
        logger=loggers,
        plugins=[checkpoint_io, *environments()],
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,  # conf/callbacks/progress.yaml and summary.yaml stand for Lightning's own
        enable_model_summary=False,
        num_sanity_val_steps=0,  # a resumed run would skip them, an unbroken one not
        use_distributed_sampler=False,  # data/loaders.py shards, and loses or repeats no sample
    )
    trainer.fit_loop = FitLoop(trainer)
    # At SIGTERM Lightning would wait for all ranks, inside of the handler and wherever they are.
    trainer._signal_connector._sigterm_notifier_fn = lambda number, frame: None
    # It would ask the first rank for that before every batch, and wait for the answer (processes/stop_signal.py).
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    actual, wanted = trainer.world_size, trainer.num_devices * trainer.num_nodes
    if actual != wanted:  # each of them would train and be tested on its part of the data alone
        raise ConfigError(f"trainer.devices: {wanted} in all, but only {actual} take part in this run")
    if isinstance(trainer.precision_plugin, HalfPrecision):
        trainer.strategy.precision_plugin = HalfNetwork(trainer.precision_plugin.precision)
    return trainer


def profiler_of(node: DictConfig, folder: Path) -> Profiler | None:
    """Return Lightning's profiler of that name, which writes into the run folder, or None if no name is given.

    Raises:
        ConfigError: Lightning has no profiler of that name.
    """
    name = node.get("profiler")
    if not isinstance(name, str):
        return None
    if name not in PROFILERS:
        raise ConfigError(f"trainer.profiler={name}: no such profiler; it is one of {', '.join(PROFILERS)}, or null")
    return PROFILERS[name](dirpath=folder, filename=PROFILE)


def kept(trainer: L.Trainer) -> Path | None:
    """Return the best checkpoint of the training, else that of its last step; None if it saved none."""
    keeper = trainer.checkpoint_callback
    best = getattr(keeper, "best_model_path", "")
    if best and Path(best).is_file():
        return Path(best)
    if isinstance(keeper, ModelCheckpoint) and keeper.save_last and trainer.global_step > 0:
        return Path(keeper.last_model_path)
    return None


def discard_stopped(trainer: L.Trainer) -> None:
    """Delete the checkpoint that a signal left in a run that keeps only its best, once the run is finished."""
    keeper = trainer.checkpoint_callback
    if not isinstance(keeper, ModelCheckpoint) or keeper.save_last or not kept(trainer) or not trainer.is_global_zero:
        return
    for name in RESUMED:
        path = RunFolder(Path(trainer.default_root_dir)).checkpoints / name
        if path.exists():
            trainer.strategy.checkpoint_io.remove_checkpoint(path)


def monitored(trainer: L.Trainer) -> dict[str, Any] | None:
    """Return name, direction and value of the metric that the best checkpoint was chosen by, or None."""
    keeper = trainer.checkpoint_callback
    if not isinstance(keeper, ModelCheckpoint) or keeper.best_model_score is None:
        return None
    return {"metric": keeper.monitor, "mode": keeper.mode, "value": float(keeper.best_model_score)}
