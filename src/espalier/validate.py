"""Turn a composed configuration into a `Run`: take over what other runs decide, and check all that can be checked.

Nothing is built here, so a mistake costs one line and no time.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from espalier.compression.base import check_recipe
from espalier.config import inherit, redaction
from espalier.config.check import check
from espalier.config.conf_dir import TRAINS
from espalier.config.overrides import check_lists, parse, typed
from espalier.errors import ConfigError
from espalier.export import bundle
from espalier.export.bundle import Bundle
from espalier.learners.position import epochs_begun, finished
from espalier.processes import global_batch, launchers
from espalier.processes.stop_signal import JOB
from espalier.run import Run
from espalier.runs import checkpoint, references, run_folder
from espalier.runs.checkpoint import Checkpoint
from espalier.runs.run_folder import RunFolder
from espalier.trust import metadata
from espalier.trust.targets import check_stored

REPLICATED = "espalier.strategies.ddp.Replicated"
GPU = ("gpu", "cuda")
SPREAD = ("train", "compress", "evaluate")  # tasks that Lightning carries out, on as many devices as it has
FORKING = ("ddp_spawn", "ddp_fork", "ddp_notebook")  # Lightning's strategies that return nothing but weights
MAY_CHANGE = {
    "train": inherit.NETWORK,
    "predict": ("data",),
}  # what a task takes from the command line beside a source


def prepare(cfg: DictConfig, words: Sequence[str], folder: Path, task: str) -> Run:
    """Return the run that this configuration describes.

    Raises:
        ConfigError: one line per problem.
    """
    overrides = parse(words)
    check_lists(overrides)
    redaction.refuse_written(OmegaConf.to_container(cfg))
    _check_interpolations(cfg)
    _check_combination(cfg, task)
    sources: list[Checkpoint | Bundle] = []
    resumed = None
    if cfg.source and task != "report":  # which reads reports, no networks
        sources = [_source(each, task) for each in references.split(cfg.source)]
        cfg = inherit.from_source(cfg, sources[0].config, overrides, may_change=MAY_CHANGE.get(task, ()))
    if cfg.resume:
        resumed = checkpoint.load_run("resume", cfg.resume, run_folder.RESUMED)
        metadata.require_state("resume", resumed.path, resumed.content)
        check_stored(OmegaConf.create(resumed.config), said=cfg)
        cfg = inherit.from_resumed(cfg, resumed.config, overrides)
        _check_position(cfg.trainer, resumed)
        task = str(cfg.task._target_).rpartition(".")[2]  # goes on as what it was
        sources = [_source(str(cfg.source), task)] if task == "compress" else []
    check(cfg)
    _check_devices(cfg.trainer)
    if resumed:
        cfg = _keep_global_batch(cfg, resumed, task)
    if cfg.compression and _splits_weights(cfg.trainer.strategy):
        raise ConfigError("trainer.strategy: a recipe needs whole weights on each device; use strategy=ddp or ddp_cpu")
    if cfg.compression and not resumed:
        check_recipe(_methods(cfg.compression), sources[0].history if sources else [])
    return Run(cfg, words, folder, task, tuple(sources), resumed)


def _keep_global_batch(cfg: DictConfig, resumed: Checkpoint, task: str) -> DictConfig:
    """Return `cfg` with the batch size and accumulation that keep the steps of the resumed run on the present devices.

    Raises:
        ConfigError: there are none, or the weights are spread over the devices in another way.
    """
    if _splits_weights(cfg.trainer.strategy) != _splits_weights(OmegaConf.create(resumed.config).trainer.strategy):
        raise ConfigError("strategy: a resumed run keeps whole weights whole, and sharded ones sharded; use its own")
    trainer = cfg.trainer
    num_devices = count_devices(trainer, task) * trainer.num_nodes
    limit = trainer.limit_val_batches
    scales_validation = limit != 0 and (isinstance(limit, int) or limit < 1)
    split = global_batch.follow(resumed.content, num_devices, trainer.accumulate_grad_batches, scales_validation)
    if split is None:
        return cfg
    result = cfg.copy()
    result.data.batch_size = split.batch_size
    result.trainer.accumulate_grad_batches = split.accumulate
    result.trainer.limit_train_batches = split.num_batches  # or an epoch might have room for one batch more
    if 0 < split.val_check_batch != split.num_batches:
        OmegaConf.update(result, "trainer.val_check_interval", split.val_check_batch, force_add=True)
    if scales_validation:
        result.trainer.limit_val_batches = split.num_val_batches
    return result


def _check_interpolations(cfg: DictConfig) -> None:
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _check_combination(cfg: DictConfig, task: str) -> None:
    if cfg.resume and task not in TRAINS:
        raise ConfigError(f"resume={cfg.resume}: only what trains resumes; {task} takes source=RUN")
    if cfg.compression and task not in TRAINS:
        raise ConfigError(
            f"compression=[{','.join(cfg.compression)}]: {task} measures; say espalier compress source=RUN"
        )
    if cfg.requeue and JOB not in os.environ:
        raise ConfigError(f"requeue=true: this is no job of SLURM, as {JOB} is not set; drop it")
    if cfg.source and cfg.resume:
        raise ConfigError(f"source={cfg.source}: a resumed run has its weights already; drop source or resume")
    if cfg.source and task not in run_folder.TAKES_SEVERAL and len(references.split(cfg.source)) > 1:
        raise ConfigError(
            f"source={cfg.source}: {task} takes one RUN; several go to {' or '.join(run_folder.TAKES_SEVERAL)}"
        )


def _check_position(trainer: DictConfig, resumed: Checkpoint) -> None:
    """Raise `ConfigError` if the checkpoint cannot be resumed, or fewer epochs or steps are asked for than are done."""
    run = RunFolder.of(resumed.path).path
    if resumed.content.get("is_between_steps") is False:
        raise ConfigError(
            f"resume={resumed.path}: of a validation between two batches of one optimizer step, so nothing goes on "
            f"from it exactly; resume={run} goes on from its last checkpoint"
        )
    try:
        num_epochs, num_steps = epochs_begun(resumed.content), int(resumed.content["global_step"])
        finished(resumed.content)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"resume={resumed.path}: does not say how far its training had come") from error
    limits = (("max_epochs", num_epochs, "epoch"), ("max_steps", num_steps, "step"))
    for name, done, what in limits:
        limit = trainer.get(name)
        if isinstance(limit, int) and 0 <= limit < done:
            raise ConfigError(
                f"trainer.{name}={limit}: this run is in {what} {done} already; say at least {done}, or measure what "
                f"it has: espalier evaluate source={run}"
            )


def _source(reference: str, task: str) -> Checkpoint | Bundle:
    """Return the exported bundle that a RUN holds, else its checkpoint."""
    path = references.find("source", reference)
    exported = references.bundle_in(path)
    if exported is None and task in run_folder.TAKES_BUNDLE:
        raise ConfigError(
            f"source={reference}: holds no exported bundle; make one: espalier export {typed('source', reference)}"
        )
    if exported is not None and not (task in run_folder.READS_BUNDLE or task in run_folder.TAKES_BUNDLE):
        raise ConfigError(f"source={reference}: {task} needs the trained RUN, not the bundle that was exported from it")
    stored: Checkpoint | Bundle
    if exported:
        stored = bundle.read("source", exported)
        said = (stored.content.get(name) for name in ("config", "data", "compression"))
        metadata.require_described("source", exported, *said)
    else:
        stored = checkpoint.load_run("source", reference, run_folder.EVALUATED)
    if missing := [group for group in inherit.NETWORK if group not in stored.config]:
        raise ConfigError(f"source={reference}: its configuration has no {' and no '.join(missing)}")
    check_stored(OmegaConf.create({group: stored.config[group] for group in inherit.NETWORK}))
    return stored


def _methods(recipe: DictConfig) -> list[str]:
    """Return the name of each method's file; its key in the configuration may differ."""
    return [str(node._target_).split(".")[-2] for node in recipe.values()]


def _splits_weights(strategy: Any) -> bool:
    return (OmegaConf.is_dict(strategy) and strategy._target_ != REPLICATED) or "fsdp" in str(strategy)


def _check_devices(trainer: DictConfig) -> None:
    """Raise `ConfigError`, before Lightning starts processes, for devices that are missing or would lose results."""
    if str(trainer.strategy).startswith(FORKING):
        raise ConfigError(
            f"trainer.strategy={trainer.strategy}: its processes keep what they measure; use strategy=ddp or ddp_cpu"
        )
    num_gpus = torch.cuda.device_count()
    if trainer.accelerator in GPU and not num_gpus:
        raise ConfigError(
            f"trainer.accelerator={trainer.accelerator}: this machine has no GPU; use strategy=cpu or ddp_cpu"
        )
    on_gpu = _is_on_gpu(trainer)
    limit = num_gpus if on_gpu else max(2, os.cpu_count() or 1)  # two processes share one core, for tests
    wanted = trainer.devices if isinstance(trainer.devices, int) else 1
    if wanted > limit or wanted == 0:
        raise ConfigError(f"trainer.devices={wanted}: this machine has {limit} {'GPUs' if on_gpu else 'CPU cores'}")
    if trainer.precision == "16-true" and not on_gpu:
        raise ConfigError("trainer.precision=16-true: trains on GPUs alone; say bf16-true or bf16-mixed")
    if trainer.sync_batchnorm and not on_gpu:
        raise ConfigError("trainer.sync_batchnorm=true: torch synchronises batch norm on GPUs only; set it to false")


def _is_on_gpu(trainer: DictConfig) -> bool:
    return trainer.accelerator in GPU or (trainer.accelerator == "auto" and torch.cuda.device_count() > 0)


def num_processes(run: Run) -> int:
    """Return how many processes the task starts on this machine; 1 if a launcher starts them.

    Raises:
        ConfigError: `trainer.devices` is no number of devices, or contradicts the launcher.
    """
    trainer, launcher = run.cfg.trainer, launchers.find()
    num_devices = count_devices(trainer, run.task)
    if run.task not in SPREAD:
        return 1
    if launcher:
        launcher.require(num_devices, trainer.num_nodes)
    else:
        launchers.require_nodes(trainer.num_nodes)
    return 1 if launcher or trainer.num_nodes > 1 else num_devices


def count_devices(trainer: DictConfig, task: str) -> int:
    """Return how many devices of one machine the task uses.

    Raises:
        ConfigError: `trainer.devices` is no number of devices.
    """
    if task not in SPREAD or trainer.accelerator not in (*GPU, "cpu", "auto"):
        return 1
    accelerator = CUDAAccelerator if _is_on_gpu(trainer) else CPUAccelerator
    if trainer.devices == "auto":
        return accelerator.auto_device_count()
    devices: Any = list(trainer.devices) if OmegaConf.is_list(trainer.devices) else trainer.devices
    try:
        parsed = accelerator.parse_devices(devices)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"trainer.devices={trainer.devices}: {error}") from error
    return parsed if isinstance(parsed, int) else len(parsed or ())


def check_trial(trainer: DictConfig, task: str) -> None:
    """Raise `ConfigError` if a trial of a sweep needs several processes, which only a launcher could start."""
    count = count_devices(trainer, task) * (trainer.num_nodes if task in SPREAD else 1)
    if count > 1 and launchers.find() is None:
        raise ConfigError(
            f"trainer.devices={trainer.devices}: of the {count} processes of a trial each would start the whole sweep; "
            f"use one command per trial, or start the processes yourself: torchrun --nproc-per-node {count} "
            "-m espalier.cli train -m ..."
        )
