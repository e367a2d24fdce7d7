"""Runs the command line in several processes at once, each a copy of the fork server."""

import os
import signal
import socket
import sys
from pathlib import Path

from helpers.forked import Popen

LIMIT_SECONDS = 200


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ranks(folder: Path, *words: str, num: int = 2, before: str = "", **environment: str) -> list[tuple[int, str]]:
    """Exit code and output of each rank of a command, started as a launcher for one machine does it.

    `{rank}` in a variable is the number of the process; `before` is Python that each runs first.
    """
    shared = {"WORLD_SIZE": num, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = []
    for number in range(num):
        own = {name: str(value) for name, value in {**shared, "LOCAL_RANK": number}.items()}
        own |= {name: value.format(rank=number) for name, value in environment.items()}
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), **own}
        output = folder / f"rank_{number}.txt"
        with output.open("w") as file:
            command = [sys.executable, "-c", f"{before}\nfrom espalier import cli\ncli.main()", *words]
            started.append((Popen(command, cwd=folder, env=settings, stdout=file, stderr=file), output))
    try:
        return [(process.wait(LIMIT_SECONDS), output.read_text()) for process, output in started]
    finally:
        for process, _ in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
