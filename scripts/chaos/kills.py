"""Kill -9 a training again and again, start it by the same command each time, compare the end with a run left alone.

    .venv/bin/python scripts/chaos/kills.py [train|prune_magnitude|prune_channels,distill|qat|ddp] [--kills 50]

`train` has augmentation, dropout, two loader workers, averaged weights and a schedule; `ddp` is it on two processes.
Kills come after a random number of steps, so that they spread over the whole training, or in start-up (one in ten).
"""

import argparse
import math
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from compared import shown
from sklearn.datasets import load_digits
from training import Training, differences

NUM_IMAGES = 1000
OFTEN = ("callbacks.checkpoint.every_n_steps=2", "logger=[csv]", "trainer.log_every_n_steps=5")
NETWORK = ("model=mlp", "model.hidden=[64]", "model.dropout=0.2", "callbacks=[checkpoint,monitor,ema]", *OFTEN)
SMALL = ("model.depth=8", "model.width=8")
STREAMED = (
    *("data=hub_images", "data.path=images.parquet", "data.in_memory=false", "data.num_workers=2", "data.channels=1"),
    *("data.image_size=8", "data.batch_size=24", "data/augment=[crop,rotation,mixup]"),
)
COMPRESS = ("callbacks=[checkpoint,monitor]", "task.batches=[1]", *OFTEN)
RECIPES = {
    "train": ("train", *NETWORK, *STREAMED, "trainer.max_epochs=10"),
    "ddp": ("train", *NETWORK, "data/augment=[crop,rotation,mixup]", "strategy=ddp_cpu", "trainer.max_epochs=8"),
    "prune_magnitude": ("compress", "compression.prune_magnitude.every_n_steps=2"),
    "prune_channels,distill": (
        *("compress", "compression.prune_channels.round_to=4", "compression.distill.features=[stages.1]"),
    ),
    "qat": ("compress",),
}
START_UP_S = 6.0


def write_images(path: Path) -> None:
    """Digits as image files in a parquet file, which worker processes read."""
    pixels, labels = load_digits(return_X_y=True)
    pictures = (pixels[:NUM_IMAGES].reshape(-1, 8, 8) * 15.9).astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    columns = {"image": list(pictures), "label": labels[:NUM_IMAGES].tolist()}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def command(recipe: str, folder: Path) -> list[str]:
    """Of the recipe; what it needs is made in the folder."""
    words = list(RECIPES[recipe])
    if recipe == "train":
        write_images(folder / "images.parquet")
    if words[0] == "compress":
        source = Training(folder / "source", "train", *SMALL, "trainer.max_epochs=3", "callbacks=[checkpoint]")
        finish(source)
        words += [f"compression=[{recipe}]", "source=source", "trainer.max_epochs=8", *COMPRESS]
    return words


def finish(training: Training) -> None:
    """Let it come to its end."""
    training.start()
    if code := training.wait(600):
        sys.exit(f"exit code {code}: {training.output.read_text()}")


def kill_once(training: Training, num_ahead: int, num_kills: int) -> str:
    """Start it and kill it once it has done some of the batches that it still has to do; what was done."""
    before, started = len(training.lines()), time.monotonic()
    wanted = random.randint(1, max(2, min(2 * num_ahead // num_kills, num_ahead - 10)))
    until = started + random.uniform(0, START_UP_S) if random.random() < 0.1 else math.inf
    training.start()
    while len(training.lines()) < before + wanted:
        if training.code() is not None:
            sys.exit(f"FAILED: exit code {training.code()} in place of a kill: {training.output.read_text()}")
        if time.monotonic() > until:
            break
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.02))
    training.kill()
    return f"killed after {len(training.lines()) - before} batches and {time.monotonic() - started:.1f} s"


def main() -> None:
    """Print a line per kill, and at the end what was equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", choices=RECIPES, default="train")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1800, help="fail if it takes longer")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = parser.parse_args()
    random.seed(chosen.seed)
    started = time.monotonic()
    datasets.disable_progress_bars()
    folder = Path(tempfile.mkdtemp(prefix="espalier_kills_"))  # stays where a run fails
    words = command(chosen.recipe, folder)
    cache = {"HF_DATASETS_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
    unbroken = Training(folder / "unbroken", *words, **cache)
    finish(unbroken)
    broken = Training(folder / "broken", *words, **cache)
    num_batches = len(unbroken.steps())
    for kill in range(chosen.kills):
        if time.monotonic() > started + chosen.seconds:
            sys.exit(f"FAILED: {kill} kills in {chosen.seconds:.0f} s")
        told = kill_once(broken, num_batches - len(broken.steps()), chosen.kills - kill)
        print(f"{kill + 1:3}: {told}; {len(broken.steps())} of {num_batches} batches done", flush=True)
    finish(broken)
    again = len(broken.lines()) - num_batches
    if different := differences(broken, unbroken):
        sys.exit(f"FAILED: not equal after {chosen.kills} kills: {shown(different)}; see {folder}")
    shutil.rmtree(folder)
    print(
        f"{chosen.recipe}: {chosen.kills} of {chosen.kills} resumes; {num_batches} batches, {again} done again, "
        f"trace, metrics and final checkpoints bit-equal; {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
