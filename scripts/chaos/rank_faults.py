"""Kill, stop, break and end single ranks: the whole run ends in time, the cause in its last line, nobody left.

.venv/bin/python scripts/chaos/rank_faults.py [--trials 40]

Four faults of each of two ranks, at a random batch of the first epoch or as the rank starts. Linux only.
"""

import argparse
import random
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from training import Training

TIMEOUT_S = 15  # longer than one rank may start after the other on a busy machine
NUM_BATCHES = 8
WORDS = (
    *("train", "model=mlp", "model.hidden=[16]", "callbacks=[checkpoint,monitor]", "logger=[csv]"),
    *("trainer.max_epochs=3", "strategy=ddp_cpu", f"trainer.strategy.timeout_seconds={TIMEOUT_S}"),
)
LINES = {
    "kill": "espalier: rank {rank}: killed by SIGKILL (out of memory?)",
    "raise": "espalier: rank {rank}: ValueError: the moon is wrong",
    "stop": f"espalier: rank {{rank}} has not answered for {TIMEOUT_S} s, so rank {{other}} gave up",
    "exit": "espalier: rank {rank}: ended with exit code 7",
}
STARTS_LATE_S = 120.0


def attempt(folder: Path, fault: str, rank: int) -> tuple[float, list[str]]:
    """Seconds from the fault to the exit, and what is not as promised."""
    batch = -1 if fault == "exit" else random.randrange(NUM_BATCHES)
    at = folder.with_suffix(".at")
    training = Training(folder, *WORDS, module="faulty", FAULT=f"{fault},{rank},{batch}", FAULT_AT=str(at))
    training.start()
    code = training.wait(STARTS_LATE_S)
    if not at.exists():
        return 0.0, [f"ended before its fault; it says: {training.last_line()}"]
    seconds, found = time.time() - float(at.read_text()), []
    if code != (7 if fault == "exit" else 1):
        found.append(f"exit code {code}")
    if training.last_line() != LINES[fault].format(rank=rank, other=1 - rank):
        found.append(f"it says: {training.last_line()}")
    if left := training.processes():
        found.append(f"{len(left)} processes stay")
        training.kill()
    return seconds, found


def main() -> None:
    """Print a line per fault, and how many ended as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1800, help="fail if it takes longer")
    parser.add_argument("--seed", type=int, default=0, help="of the batches")
    chosen = parser.parse_args()
    random.seed(chosen.seed)
    until, longest, results = time.monotonic() + chosen.seconds, 0.0, []
    cases = list(product(LINES, range(2)))
    with tempfile.TemporaryDirectory(prefix="espalier_faults_") as folder:
        for trial in range(chosen.trials):
            if time.monotonic() > until:
                sys.exit(f"FAILED: {trial} trials in {chosen.seconds:.0f} s")
            fault, rank = cases[trial % len(cases)]
            seconds, found = attempt(Path(folder) / str(trial), fault, rank)
            longest = max(longest, seconds)
            results.append(found)
            print(
                f"{trial + 1:3}: {fault} rank {rank}: {seconds:.1f} s, {'; '.join(found) or 'as promised'}", flush=True
            )
    named = sum(not any("says" in problem for problem in found) for found in results)
    orphans = sum(any("stay" in problem for problem in found) for found in results)
    print(
        f"{chosen.trials} faults: all ended within {longest:.1f} s, first cause named {named} of {chosen.trials}, "
        f"{orphans} orphans"
    )
    sys.exit(any(results))


if __name__ == "__main__":
    main()
