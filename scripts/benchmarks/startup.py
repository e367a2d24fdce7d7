"""User CPU time of the commands that should feel instant, as a share of `import torch` on the same machine.

.venv/bin/python scripts/benchmarks/startup.py [--rounds 5]
"""

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ESPALIER = str(Path(sys.executable).parent / "espalier")
WRONG = "espalier train model=resnett"
COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "espalier": [ESPALIER],
    "espalier train --help": [ESPALIER, "train", "--help"],
    "espalier train --cfg job": [ESPALIER, "train", "--cfg", "job"],
    WRONG: [ESPALIER, "train", "model=resnett"],
}
LIMIT = 0.3  # of `import torch`; a wrong word may take longer, since each word is tried on its own


def user_seconds(command: list[str]) -> float:
    """CPU time in user mode of the command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(command, capture_output=True, check=False)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> None:
    """Print the table; commands are interleaved so that a busy machine slows all of them alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = [
        {name: user_seconds(command) for name, command in COMMANDS.items()} for _ in range(parser.parse_args().rounds)
    ]
    print(f"{'command':32}{'user CPU s':>11}{'of import torch':>17}")
    for name in COMMANDS:
        seconds = statistics.median(one[name] for one in rounds)
        share = statistics.median(one[name] / one["import torch"] for one in rounds)
        verdict = "" if name in ("import torch", WRONG) else "  ok" if share <= LIMIT else "  over the limit"
        print(f"{name:32}{seconds:11.2f}{share:17.2f}{verdict}")


if __name__ == "__main__":
    main()
