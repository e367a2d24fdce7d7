"""Run a random command unbroken, break it again and again, and compare the two ends; many times.

    .venv/bin/python scripts/chaos/matrix.py --cases 300 --seed 0 [--jobs 2]
    .venv/bin/python scripts/chaos/matrix.py --case 0:17      # one of them again; its folder stays

A case draws how long to train, when to validate, schedule, optimizer, network, data, augmentation, precision,
callbacks, checkpoints, recipe and processes (`combinations.py`), then up to four places where it is ended: in
training, in a validation, after a checkpoint or within its file, before a rename, in the test, in figures and report
(`forked.py`). SIGKILL ends it, or a signal that asks for it. Each time the same command goes on. At the end all that
is in its checkpoints, `metrics.csv` and the report are those of the unbroken run (`compared.py`), or the case has
failed, and with it the script: exit code 1. Linux only.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported: a fork has none of the threads of its parent
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # of pyarrow's allocator

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import combinations
import compared
import forked
from combinations import Case
from forked import Stop

from espalier.processes import stop_signal

KILLS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")
RUN_SECONDS = 300.0  # of one run, on a busy machine
CASE_SECONDS = 1500.0
COMPRESSING = ("espalier.tasks.compress", "torch.onnx", "onnxscript", "onnxruntime", "torchao", "torch_pruning")


@dataclass
class Outcome:
    """What came of a case; `problem` is empty where both ends are equal."""

    problem: str = ""
    words: list[str] = field(default_factory=list)
    drawn: dict[str, str] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def main(words: Sequence[str] | None = None) -> None:
    """Print a line per case, those that failed as commands, and what was drawn how often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--case", help="SEED:INDEX of one case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at a time")
    parser.add_argument("--seconds", type=float, default=3600, help="start no case after that")
    chosen = parser.parse_args(words)
    seed, indices = chosen.seed, range(chosen.first, chosen.first + chosen.cases)
    if chosen.case:
        seed, first = map(int, chosen.case.split(":"))
        indices = range(first, first + 1)
    folder = Path(tempfile.mkdtemp(prefix="espalier_matrix_"))
    tempfile.tempdir = str(folder)  # what a kill leaves behind goes with it
    started = time.monotonic()
    prepare(folder, [drawn(folder, seed, index)[0] for index in indices])
    print(f"everything imported in {time.monotonic() - started:.0f} s, {time.process_time():.0f} s of CPU", flush=True)
    outcomes = tried(folder, seed, indices, chosen.jobs, chosen.seconds)
    failed = {index: outcome for index, outcome in outcomes.items() if outcome.problem}
    for index, outcome in failed.items():
        print(f"\nFAILED {seed}:{index} {outcome.problem}\n  espalier {' '.join(outcome.words)}")
        print(f"  {'; '.join(outcome.stops)}\n  again: .venv/bin/python scripts/chaos/matrix.py --case {seed}:{index}")
    print(f"\n{coverage(list(outcomes.values()))}")
    num_stops = sum(len(outcome.places) for outcome in outcomes.values())
    cpu_seconds = time.process_time() + sum(outcome.cpu_seconds for outcome in outcomes.values())
    if not failed and not chosen.case:
        shutil.rmtree(folder)
    print(
        f"{len(outcomes) - len(failed)} of {len(outcomes)} equal; {num_stops} stops; "
        f"{time.monotonic() - started:.0f} s, {cpu_seconds:.0f} s of CPU" + (f"; see {folder}" * folder.exists())
    )
    sys.exit(bool(failed) or not outcomes)


def prepare(folder: Path, cases: Iterable[Case]) -> None:
    """Import what the cases need, and make what they start from."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", stop_signal.JOB):
        os.environ.pop(name, None)
    compresses = any(case.drawn["recipe"] != "none" for case in cases)
    reads = any(case.drawn.get("data") == "pictures" for case in cases)
    forked.warm(folder, [*(COMPRESSING if compresses else ()), *(["datasets"] if reads else ())])
    if reads:
        import datasets

        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        datasets.disable_progress_bars()
        combinations.write_pictures(folder / "pictures")
    if compresses:
        output = folder / "source.out"
        if forked.started([*combinations.SOURCE, f"hydra.run.dir={folder / 'source'}"], output, None, RUN_SECONDS):
            sys.exit(output.read_text())


def drawn(folder: Path, seed: int, index: int) -> tuple[Case, Random]:
    """Return the case of this index, and what draws its stops."""
    random = Random(f"{seed}:{index}")
    return combinations.case(random, folder / "pictures", folder / "source"), random


def tried(folder: Path, seed: int, indices: range, jobs: int, seconds: float) -> dict[int, Outcome]:
    """Return the outcome of each case, some at a time, each in a process of its own."""
    outcomes: dict[int, Outcome] = {}
    running: dict[int, tuple[int, float]] = {}  # index and deadline by process
    waiting, last_start = list(indices), time.monotonic() + seconds
    while running or (waiting and time.monotonic() < last_start):
        if waiting and len(running) < jobs and time.monotonic() < last_start:
            index = waiting.pop(0)
            number = os.fork()
            if not number:
                _be_case(folder, seed, index)
            running[number] = (index, time.monotonic() + CASE_SECONDS)
            continue
        time.sleep(0.02)
        for number, (index, deadline) in list(running.items()):
            ended, _, used = os.wait4(number, os.WNOHANG)
            if not ended and time.monotonic() > deadline:
                os.killpg(number, signal.SIGKILL)
                ended, _, used = os.wait4(number, 0)
            if ended:
                del running[number]
                file = folder / f"{index}.outcome"
                told = json.loads(file.read_text()) if file.exists() else {"problem": "the case itself hung or died"}
                outcomes[index] = outcome = Outcome(**told)
                outcome.cpu_seconds = used.ru_utime + used.ru_stime
                state = f"FAILED: {outcome.problem}" if outcome.problem else "equal"
                stops = "; ".join(outcome.stops) or "no stop"
                print(f"{f'{seed}:{index}':8} {outcome.seconds:5.1f} s  {stops}: {state}", flush=True)
    return dict(sorted(outcomes.items()))


def _be_case(folder: Path, seed: int, index: int) -> None:
    os.setpgid(0, 0)
    forked.end_with_parent()
    outcome, started = Outcome(), time.monotonic()
    try:
        case_folder = folder / f"{seed}_{index}"
        case_folder.mkdir()
        os.chdir(case_folder)
        outcome.problem = broken(case_folder, folder, seed, index, outcome)
        if not outcome.problem:
            shutil.rmtree(case_folder)
    except BaseException as error:
        outcome.problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        outcome.seconds = time.monotonic() - started
        (folder / f"{index}.outcome").write_text(json.dumps(asdict(outcome)))
        os._exit(0)


def broken(here: Path, folder: Path, seed: int, index: int, outcome: Outcome) -> str:
    """Return what differs after the stops of this case, or went wrong; empty if nothing."""
    case, random = drawn(folder, seed, index)
    outcome.words, outcome.drawn = case.words, case.drawn

    def run(name: str, stop: Stop | None) -> int:
        words = [*case.words, f"hydra.run.dir={here / name}", "resume=auto"]
        return forked.started(words, here / f"{name}.out", stop, RUN_SECONDS, draws=case.draws)

    if code := run("unbroken", None):
        return f"unbroken: exit code {code}: {last_line(here / 'unbroken.out')}"
    ahead = forked.passed(here / "unbroken.out")
    for _ in range(random.choice((1, 1, 2, 2, 3, 4))):
        if not +ahead:
            break
        place = random.choice(sorted(+ahead))
        stop = Stop(place, random.randint(1, ahead[place]), *_how(random, place, case.num_ranks))
        code = run("broken", stop)
        outcome.stops.append(f"{stop} -> {code}")
        if not allowed(code, stop, case.num_ranks):
            return f"{stop}: exit code {code}: {last_line(here / 'broken.out')}"
        passed = forked.passed(here / "broken.out")
        if passed.pop(forked.STOPPED, 0):
            outcome.places.append(f"{stop.place}, {stop.signal}")
        else:  # it came to its end, as it passed that place less often than expected
            outcome.stops[-1] += " (not met)"
        ahead -= passed
    if code := run("broken", None):
        return f"resumed: exit code {code}: {last_line(here / 'broken.out')}"
    return compared.shown(compared.differences(here / "broken", here / "unbroken"))


def _how(random: Random, place: str, num_ranks: int) -> tuple[str, int, bool]:
    """Return the signal, the rank, and whether all get it."""
    rank = random.randrange(num_ranks) if place in forked.OF_ALL_RANKS else 0
    return random.choices(KILLS, (12, 2, 1, 1, 1))[0], rank, num_ranks > 1 and random.random() < 0.5


def allowed(code: int, stop: Stop, num_ranks: int) -> bool:
    """Whether a run may end so that was stopped like this."""
    if stop.signal == "SIGKILL":
        return code in (0, -signal.SIGKILL, 1) if num_ranks > 1 else code in (0, -signal.SIGKILL)
    return code in (0, 75)


def last_line(output: Path) -> str:
    """Of what the runs printed."""
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def coverage(outcomes: list[Outcome]) -> str:
    """How often each option was drawn, and how many stops there were at each place."""
    options: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for option, value in outcome.drawn.items():
            options.setdefault(option, Counter())[value] += 1
    options["stops"] = Counter(place.partition(",")[0] for outcome in outcomes for place in outcome.places)
    options["signals"] = Counter(place.partition(", ")[2] for outcome in outcomes for place in outcome.places)
    width = max(map(len, options))
    return "\n".join(
        f"{option:{width}}  " + ", ".join(f"{value} {count}" for value, count in sorted(counts.items()))
        for option, counts in options.items()
    )


if __name__ == "__main__":
    main()
