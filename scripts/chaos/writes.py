"""Kill -9 while checkpoints are written: what a run resumes from can be read at every moment, without any cleaning up.

    .venv/bin/python scripts/chaos/writes.py [--kills 100]

A network of 4.4 million weights, whose state of 52 MB is written after every step, in turn at once and in the
background. TMPDIR is on another disk, where a writer that moves its file from there leaves half of it.
Kills come when a random share of a file is there, or just after it got its name.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from training import Training

from espalier.errors import ConfigError
from espalier.runs import checkpoint
from espalier.runs.run_folder import RESUMED

OTHER_DISK = Path("/dev/shm")
STATE_BYTES = 52e6
WORDS = (
    *("train", "model=mlp", "model.hidden=[2048,2048]", "callbacks=[checkpoint,monitor]", "logger=[csv]"),
    *("trainer.max_epochs=100", "callbacks.checkpoint.every_n_steps=1"),
)
START_UP_S = 120


def written(folder: Path) -> tuple[str, int]:
    """Name and size of the draft that lies there; empty and 0 where there is none."""
    for path in folder.glob(".*.partial"):
        try:
            return path.name, path.stat().st_size
        except FileNotFoundError:
            continue
    return "", 0


def kill_in_a_write(training: Training) -> str:
    """Start it, kill it in one of its next writes; the moment."""
    folder = training.folder / "checkpoints"
    wanted = len(training.lines()) + random.randint(1, 4)
    share = random.choice((random.random(), random.random(), 1.1))  # 1.1: when the draft has become the file
    until = time.monotonic() + START_UP_S
    training.start()
    while len(training.lines()) < wanted:
        if training.code() is not None or time.monotonic() > until:
            sys.exit(f"FAILED: exit code {training.code()} in place of a kill: {training.output.read_text()}")
        time.sleep(0.002)
    name, size = written(folder)
    while not name:
        name, size = written(folder)
    while name and size < share * STATE_BYTES:
        name, size = written(folder)
    if not name:
        time.sleep(random.uniform(0, 0.005))
    training.kill()
    name, size = written(folder)
    return f"{name} {size / 1e6:.1f} MB" if name else "just after a write"


def main() -> None:
    """Print a line per kill, and at the end what could be read and what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=2400, help="fail if it takes longer")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = parser.parse_args()
    random.seed(chosen.seed)
    until = time.monotonic() + chosen.seconds
    seen, lost = Counter[str](), Counter[int]()
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(dir=OTHER_DISK) as shm:
        if Path(name).stat().st_dev == Path(shm).stat().st_dev:
            sys.exit(f"set TMPDIR to a disk that is not {OTHER_DISK}, where the run is to be")
        for kill in range(chosen.kills):
            if time.monotonic() > until:
                sys.exit(f"FAILED: {kill} kills in {chosen.seconds:.0f} s")
            in_background = kill % 2 == 1
            own = f"callbacks.checkpoint.asynchronous={str(in_background).lower()}"
            training = Training(Path(name) / ("background" if in_background else "at_once"), *WORDS, own, TMPDIR=shm)
            moment = kill_in_a_write(training)
            try:
                stored = checkpoint.load_run("resume", str(training.folder), RESUMED)
            except ConfigError as error:
                seen["unreadable"] += 1
                print(f"{kill + 1:3}: {moment}: {error}", flush=True)
                continue
            behind = len(training.steps()) - int(stored.content["global_step"])
            lost[behind - in_background] += 1  # batches begun, less the one that is written meanwhile
            seen["previous"] += stored.path.name != "last.ckpt"
            seen["inside"] += not moment.startswith("just")
            found = f"{stored.path.name} of step {stored.content['global_step']}, {behind} behind"
            print(f"{kill + 1:3}: {moment}: {found}", flush=True)
    print(
        f"writes: {seen['unreadable']} of {chosen.kills} unreadable ({seen['inside']} killed inside a file, "
        f"{seen['previous']} read from the previous one), at most {max(lost)} step lost, nothing cleaned up"
    )
    sys.exit(bool(seen["unreadable"]) or max(lost) > 1)


if __name__ == "__main__":
    main()
