"""Runs the command line in several processes that are forked out of the test's own, which has imported everything."""

import os
import socket
import sys
import traceback
from pathlib import Path

from conftest import command


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ranks(folder: Path, *words: str, num: int = 2, **environment: str) -> list[tuple[int, str]]:
    """Exit code and output of each rank of a command, started as a launcher for one machine does it.

    `{rank}` in a variable is the number of the process.
    """
    shared = {"WORLD_SIZE": num, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    sys.stdout.flush()
    children = []
    for number in range(num):
        output = folder / f"rank_{number}.txt"
        child = os.fork()
        if not child:
            own = {name: str(value) for name, value in {**shared, "LOCAL_RANK": number}.items()}
            own |= {name: value.format(rank=number) for name, value in environment.items()}
            _become(output, folder, words, own)
        children.append((child, output))
    ended = [(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text()) for child, output in children]
    assert len(ended) == num
    return ended


def _become(output: Path, folder: Path, words: tuple[str, ...], environment: dict[str, str]) -> None:
    code = 70
    try:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.environ.update(environment)
        os.chdir(folder)
        code = command(words, folder).code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
