"""Suggest what an unknown word was meant to be: a name that is close, an option that has the key, a missing package."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf

from espalier.config.conf_dir import CONF, groups, package

PLUGINS = {  # of Hydra, by what chooses them; each is a package of its own
    "hydra/launcher": {
        "joblib": "hydra-joblib-launcher",
        "ray": "hydra-ray-launcher",
        "rq": "hydra-rq-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
    },
    "hydra/sweeper": {
        "ax": "hydra-ax-sweeper",
        "nevergrad": "hydra-nevergrad-sweeper",
        "optuna": "hydra-optuna-sweeper",
    },
}
INSTEAD = {  # keys that Lightning once had, or that others have, and what to say here
    "trainer.auto_lr_find": "try several: -m optimizer.lr=1e-3,3e-3,1e-2",
    "trainer.auto_scale_batch_size": "try several: -m data.batch_size=64,128,256",
    "trainer.gpus": "say strategy=gpu, or strategy=ddp with trainer.devices=2",
    "trainer.tpu_cores": "TPUs are not supported",
    "trainer.resume_from_checkpoint": "say resume=RUN",
    "trainer.weights_save_path": "say hydra.run.dir=FOLDER",
}


def nearest(word: str, names: Sequence[str]) -> str:
    """Return `; did you mean X?`, or an empty text if no name is close."""
    last = word.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in names}
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    close = close or [by_last[name] for name in get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else ""


def advice(key: str, names: Sequence[str]) -> str:
    """Return `; did you mean X?` if a name is close to the last part of `key`, else which options have the key."""
    if key in INSTEAD:
        return f"; {INSTEAD[key]}"
    by_last = {name.rpartition(".")[2]: name for name in names}
    if close := get_close_matches(key.rpartition(".")[2], list(by_last), n=1, cutoff=0.6):
        return f"; did you mean {by_last[close[0]]}?"
    holders = _options_with(key)
    if not holders:
        return ""
    group, is_list = holders[0].group, holders[0].is_list
    options = [each.option for each in holders if each.group == group]
    said = " and ".join(filter(None, (", ".join(options[:-1]), options[-1])))
    return f"; {group}=[{said}] has it" if is_list else f"; {group}={said} {'have' if len(options) > 1 else 'has'} it"


def names_in(parent: str) -> str:
    """Return the keys of an option that is not chosen, such as `compression.qat`, as text."""
    group, _, option = parent.rpartition(".")
    group = group.replace(".", "/")
    own = _own_keys(group, option) if option in groups().get(group, []) else set()
    names = sorted(name.removeprefix(f"{option}.") for name in own if name.startswith(f"{option}."))
    return ", ".join(name for name in names if not name.startswith("_"))


@dataclass(frozen=True)
class _Holder:
    """An option that has a key; an option of a list is named after itself."""

    group: str
    option: str
    is_list: bool


def _options_with(key: str) -> list[_Holder]:
    found = []
    for group, options in groups().items():
        for option in options:
            where = package(group, option)
            if where == "_global_" or not key.startswith(f"{where}."):
                continue
            own = _own_keys(group, option)
            if key.removeprefix(f"{where}.") in own:
                found.append(_Holder(group, option, is_list=option in own))
    return found


def _own_keys(group: str, option: str) -> set[str]:
    """Return the keys of an option's file and of the files that it builds on."""
    cfg = OmegaConf.load(CONF / group / f"{option}.yaml")
    assert isinstance(cfg, DictConfig)
    bases = [base for base in cfg.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    return set(keys(cfg)).union(*(_own_keys(group, base) for base in bases))


def missing_plugin(key: str, option: str) -> str:
    """Say which package brings this launcher or sweeper of Hydra, or which ones are installed."""
    if option in PLUGINS[key]:
        return f"{option} is not installed; run: pip install {PLUGINS[key][option]}"
    return f"no such option; {key} can be basic, or with a package of Hydra's {', '.join(PLUGINS[key])}"


def keys(node: Any, where: str = "") -> Iterator[str]:
    """Yield every key of a composed config by its dotted name, parents first."""
    for name in node:
        key = f"{where}{name}"
        yield key
        if OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node[name]):
            yield from keys(node[name], f"{key}.")
