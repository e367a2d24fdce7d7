"""A training that is started by the same command as often as needed, watched through its trace, and ended from outside.

Linux only: processes are found by a mark in their environment.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import compared


class Training:
    """`espalier WORDS hydra.run.dir=FOLDER resume=auto` in a session of its own; `module` is what runs, as `traced`."""

    def __init__(self, folder: Path, *words: str, module: str = "traced", **environment: str) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.words = [*words, f"hydra.run.dir={folder}", "resume=auto"]
        self.module = module
        self.trace = folder.with_suffix(".trace")
        self.output = folder.with_suffix(".out")  # of the last start
        self.mark = f"CHAOS={uuid.uuid4().hex}"
        own = {"OMP_NUM_THREADS": "1", "TRACE": str(self.trace), "CHAOS": self.mark.partition("=")[2]}
        here = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        self.environment = {**os.environ, "PYTHONPATH": here, **own, **environment}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin, or go on."""
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.words],
                **{"cwd": self.folder.parent, "env": self.environment, "stdout": output, "stderr": output},
                start_new_session=True,
            )

    def code(self) -> int | None:
        """Of the process that was started; None while it runs."""
        assert self.process
        return self.process.poll()

    def wait(self, seconds: float) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still ran, and was killed.
        """
        assert self.process
        try:
            return self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End every process of it at once, as a power cut does: ranks and loader workers too."""
        while processes := self.processes():
            for number in processes:
                try:
                    os.kill(number, signal.SIGKILL)
                except ProcessLookupError:  # gone by itself
                    continue
            time.sleep(0.01)
        if self.process:
            self.process.wait()

    def processes(self) -> list[int]:
        """All that live, those of earlier starts included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = self.mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                is_alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except OSError:
                continue
            if is_ours and is_alive:
                found.append(int(folder.name))
        return found

    def lines(self) -> list[str]:
        """Return the trace so far; lines of steps that were done again are in it again."""
        return self.trace.read_text().splitlines() if self.trace.exists() else []

    def steps(self) -> dict[str, str]:
        """Return what was seen and lost in each batch, by rank, epoch and batch.

        Raises:
            AssertionError: a batch that was done again was not the same.
        """
        found: dict[str, str] = {}
        for line in self.lines():
            rank, epoch, batch, seen = line.split(" ", 3)
            first = found.setdefault(f"{rank} {epoch} {batch}", seen)
            assert first == seen, f"batch {batch} of epoch {epoch} was {first} and then {seen}"
        return found

    def checkpoint(self, name: str = "last") -> dict[str, Any]:
        """Return what is in it."""
        return compared.checkpoint(self.folder, f"{name}.ckpt")

    def last_line(self) -> str:
        """Of what the last start printed."""
        return (self.output.read_text(errors="replace").splitlines() or [""])[-1]


def differences(one: Training, other: Training) -> list[str]:
    """Return what is not equal to the last bit: the trace, checkpoints, metrics, report."""
    return [*(["steps"] if one.steps() != other.steps() else []), *compared.differences(one.folder, other.folder)]
