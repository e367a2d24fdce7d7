"""A process that has imported torch, Lightning and Hydra once, and becomes `python WORDS` as often as a test asks.

Importing them takes a fresh interpreter 5 to 10 s of CPU; a copy of one that has done so starts in a tenth of a second.
`helpers.forked` asks for copies. What a copy does not repeat is what happens while a program starts: tests about that
start an interpreter of their own.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from helpers import composing, forked
from helpers.forked import NUMBER

STREAMS = 3
IMPORTED = (
    *("torch", "torch._dynamo", "torch.distributed.run", "torch.distributed.fsdp", "lightning.pytorch", "torchmetrics"),
    *("hydra", "sklearn.datasets", "matplotlib.pyplot", "matplotlib.font_manager", "rich.table", "wandb", "torchao"),
)
PARENT = "ESPALIER_PARENT"  # of a rank: it ends itself where that is not its parent
ENDED_BY_PYTHON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)


def main(listening: int) -> None:
    """Serve at this socket until standard input, whose other end the test run holds, is closed."""
    lifeline = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with socket.socket(fileno=listening) as listener:
        Server(listener, lifeline).serve()


class Server:
    """Forks, watches and ends copies of this process. One thread: a copy of a lock that another one holds never opens.

    `children` maps process ids to the connections over which they were asked for; when the other end of one closes, its
    child is ended with all that it has started.
    """

    def __init__(self, listener: socket.socket, lifeline: int) -> None:
        self.listener = listener
        self.lifeline = lifeline
        self.children: dict[int, socket.socket] = {}
        self.has_imported = False
        self.wakes, self.woken = os.pipe()
        for end in (self.wakes, self.woken):
            os.set_blocking(end, False)
        own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        self.places = [entry for entry in sys.path[1:] if entry not in own]

    def serve(self) -> None:
        signal.set_wakeup_fd(self.woken)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the test run ends us
        with selectors.DefaultSelector() as selector:
            for source in (self.listener, self.lifeline, self.wakes):
                selector.register(source, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj == self.lifeline:
                        return self.end()
                    if key.fileobj == self.wakes:
                        os.read(self.wakes, 4096)
                    elif key.fileobj == self.listener:
                        self.answer(selector)
                    elif isinstance(key.fileobj, socket.socket):
                        self.lose(key.fileobj, selector)
                self.bury(selector)

    def answer(self, selector: selectors.BaseSelector) -> None:
        connection, _ = self.listener.accept()
        head, streams, _, _ = socket.recv_fds(connection, NUMBER.size, STREAMS)
        if len(head) < NUMBER.size:
            connection.close()
            return
        request = b""
        while len(request) < NUMBER.unpack(head)[0]:
            request += connection.recv(1 << 16)
        if not self.has_imported:
            import_all()
            self.has_imported = True
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            selector.close()
            for ours in (self.listener, connection, *self.children.values()):
                ours.close()
            for place in (self.lifeline, self.wakes, self.woken):
                os.close(place)
            become(json.loads(request), streams, self.places)
        for stream in streams:
            os.close(stream)
        self.children[child] = connection
        selector.register(connection, selectors.EVENT_READ)
        with suppress(BrokenPipeError):
            connection.sendall(NUMBER.pack(child))

    def lose(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        """Nobody waits for this child any more."""
        selector.unregister(connection)
        [child] = [number for number, other in self.children.items() if other is connection]
        end_group(child)

    def bury(self, selector: selectors.BaseSelector) -> None:
        """Say of each child that has ended how it did."""
        while self.children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            connection = self.children.pop(child)
            with suppress(KeyError):
                selector.unregister(connection)
            with suppress(OSError):
                connection.sendall(NUMBER.pack(status))
            connection.close()

    def end(self) -> None:
        for child in self.children:
            end_group(child)


def end_group(leader: int) -> None:
    for end in (os.kill, os.killpg):  # it leads none yet where it has just begun
        with suppress(ProcessLookupError):
            end(leader, signal.SIGKILL)


def import_all() -> None:
    for name in IMPORTED:
        with suppress(ImportError):  # of an extra
            importlib.import_module(name)
    composing.share()
    leave_figures_blank()
    threads = [thread.joinpath("comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    assert len(threads) == 1, threads
    gc.collect()
    gc.freeze()  # a collection would copy all pages of a child


def leave_figures_blank() -> None:
    """Have copies save one blank picture for each figure: to draw takes them more than to train."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blank, print_figure = BytesIO(), FigureCanvasAgg.print_figure
    print_figure(FigureCanvasAgg(Figure()), blank, format="png")

    def print_blank(canvas: FigureCanvasAgg, file: Any, **more: Any) -> None:
        if more or not isinstance(file, str):  # no figure of ours
            print_figure(canvas, file, **more)
        else:
            Path(file).write_bytes(blank.getvalue())

    FigureCanvasAgg.print_figure = print_blank


def become(request: dict[str, Any], streams: list[int], places: list[str]) -> NoReturn:
    """Be the process that was asked for, in a session of its own, to its end."""
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    os.setsid()
    for number in ENDED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if PARENT in os.environ:
        os.environ[PARENT] = str(os.getppid())  # we end it in place of that process
    tempfile.tempdir = None
    random.seed()
    own = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*own, *places]
    sys.executable = request["executable"]
    sys.orig_argv = [sys.executable, *request["words"]]
    try:
        forked.take_over()
        run(request["words"])
        code = 0
    except SystemExit as asked:
        code = 0 if asked.code is None else asked.code if isinstance(asked.code, int) else 1
        if not isinstance(asked.code, int | None):
            print(asked.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    end(code)


def end(code: int) -> NoReturn:
    """End as an interpreter does, but without taking apart what was imported."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 120
    finally:
        if code == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code & 255)


def run(words: list[str]) -> None:
    """What `python WORDS` runs: `-m MODULE`, `-c TEXT` or a script, and its arguments."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    if words[0] == "-u":
        words = words[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    if words[0] == "-m":
        sys.argv = ["-m", *words[2:]]
        sys.path.insert(0, str(Path.cwd()))
        sys.modules.pop(words[1], None)
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]  # it is what the interpreter calls
        return
    if words[0] == "-c":
        text, name, sys.argv = words[1], "<string>", ["-c", *words[2:]]
        sys.path.insert(0, "")
    else:
        text, name, sys.argv = Path(words[0]).read_text(), words[0], words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        main.__file__ = name
        main.__loader__ = SourceFileLoader("__main__", name)
    exec(compile(text, name, "exec"), main.__dict__)


if __name__ == "__main__":
    main(int(sys.argv[1]))
