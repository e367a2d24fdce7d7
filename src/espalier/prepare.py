"""From a composed configuration to a `Run`: what other runs decide is settled, what can be checked is checked.

Nothing is built here, so a mistake costs one line and no time.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from espalier import checkpoint, runs
from espalier.checkpoint import Checkpoint
from espalier.compression.base import check_recipe
from espalier.config import check_lists
from espalier.errors import ConfigError
from espalier.export import bundle
from espalier.export.bundle import Bundle
from espalier.run import EVALUATED, RESUMED, TAKES_RECIPE, Run
from espalier.targets import check

FORKING = ("ddp_spawn", "ddp_fork", "ddp_notebook")  # Lightning's strategies that return nothing but weights
MAY_CHANGE = {"train": runs.NETWORK, "predict": ("data",)}  # what a task takes from the command line beside a source


def prepare(cfg: DictConfig, words: Sequence[str], folder: Path, task: str) -> Run:
    """The run that this configuration describes.

    Raises:
        ConfigError: one line per problem.
    """
    check_lists(words)
    _check_combination(cfg, task)
    sources: list[Checkpoint | Bundle] = []
    resumed = None
    if cfg.source and task != "report":  # which reads reports, no networks
        sources = [_source(each, task) for each in runs.split(cfg.source)]
        cfg = runs.from_source(cfg, sources[0].config, words, may_change=MAY_CHANGE.get(task, ()))
    if cfg.resume:
        resumed = checkpoint.load_run("resume", cfg.resume, RESUMED)
        check(OmegaConf.create(resumed.config), untrusted=True)
        cfg = runs.from_resumed(cfg, resumed.config, words)
        task = str(cfg.task._target_).rpartition(".")[2]  # goes on as what it was
        sources = [checkpoint.load_run("source", cfg.source, EVALUATED)] if task == "compress" else []
    check(cfg)
    _check_devices(cfg.trainer)
    if cfg.compression and (OmegaConf.is_dict(cfg.trainer.strategy) or "fsdp" in str(cfg.trainer.strategy)):
        raise ConfigError("trainer.strategy: a recipe needs whole weights on each device; use strategy=ddp or ddp_cpu")
    if cfg.compression and not resumed:
        check_recipe(_methods(cfg.compression), sources[0].ledger if sources else [])
    return Run(cfg, words, folder, task, tuple(sources), resumed)


def _check_combination(cfg: DictConfig, task: str) -> None:
    if cfg.resume and task not in TAKES_RECIPE:
        raise ConfigError(f"resume={cfg.resume}: only what trains resumes; {task} takes source=RUN")
    if cfg.compression and task not in TAKES_RECIPE:
        raise ConfigError(
            f"compression=[{','.join(cfg.compression)}]: {task} measures; say espalier compress source=RUN"
        )
    if cfg.source and cfg.resume:
        raise ConfigError(f"source={cfg.source}: a resumed run has its weights already; drop source or resume")
    if cfg.source and task not in runs.TAKES_SEVERAL and len(runs.split(cfg.source)) > 1:
        raise ConfigError(f"source={cfg.source}: {task} takes one RUN; several go to {' or '.join(runs.TAKES_SEVERAL)}")


def _source(reference: str, task: str) -> Checkpoint | Bundle:
    """What a RUN stands for: its exported bundle where it holds one, else its checkpoint."""
    path = runs.find("source", reference)
    exported = runs.bundle_in(path)
    if exported is None and task in runs.TAKES_BUNDLE:
        raise ConfigError(f"source={reference}: holds no exported bundle; make one: espalier export source={reference}")
    if exported is not None and not (task in runs.READS_BUNDLE or task in runs.TAKES_BUNDLE):
        raise ConfigError(f"source={reference}: {task} needs the trained RUN, not the bundle that was exported from it")
    stored = bundle.read("source", exported) if exported else checkpoint.load_run("source", reference, EVALUATED)
    if missing := [group for group in runs.NETWORK if group not in stored.config]:
        raise ConfigError(f"source={reference}: its configuration has no {' and no '.join(missing)}")
    check(OmegaConf.create({group: stored.config[group] for group in runs.NETWORK}), untrusted=True)
    return stored


def _methods(recipe: DictConfig) -> list[str]:
    """The file of each method; its key may have any name."""
    return [str(node._target_).split(".")[-2] for node in recipe.values()]


def _check_devices(trainer: DictConfig) -> None:
    """Refuse what this machine does not have, and what would lose results, before Lightning starts processes."""
    if str(trainer.strategy).startswith(FORKING):
        raise ConfigError(
            f"trainer.strategy={trainer.strategy}: its processes keep what they measure; use strategy=ddp or ddp_cpu"
        )
    wants_gpu = trainer.accelerator in ("gpu", "cuda")
    num_gpus = torch.cuda.device_count()
    if wants_gpu and not num_gpus:
        raise ConfigError(
            f"trainer.accelerator={trainer.accelerator}: this machine has no GPU; use strategy=cpu or ddp_cpu"
        )
    on_gpu = wants_gpu or (trainer.accelerator == "auto" and num_gpus)
    limit = num_gpus if on_gpu else max(2, os.cpu_count() or 1)  # two processes share one core, for tests
    wanted = trainer.devices if isinstance(trainer.devices, int) else 1
    if wanted > limit or wanted == 0:
        raise ConfigError(f"trainer.devices={wanted}: this machine has {limit} {'GPUs' if on_gpu else 'CPU cores'}")
    if trainer.sync_batchnorm and not on_gpu:
        raise ConfigError("trainer.sync_batchnorm=true: torch synchronises batch norm on GPUs only; set it to false")
