"""Hostile checkpoints through every task that reads one, by file and by address: none is executed, each costs one line.

    .venv/bin/python scripts/chaos/hostile_checkpoints.py [--seconds 1500]

The cases are those of tests/helpers/hostile.py, made out of a network that is trained here. `serve` gets a bundle whose
network is the hostile file. A resumed run has no address and a server no checkpoint, so there the address itself is
refused.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from conftest import QUICK, command
from helpers import hostile

TASKS = {
    "train source=": ("train", *QUICK),
    "train resume=": ("train", *QUICK),
    "evaluate": ("evaluate", "logger=[csv]"),
    "compress": ("compress", "compression=[ptq]", "logger=[csv]"),
    "export": ("export", "logger=[csv]"),
    "explain": ("explain", "logger=[csv]"),
    "serve": ("serve", "task.port=0"),
}


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def attempt(words: list[str], folder: Path) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of a command in this process; -1 for an exception that nobody translated."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command(words, folder).code
        except Exception as error:
            return -1, [repr(error)]
    return code, err.getvalue().splitlines()


def main() -> None:
    """Print a line per case, and at the end how many were executed and how many refused in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1500, help="fail if it takes longer")
    until = time.monotonic() + parser.parse_args().seconds
    executed = refused = tried = 0
    with tempfile.TemporaryDirectory(prefix="espalier_hostile_") as name:
        folder, marker = Path(name), Path(name) / "executed"
        os.chdir(folder)
        os.execv = lambda *_: sys.exit(99)  # a server that would start
        for words in (
            ["train", "model=mlp", "model.hidden=[16]", "trainer.max_epochs=1", *QUICK],
            ["export", "source=latest"],
        ):
            code, lines = attempt(words, folder)
            if code:
                sys.exit(f"FAILED: {' '.join(words)}: {lines}")
        [good] = folder.glob("logs/*/*/checkpoints/last.ckpt")
        [exported] = folder.glob("logs/*/*/export")
        paths = hostile.write(good, folder / "files", marker, hostile.CHECKPOINTS)
        if marker.exists():
            sys.exit("FAILED: executed while the files were made")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder / "files")))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for case, path in paths.items():
            started = time.monotonic()
            bundle = path.parent.parent / "bundle"
            hostile.write_bundle(exported, path, bundle)
            address = f"http://127.0.0.1:{server.server_port}/{path.relative_to(folder / 'files')}"
            reasons: dict[str, list[str]] = {}
            for task, words in TASKS.items():
                key = "resume" if "resume" in task else "source"
                for place in (str(bundle if task == "serve" else path), address):
                    code, lines = attempt([*words, f"{key}='{place}'"], folder)
                    tried += 1
                    if marker.exists():
                        executed += 1
                        marker.unlink()
                        print(f"EXECUTED: {case}: {task} {place}", flush=True)
                    if code == 2 and len(lines) == 1 and lines[0].startswith("espalier: "):
                        refused += 1
                        reason = re.sub(r"\S*espalier_hostile_\S*/|\S*fetched/\w+/|\S*http:\S*/", "", lines[0])
                        reasons.setdefault(reason, []).append(task if place != address else f"{task} by address")
                    else:
                        print(f"NOT REFUSED: {case}: {task} {place}: exit code {code}: {lines[-3:]}", flush=True)
            print(f"{case}: {time.monotonic() - started:.1f} s", flush=True)
            print(*(f"    {reason} ({', '.join(tasks)})" for reason, tasks in reasons.items()), sep="\n", flush=True)
            if time.monotonic() > until:
                sys.exit("FAILED: out of time")
        server.shutdown()
    print(f"{len(paths)} checkpoints x {len(TASKS)} tasks x 2 ways: {executed} executed, {refused} refused in one line")
    sys.exit(int(executed > 0 or refused < tried))


if __name__ == "__main__":
    main()
