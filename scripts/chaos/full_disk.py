"""Fill a disk so that a training finds room for part of its checkpoint: one line, and the checkpoint before is whole.

    .venv/bin/python scripts/chaos/full_disk.py [--sizes 20]

The disk is a tmpfs, so this wants Linux and the right to mount. After an epoch a file takes what is free, but for a
part of what the next checkpoint needs. Once that file is gone, the same command goes on.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training import Training

from espalier.errors import ConfigError
from espalier.runs import checkpoint
from espalier.runs.run_folder import RESUMED

DISK = "64m"
WORDS = ("train", "model=mlp", "model.hidden=[256,256]", "callbacks=[checkpoint,monitor]", "logger=[csv]")


def saved_step(run: Path) -> int:
    """Of what a resumed run would start from; -1 if nothing can be read."""
    try:
        return int(checkpoint.load_run("resume", str(run), RESUMED).content["global_step"])
    except ConfigError as error:
        print(error)
        return -1


def fill(disk: Path, left_bytes: int) -> Path:
    """Return a file that takes all but so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left_bytes)
    return ballast


def attempt(disk: Path, started_from: Path, share: float, seconds: float) -> tuple[str, list[str]]:
    """Go on with a run of one epoch where `share` checkpoints fit; what was said last, and what is not as promised."""
    run = disk / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(started_from, run)
    before = saved_step(run)
    ballast = fill(disk, int(share * (run / "checkpoints" / "last.ckpt").stat().st_size))
    training = Training(run, *WORDS, "trainer.max_epochs=6", TRACE="/dev/null", TMPDIR=str(started_from.parent))
    training.output = started_from.parent / "out"
    training.start()
    code = training.wait(seconds)
    said = training.output.read_text().splitlines()
    found = [] if code == 1 else [f"exit code {code}"]
    if "Traceback (most recent call last):" in said or not said[-1].startswith("espalier: "):
        found.append("more than a line")
    if saved_step(run) < before:
        found.append("the checkpoint before is lost")
    ballast.unlink()
    training.start()
    if again := training.wait(seconds):
        found.append(f"does not go on: exit code {again}, {training.last_line()}")
    return said[-1], found


def main() -> None:
    """Print a line per size, and how many ended as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1800, help="fail if it takes longer")
    chosen = parser.parse_args()
    until, num_good = time.monotonic() + chosen.seconds, 0
    with tempfile.TemporaryDirectory(prefix="espalier_full_") as name:
        folder, disk = Path(name), Path(name) / "disk"
        first = Training(folder / "first", *WORDS, "trainer.max_epochs=1")
        first.start()
        first.wait(chosen.seconds)
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk], check=True)
        try:
            for number in range(chosen.sizes):
                share = number / chosen.sizes
                said, found = attempt(disk, first.folder, share, until - time.monotonic())
                num_good += not found
                print(f"{number + 1:3}: room for {share:.2f}: {said}{' NOT AS PROMISED: ' * bool(found)}", end="")
                print("; ".join(found), flush=True)
        finally:
            subprocess.run(["umount", disk], check=True)
    print(f"full disk: {num_good} of {chosen.sizes} ended in one line with the checkpoint before readable, and went on")
    sys.exit(num_good < chosen.sizes)


if __name__ == "__main__":
    main()
