"""Find out who started this process: torchrun, SLURM's srun, `espalier` itself, somebody by hand, or nobody.

A launcher numbers its processes in the environment, where variables of another program, an image or a shell may be left
over. Complete numbering is believed. It is refused in one line if the training would wait for processes that nobody
started, or leave out their part of the data.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from espalier.errors import ConfigError

BY_HAND = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # who starts each process sets all of them
WRITTEN = (*BY_HAND, "NODE_RANK")  # by Lightning, where one process trains as if there were others
INTERACTIVE = ("bash", "interactive")  # names of a job of SLURM in which a person types, as Lightning knows them
SPECIAL_STEP = 1 << 31  # numbers of SLURM from here on are no steps of srun: the batch script, an interactive shell


class LeftOverError(ConfigError):
    """Variables of a launcher that is not there; each process that finds them says so, as it may be the only one."""


@dataclass(frozen=True)
class Launcher:
    """The launcher that the environment names, how many processes it started, and the number of this one."""

    name: str
    rank: int
    num_processes: int
    missing: tuple[str, ...] = ()  # variables without which the processes do not find each other

    def require(self, num_devices: int, num_nodes: int) -> None:
        """Raise `ConfigError` unless the launcher has started as many processes as there are devices on all nodes."""
        wanted = num_devices * num_nodes
        asked = f"trainer.devices={num_devices}" + (f", trainer.num_nodes={num_nodes}" if num_nodes > 1 else "")
        if self.missing:
            if wanted > 1 or self.rank:
                raise LeftOverError(
                    f"LOCAL_RANK={self.rank}: left over, as {', '.join(self.missing)} {_is_or_are(self.missing)} not "
                    f"set; unset it, or let torchrun start the processes ({asked})"
                )
        elif self.num_processes != wanted:
            kind = LeftOverError if self.name == "WORLD_SIZE" else ConfigError
            raise kind(
                f"{asked}: takes {_processes(wanted)}, but {self._says} {self.num_processes}; "
                + self._remedy(num_devices, num_nodes)
            )

    @property
    def _says(self) -> str:
        return "WORLD_SIZE is" if self.name == "WORLD_SIZE" else f"{self.name} has started"

    def _remedy(self, num_devices: int, num_nodes: int) -> str:
        if self.name == "SLURM":
            nodes = f" --nodes={num_nodes}" if num_nodes > 1 else ""
            return f"use srun{nodes} --ntasks-per-node={num_devices}, or trainer.devices of as many as there are tasks"
        if self.name == "torchrun":
            return f"use --nproc-per-node {num_devices}, or trainer.devices of as many"
        return "unset WORLD_SIZE and LOCAL_RANK if they are left over"


def find() -> Launcher | None:
    """Return the launcher that started this process, or None if there is none and this process may start others.

    RANK and WORLD_SIZE alone, as containers have them, start nothing and are left alone. In a batch script of SLURM
    without srun there is one process, whatever SLURM_NTASKS says.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Launcher("torchrun", _number("RANK"), _number("WORLD_SIZE", 1))
    if is_task_of_slurm():
        return Launcher("SLURM", _number("SLURM_PROCID"), _number("SLURM_NTASKS", 1))
    if "LOCAL_RANK" in os.environ:
        missing = tuple(name for name in BY_HAND if name not in os.environ)
        rank = max(_number("LOCAL_RANK"), _number("NODE_RANK"))  # 0 for the first of all
        return Launcher("WORLD_SIZE", rank, _number("WORLD_SIZE", 1), missing)
    return None


def is_task_of_slurm() -> bool:
    """Return whether srun started this process, rather than a person in an interactive shell of SLURM."""
    if "SLURM_NTASKS" not in os.environ or os.environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return False
    step = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID", ""))
    in_step = step.isdigit() and int(step) < SPECIAL_STEP
    return in_step or "SLURM_STEP_NUM_TASKS" in os.environ or _number("SLURM_PROCID") > 0


def rank() -> int:
    """Return the number of this process; 0 is the one that writes files and prints."""
    try:
        launcher = find()
    except ConfigError:  # said by the first that looks
        return 0
    return launcher.rank if launcher and not launcher.missing else 0


@contextmanager
def taken_back() -> Iterator[None]:
    """Restore at the end of the block the variables by which Lightning numbers a process, for the next trial."""
    before = {name: os.environ.get(name) for name in WRITTEN}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def require_nodes(num_nodes: int) -> None:
    """Raise `ConfigError` if several machines are asked for but no launcher has started processes there."""
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if num_nodes > 1 and missing:
        raise ConfigError(
            f"trainer.num_nodes={num_nodes}: nobody has started the processes of the other machines, as "
            f"{', '.join(missing)} {_is_or_are(missing)} not set; start them all with srun or torchrun"
        )


def _number(name: str, default: int = 0) -> int:
    value = os.environ.get(name, "")
    try:
        return int(value or default)
    except ValueError:
        raise ConfigError(f"{name}={value}: of the environment, is no number; unset it") from None


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _is_or_are(names: tuple[str, ...] | list[str]) -> str:
    return "is" if len(names) == 1 else "are"
