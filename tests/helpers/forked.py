"""`python WORDS` for tests, without the seconds that its imports take: copies of `helpers.fork_server`."""

import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

NUMBER = struct.Struct("i")  # a size, a process id, or how a process ended, as `waitpid` has it
ADDRESS = "TESTS_FORK_SERVER"  # where it listens; its log lies beside it
# What a library reads when it is imported, or Python before: a copy would not see them.
READ_AT_START = ("PYTHON", "OMP_NUM", "MKL_", "OPENBLAS_", "LD_", "HF_", "HOME", "XDG_", "MPL", "ORT_")
READ_LATER = {"PYTHONPATH", "HF_TOKEN", "HF_HUB_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY"}  # but for these
RANK = "LOCAL_RANK"  # of the processes that a copy starts, its ranks are copies as well

_at_start = {**os.environ, "OMP_NUM_THREADS": "1"}
_whole = {name: getattr(subprocess.Popen, name) for name in ("_execute_child", "_internal_poll", "_try_wait")}
_order = signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


@contextmanager
def server() -> Iterator[None]:
    """A fork server for this process and those that it starts; it imports when it is asked for the first time."""
    folder = Path(tempfile.mkdtemp(prefix="fork_server_"))
    with socket.socket(socket.AF_UNIX) as listener, (folder / "log").open("w") as log:
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        words = [sys.executable, "-m", "helpers.fork_server", str(listener.fileno())]
        environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        process = subprocess.Popen(
            words,
            env={**_at_start, **environment},
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    os.environ[ADDRESS] = str(folder / "socket")
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        process.communicate()  # closes its standard input
        shutil.rmtree(folder)


class Popen(subprocess.Popen):
    """A process that the fork server starts, where it can stand for what was asked for; else one of its own."""

    def _execute_child(self, *given: Any) -> None:
        asked = _order.bind(self, *given).arguments
        environment = dict(os.environ if asked["env"] is None else asked["env"])
        if not can_fork(asked, environment) or not (isinstance(self, Popen) or RANK in environment):
            _whole["_execute_child"](self, *given)
            return
        command = [os.fspath(word) for word in asked["args"]]
        request = {
            "words": command[1:],
            "executable": command[0],
            "environment": environment,
            "folder": os.fspath(asked["cwd"] or Path.cwd()),
        }
        ends = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        streams = [place if end == -1 else end for place, end in enumerate(ends)]
        content = json.dumps(request).encode()
        self._line = socket.socket(socket.AF_UNIX)  # the server says there how it ended
        self._line.connect(os.environ[ADDRESS])
        socket.send_fds(self._line, [NUMBER.pack(len(content))], streams)
        self._line.sendall(content)
        self.pid = _number(self._line)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[name] for name in pipes))  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        line = vars(self).get("_line")
        if line is None:
            return _whole["_try_wait"](self, wait_flags)
        if not select.select([line], [], [], 0 if wait_flags & os.WNOHANG else None)[0]:
            return 0, 0
        with line:
            return self.pid, _number(line)

    def _internal_poll(self, _deadstate: int | None = None, **more: Any) -> int | None:
        if "_line" not in vars(self):
            return _whole["_internal_poll"](self, _deadstate, **more)
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                child, status = Popen._try_wait(self, os.WNOHANG)
                if child:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


def _number(line: socket.socket) -> int:
    said = line.recv(NUMBER.size, socket.MSG_WAITALL)
    if len(said) < NUMBER.size:
        raise RuntimeError(f"the fork server is gone: {Path(os.environ[ADDRESS]).with_name('log').read_text()}")
    return NUMBER.unpack(said)[0]


def can_fork(asked: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Whether a copy of the server can be the process that `subprocess.Popen` was asked for."""
    words = asked["args"]
    if ADDRESS not in os.environ or isinstance(words, str | bytes | os.PathLike) or words[0] != sys.executable:
        return False
    if asked["shell"] or asked["preexec_fn"] or asked["pass_fds"] or len(words) == 1:
        return False
    if words[1] not in ("-u", "-m", "-c") and os.fspath(words[1]).startswith("-"):
        return False
    differing = {name for name in {*_at_start, *environment} if _at_start.get(name) != environment.get(name)}
    places = environment.get("PYTHONPATH", "").split(os.pathsep)
    return not any(name.startswith(READ_AT_START) for name in differing - READ_LATER) and not any(
        Path(place, "sitecustomize.py").exists() for place in places if place
    )


def take_over() -> None:
    """Have the ranks that this process will start be copies of the fork server, as it is one itself."""
    for name in _whole:
        setattr(subprocess.Popen, name, getattr(Popen, name))


def run(
    words: Sequence[str | os.PathLike[str]], timeout: float | None = None, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of `python WORDS`, whose text is captured."""
    process = Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
