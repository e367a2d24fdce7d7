"""Spoil a loss or a gradient at random steps: the run ends at that step, exit code 4, with weights that are finite.

.venv/bin/python scripts/chaos/not_finite.py [--trials 10]
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from training import Training

WORDS = (
    *("train", "model=mlp", "model.hidden=[64]", "callbacks=[checkpoint,monitor]", "logger=[csv]"),
    *("trainer.max_epochs=3", "callbacks.checkpoint.every_n_steps=1"),
)
NUM_STEPS = 3 * 17
HARMS = ("nan", "inf", "gradient")


def problems(training: Training, step: int, code: int) -> list[str]:
    """Return what is not as promised."""
    found = [] if code == 4 else [f"exit code {code}"]
    if not training.last_line().startswith(f"espalier: diverged at step {step}: "):
        found.append(training.last_line())
    if (begun := len(training.steps())) != step:
        found.append(f"{begun} steps begun")
    paths = list((training.folder / "checkpoints").glob("*.ckpt"))
    if not paths and step > 1:
        found.append("no checkpoint")
    for path in paths:
        content = torch.load(path, weights_only=True)
        if not all(value.isfinite().all() for value in content["state_dict"].values()):
            found.append(f"{path.name} is not finite")
    if paths and (saved := training.checkpoint()["global_step"]) != step - 1:
        found.append(f"last.ckpt holds step {saved}")
    return found


def main() -> None:
    """Print a line per trial, and how many ended as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=900, help="fail if it takes longer")
    parser.add_argument("--seed", type=int, default=0, help="of the steps")
    chosen = parser.parse_args()
    random.seed(chosen.seed)
    started, num_good = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="espalier_nan_") as folder:
        for trial in range(chosen.trials):
            step, harm = random.randint(1, NUM_STEPS), HARMS[trial % len(HARMS)]
            training = Training(Path(folder) / str(trial), *WORDS, HARM=f"{harm}@{step}")
            training.start()
            found = problems(training, step, training.wait(chosen.seconds - (time.monotonic() - started)))
            num_good += not found
            print(f"{trial + 1:3}: {harm} at step {step}: {'; '.join(found) or 'ended there, finite'}", flush=True)
    print(f"not finite: {num_good} of {chosen.trials} ended at that step with exit code 4, best and last finite")
    sys.exit(num_good < chosen.trials)


if __name__ == "__main__":
    main()
