"""Send signals from outside: the last finished step is saved, exit code 75, nobody stays behind, within 10 s.

.venv/bin/python scripts/chaos/signals.py [--trials 40]

SIGTERM, SIGUSR1 and SIGINT, to one process and to the command that leads two, while it starts, trains, validates and
saves. Linux only.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from training import Training

LIMIT_S = 10.0
STEPS_PER_EPOCH = 8  # then a validation of about a second
WORDS = (
    *("train", "model=mlp", "model.hidden=[2048,2048]", "callbacks=[checkpoint,monitor]", "logger=[csv]"),
    *("data=synthetic_images", "data.channels=1", "data.height=8", "data.width=8", "trainer.max_epochs=100"),
    *("data.num_train=1024", "data.num_val=12800", "callbacks.checkpoint.every_n_steps=3"),
)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
MOMENTS = ("start-up", "training", "validation", "saving")
START_UP_S = 4.0  # the first step takes longer


def begun(training: Training) -> int:
    """Return the steps that the first rank has begun."""
    return sum(line.startswith("0 ") for line in training.lines())


def catches(training: Training, number: signal.Signals) -> bool:
    """Whether the command has a handler; the kernel knows."""
    assert training.process
    status = Path(f"/proc/{training.process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return training.code() is not None or bool(int(caught, 16) >> (number - 1) & 1)


def reach(training: Training, moment: str) -> None:
    """Wait until it is there."""
    if moment == "start-up":
        while not catches(training, signal.SIGTERM):  # before that Python itself has not started
            time.sleep(0.01)
        time.sleep(random.uniform(0, START_UP_S))
        return
    wanted = STEPS_PER_EPOCH if moment == "validation" else random.randint(1, STEPS_PER_EPOCH - 1)
    drafts = training.folder / "checkpoints"
    while begun(training) < wanted or (moment == "saving" and not list(drafts.glob(".*.partial"))):
        if training.code() is not None:
            sys.exit(f"FAILED: exit code {training.code()} before any signal: {training.output.read_text()}")
        time.sleep(0.001)
    if moment == "validation":
        time.sleep(random.uniform(0.1, 0.5))


def attempt(training: Training, number: signal.Signals, moment: str) -> tuple[float, list[str]]:
    """Seconds to the exit, and what is not as promised."""
    training.start()
    assert training.process
    reach(training, moment)
    sent = time.monotonic()
    training.process.send_signal(number)
    try:
        code = training.wait(6 * LIMIT_S)
    except subprocess.TimeoutExpired:
        return time.monotonic() - sent, ["goes on as if nothing had come"]
    seconds, found = time.monotonic() - sent, []
    if code != 75:
        found.append(f"exit code {code}: {training.last_line()}")
    if seconds > LIMIT_S:
        found.append("too late")
    if left := training.processes():
        found.append(f"{len(left)} processes stay")
        training.kill()
    if "Traceback" in training.output.read_text():
        found.append("a traceback")
    if steps := begun(training):
        saved = training.checkpoint()["global_step"]
        if saved != steps:
            found.append(f"step {saved} saved of {steps}")
    return seconds, found


def main() -> None:
    """Print a line per trial, and how many ended as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    parser.add_argument("--seconds", type=float, default=1500, help="fail if it takes longer")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = parser.parse_args()
    random.seed(chosen.seed)
    until, longest, num_good = time.monotonic() + chosen.seconds, 0.0, 0
    cases = list(product(chosen.ranks, chosen.moments, SIGNALS))
    with tempfile.TemporaryDirectory(prefix="espalier_signals_") as folder:
        for trial in range(chosen.trials):
            if time.monotonic() > until:
                sys.exit(f"FAILED: {trial} trials in {chosen.seconds:.0f} s")
            num_ranks, moment, number = cases[trial % len(cases)]
            more = ("strategy=ddp_cpu", "data.batch_size=64") if num_ranks == 2 else ()
            module = "espalier.cli" if moment == "start-up" else "traced"  # which imports torch before it listens
            training = Training(Path(folder) / str(trial), *WORDS, *more, module=module)
            seconds, found = attempt(training, number, moment)
            longest, num_good = max(longest, seconds), num_good + (not found)
            told = "; ".join(found) or "as promised"
            print(f"{trial + 1:3}: {number.name}, {num_ranks} ranks, {moment}: {seconds:.1f} s, {told}", flush=True)
    print(f"signals: {num_good} of {chosen.trials} saved the last step and ended with 75, within {longest:.1f} s")
    sys.exit(num_good < chosen.trials)


if __name__ == "__main__":
    main()
