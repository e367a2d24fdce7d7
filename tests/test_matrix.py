"""A few random commands, killed and resumed; `scripts/chaos/matrix.py` does it with hundreds."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "chaos"))

from compared import differences, shown

from helpers.forked import run

SCRIPT = Path(__file__).parents[1] / "scripts" / "chaos" / "matrix.py"
SEED = 126
NUM_CASES = 5


def test_random_commands_that_are_killed_and_resumed_end_as_those_left_alone():
    words = ("--cases", str(NUM_CASES), "--seed", str(SEED), "--jobs", "1")
    done = run([SCRIPT, *words], timeout=280)
    assert f"\n{NUM_CASES} of {NUM_CASES} equal" in done.stdout, done.stdout + done.stderr


def _run(folder: Path, weight: float, row: str) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    content = {"state_dict": {"weight": torch.tensor([1.0, weight])}, "path": f"{folder}/checkpoints/last.ckpt"}
    torch.save({**content, "callbacks": {"Monitor": {"seconds": weight}}}, folder / "checkpoints" / "last.ckpt")
    (folder / "metrics.csv").write_text(f"step,val/loss,samples_per_second\n0,{row}\n")
    (folder / "report.json").write_text('{"task": "train", "rows": [], "notes": []}')
    return folder


def test_runs_that_differ_in_folder_and_clocks_alone_are_equal(tmp_path: Path):
    one, other = _run(tmp_path / "one", 2.0, "0.5,100"), _run(tmp_path / "other", 2.0, "0.5,200")
    assert differences(one, other) == []


def test_a_weight_and_a_row_that_differ_in_the_last_bit_are_found(tmp_path: Path):
    next_to_2 = torch.tensor(2.0).nextafter(torch.tensor(3.0)).item()
    one, other = _run(tmp_path / "one", 2.0, "0.5,100"), _run(tmp_path / "other", next_to_2, "0.5000000000000001,100")
    found = differences(one, other)
    assert found == ["metrics.csv", "last.ckpt/state_dict/weight"]
    assert shown(found) == "metrics.csv, last.ckpt/state_dict/weight"
