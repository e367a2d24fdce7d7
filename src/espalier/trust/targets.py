"""Limit what a configuration from a checkpoint may name and ask for; it is untrusted, wherever the file was read."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from espalier.config.check import check_plain, locate
from espalier.errors import ConfigError

LOSSES = (  # of torch, by the names that people type
    *("CrossEntropyLoss", "MultiMarginLoss", "NLLLoss"),
    *("HuberLoss", "L1Loss", "MSELoss", "PoissonNLLLoss", "SmoothL1Loss"),
)
# A config that came out of a checkpoint is untrusted, and nothing else is ever built from it. A name that ends with a
# dot is a package: of the classes that are defined there, those with one of the bases `BASES`.
TRUSTED_TARGETS: dict[str, tuple[str, ...]] = {
    "data": ("espalier.data.",),
    "model": ("espalier.models.",),
    "learner": ("espalier.learners.",),
    "learner.loss": ("espalier.learners.", "torch.nn.modules.loss.", *(f"torch.nn.{name}" for name in LOSSES)),
    "learner.metrics": ("espalier.learners.", "torchmetrics.classification.", "torchmetrics.regression."),
    "optimizer": ("espalier.optim.", "torch.optim."),
    "scheduler": ("espalier.optim.schedules.", "torch.optim.lr_scheduler."),
    "compression": ("espalier.compression.",),
    "callbacks": (
        "espalier.callbacks.",
        "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
        "lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor",
        "lightning.pytorch.callbacks.timer.Timer",
    ),
    "logger": ("espalier.loggers.", "espalier.loggers.tensorboard_log.tensorboard"),
    "trainer": (
        "lightning.pytorch.trainer.trainer.Trainer",
        "lightning.pytorch.strategies.ddp.DDPStrategy",
        "lightning.pytorch.strategies.fsdp.FSDPStrategy",
        "espalier.strategies.ddp.Replicated",
        "espalier.strategies.fsdp.FullyShardedData",
        "espalier.profiling.idle_profiler.IdleProfiler",
    ),
    "task": ("espalier.tasks.train.train", "espalier.tasks.compress.compress"),
}
BASES: dict[str, tuple[str, ...]] = {
    "data": ("lightning.pytorch.core.datamodule.LightningDataModule", "espalier.data.augment.Augmentation"),
    "model": ("torch.nn.modules.module.Module",),
    "learner": ("lightning.pytorch.core.module.LightningModule",),
    "learner.loss": ("torch.nn.modules.module.Module",),
    "learner.metrics": ("torchmetrics.metric.Metric",),
    "optimizer": ("torch.optim.optimizer.Optimizer",),
    "scheduler": ("torch.optim.lr_scheduler.LRScheduler",),
    "compression": ("lightning.pytorch.callbacks.callback.Callback",),
    "callbacks": ("lightning.pytorch.callbacks.callback.Callback",),
    "logger": ("lightning.fabric.loggers.logger.Logger",),
}
PURE = "espalier.optim.schedules."  # its functions are trusted like classes: numbers in, a number out
PARTIAL = ("optimizer", "scheduler")  # groups whose objects get their last arguments later
WRITES = ("callbacks", "logger", "trainer")  # groups whose objects write files
PLACE = re.compile(r".*(://|::)|[/~\\]|[A-Za-z]:[/\\]|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)  # not below the run


def check_stored(cfg: DictConfig, said: DictConfig | None = None) -> None:
    """Raise `ConfigError` as `config.check.check` does, and for anything that a checkpoint may not ask for.

    A stored configuration may name only `TRUSTED_TARGETS`, interpolate nothing, and write only to places that the user
    has `said` too.
    """
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    suspicions = (problem for group, node in plain.items() for problem in _suspicions(node, str(group), said))
    if problem := next(suspicions, None):  # one is enough; its author may have thought of thousands
        raise ConfigError(" ".join(problem.split()))
    check_plain(plain)


def _suspicions(node: Any, where: str, said: DictConfig | None) -> Iterator[str]:
    """Yield each entry that a configuration from a checkpoint may not have."""
    group = where.partition(".")[0]
    shown = f"{where}={str(node)[:80]}"
    if isinstance(node, list):
        for place, child in enumerate(node):
            yield from _suspicions(child, f"{where}[{place}]", said)
    if isinstance(node, str) and "${" in node:
        yield f"{shown}: a checkpoint may not interpolate"
    elif isinstance(node, str) and group in WRITES and PLACE.match(node) and _of_user(said, where) != node:
        yield f"{shown}: a place that no checkpoint chooses; if you mean it, say it again: {shown}"
    if not isinstance(node, dict):
        return
    for key, child in node.items():
        if str(key).startswith("_") and key != "_target_" and not (key == "_partial_" and where in PARTIAL):
            yield f"{where}.{str(key)[:80]}: a checkpoint may not change how it is built"
        yield from _suspicions(child, f"{where}.{key}", said)
    inside = ".".join(where.split(".")[:2])
    kind = inside if inside in TRUSTED_TARGETS else group
    if "_target_" in node and not _is_trusted(node["_target_"], kind):
        name = str(node["_target_"])[:80]
        yield f"{where}._target_={name}: not built from a checkpoint; see TRUSTED_TARGETS in trust/targets.py"


def _of_user(said: DictConfig | None, where: str) -> Any:
    try:
        return None if said is None else OmegaConf.select(said, where)
    except OmegaConfBaseException:  # a key of the checkpoint that is no key of ours
        return None


def _is_trusted(name: Any, group: str) -> bool:
    """Return whether `name`, and the object that it is an alias of, are in `TRUSTED_TARGETS`."""
    names = TRUSTED_TARGETS.get(group, ())
    if not isinstance(name, str) or not all(map(str.isidentifier, name.split("."))):
        return False
    if not any(name == each or (each.endswith(".") and name.startswith(each)) for each in names):
        return False
    try:
        target = locate(name)
    except ConfigError:
        return True  # which `_problems` explains
    home, own = str(getattr(target, "__module__", "")), str(getattr(target, "__qualname__", ""))
    full = f"{home}.{own}"
    if full in names:
        return True
    if "." in own or not any(each.endswith(".") and full.startswith(each) for each in names):
        return False
    if not inspect.isclass(target):
        return full.startswith(PURE) and not own.startswith("_")
    bases = {f"{base.__module__}.{base.__qualname__}" for base in target.__mro__}
    return not bases.isdisjoint(BASES[group])
