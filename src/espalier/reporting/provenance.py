"""The origin of a number: code, packages, hardware, command. Reads this machine only and never fails."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from espalier.config import overrides, redaction

SAID = ("espalier", "torch", "lightning")  # versions that a report names; provenance.json has more
SOURCE = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("espalier", "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy", "scikit-learn"),
    *("wandb", "matplotlib", "datasets", "pytorch-optimizer"),
)
GIT_SECONDS = 10  # a hanging network file system must not hold up a run


def collect() -> dict[str, Any]:
    """Return where the run comes from, in plain types for `provenance.json`; what cannot be found out is None."""
    return {
        "git": git(SOURCE),
        "command": redaction.scrub_words(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "hardware": hardware(),
        "lock_sha256": lock_sha256(SOURCE),
    }


def paragraph(origin: Mapping[str, Any], data: str, when: datetime) -> str:
    """Return what `collect` found as a sentence of Markdown: command, date, data, versions, hardware."""
    task, *words = [word.removeprefix("task=") for word in origin["command"][1:] or ["?"]]
    typed = " ".join(["espalier", task, *map(overrides.retyped, words)]).replace("`", "'")
    commit, hardware = origin["git"], origin["hardware"]
    changed = ", changed" if commit and commit["dirty"] else ""
    at = f" ({commit['commit'][:7]}{changed})" if commit else ""
    versions = ", ".join(f"{name} {origin['packages'][name]}" for name in SAID if name in origin["packages"])
    devices = ", ".join([f"{hardware['cpu'] or 'CPU'} with {hardware['cores']} cores", *hardware["gpus"]])
    return (
        f"Made by `{typed}`, {when:%Y-%m-%d %H:%M}{f', on {data}' * bool(data)}; {versions}{at}, "
        f"Python {origin['python']}; {devices}."
    )


def git(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the repository around `folder`, and whether files differ from it; None outside git."""
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain")
    return None if commit is None else {"commit": commit, "dirty": bool(status)}


def hardware() -> dict[str, Any]:
    """Return the CPU model, the number of cores this process may use, memory in bytes and the names of the GPUs."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
    }


def lock_sha256(folder: Path) -> str | None:
    """Return the hash of the nearest `requirements.lock` at or above `folder`, or None."""
    for place in (folder, *folder.parents):
        file = place / "requirements.lock"
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    return None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[str]:
    try:
        return [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    except RuntimeError:
        return []  # a driver that does not answer
