"""The path of a stranger: one new thing of each kind in a copy of the project, and no other file touched.

What the documentation shows is added as it stands there; the learner and the callback are written here. All of it runs
in one process, whose ten seconds are six commands and the contract tests of what is new.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import pytest

from espalier.reporting import report
from helpers import forked
from test_docs import FILES, PACKAGE, ROOT

OURS = {
    f"src/{PACKAGE}/learners/margin.py": f"""
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from {PACKAGE}.learners.classifier import Classifier


class Gap(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("total", Tensor([0.0]), dist_reduce_fx="sum")
        self.add_state("num", Tensor([0.0]), dist_reduce_fx="sum")

    def update(self, output, y):
        best = output.topk(2).values
        self.total += (best[:, 0] - best[:, 1]).sum()
        self.num += len(y)

    def compute(self):
        return (self.total / self.num)[0]


class Margin(Classifier):
    def loss(self, output, y):
        return F.multi_margin_loss(output, y)

    def new_metrics(self, split):
        metrics = super().new_metrics(split)
        metrics.add_metrics({{"gap": Gap()}})
        return metrics
""",
    "conf/learner/margin.yaml": f"""# Multi-class hinge loss; the gap between the two largest outputs.
defaults:
  - classifier
  - _self_

_target_: {PACKAGE}.learners.margin.Margin
""",
    f"src/{PACKAGE}/callbacks/odometer.py": """
import lightning as L


class Odometer(L.Callback):
    def __init__(self, unit: str):
        self.unit = unit

    def on_train_end(self, trainer, pl_module):
        print(f"drove {trainer.global_step} {self.unit}")
""",
    "conf/callbacks/odometer.yaml": f"""# Say how many steps were made.
odometer:
  _target_: {PACKAGE}.callbacks.odometer.Odometer
  unit: steps
""",
}
HALF = {  # a method that forgot `replay`
    f"src/{PACKAGE}/compression/half.py": f"""
from {PACKAGE}.compression.base import Compression, Stage


class Half(Compression):
    stage = Stage.MASK

    def apply(self, model):
        return model, {{}}

    @staticmethod
    def finalize(model, entry):
        return model
""",
    "conf/compression/half.yaml": f"# Half a method.\nhalf:\n  _target_: {PACKAGE}.compression.half.Half\n",
}
PROGRAM = """
import sys
from pathlib import Path

import pytest
import torch.onnx._internal.exporter._registration
from conftest import command, share_registry

import PACKAGE

assert Path(PACKAGE.__file__).is_relative_to(Path.cwd()), PACKAGE.__file__
share_registry(pytest.MonkeyPatch())
for words in Path("commands.txt").read_text().splitlines():
    if code := command(words.split(), Path.cwd()).code:
        sys.exit(code)
if sys.argv[1]:
    sys.exit(pytest.main(["tests/contract", "-vv", "-p", "no:cacheprovider", "-k", sys.argv[1]]))
"""
REPORTED = ("compress", "explain", "export", "evaluate", "describe")
QUICK = "logger=[csv]"
COMMANDS = (
    "train data=wine model=linear learner=margin callbacks=[checkpoint,odometer] trainer.max_epochs=8 "
    f"optimizer.lr=0.05 hydra.run.dir=FIRST {QUICK}",
    f"compress source=FIRST compression=[powers_of_two] task.scan=false task.batches=[1] {QUICK}",
    f"explain source=FIRST task.method=[gradient_times_input] task.samples=2 {QUICK}",
    f"export source=FIRST task.format=[onnx_reference] {QUICK}",
    f"evaluate source=FIRST task.robustness=[missing] {QUICK}",
    f"describe source=FIRST task.note=seen {QUICK}",
)


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of code, configuration and contract tests."""
    folder = tmp_path_factory.mktemp("stranger")
    for name in ("src", "conf", "tests/contract", "tests/helpers"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def before(fork: Path) -> dict[Path, str]:
    """Hashes of all files, before the new ones come."""
    return dict(hashes(fork))


@pytest.fixture(scope="module")
def extended(fork: Path, before: dict[Path, str]) -> Path:
    """The copy with one new thing of each kind, all of them new files."""
    add(fork, {**FILES, **OURS})
    return fork


def hashes(folder: Path) -> Iterator[tuple[Path, str]]:
    for part in ("src", "conf", "tests"):
        for file in (folder / part).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                yield file.relative_to(folder), sha256(file.read_bytes()).hexdigest()


def add(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        file = folder / path
        assert not file.exists(), f"{path} is part of the project already"
        file.write_text(text)


def run(folder: Path, commands: Sequence[str], chosen: str = "") -> subprocess.CompletedProcess[str]:
    """One process of the copy, for all of it: commands one after the other, then the contract tests `chosen`."""
    (folder / "commands.txt").write_text("\n".join(commands))
    places = os.pathsep.join(str(folder / name) for name in ("src", "tests"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    return forked.run(["-c", PROGRAM.replace("PACKAGE", PACKAGE), chosen], cwd=folder, env=environment, timeout=240)


@pytest.fixture(scope="module")
def said(extended: Path) -> str:
    """What the copy prints while everything new runs."""
    commands = [words.replace("FIRST", str(extended / "logs" / "train" / "first")) for words in COMMANDS]
    chosen = "(powers_of_two and (linear or option)) or gradient_times_input or onnx_reference or missing"
    done = run(extended, commands, chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_new_thing_of_each_kind_runs(extended: Path, said: str):
    assert re.search(r"^drove [1-9]\d* steps$", said, re.MULTILINE)
    [row] = report.read(extended / "logs" / "train" / "first").rows
    assert row["metrics"]["test/gap"] > 0
    assert row["metrics"]["test/accuracy"] > 0.8
    found = {task: report.read(max((extended / "logs" / task).iterdir())) for task in REPORTED}
    assert found["compress"].rows[-1]["name"] == "powers_of_two"
    assert [row["name"] for row in found["explain"].rows] == ["gradient_times_input"]
    [exported] = found["export"].rows
    assert (exported["name"], exported["runtime"]) == ("onnx_reference", "onnx_reference")
    assert exported["metrics"]["same label"] == 1
    harmed, unharmed = found["evaluate"].rows
    assert harmed["name"] == "missing"
    assert harmed["metrics"]["test/severity 5"] < unharmed["metrics"]["test/accuracy"]
    assert found["describe"].notes == ["seen"]


@pytest.mark.usefixtures("said")
def test_no_other_file_is_touched(extended: Path, before: dict[Path, str]):
    after = dict(hashes(extended))
    assert {path: after.get(path) for path in before} == before
    assert set(after) - set(before) == {Path(path) for path in {**FILES, **OURS}}


def test_the_new_things_keep_the_contracts_without_a_word_about_them_in_the_tests(said: str):
    named = ("powers_of_two", "powers_of_two-linear", "gradient_times_input", "onnx_reference-mlp", "missing-images")
    for name in named:
        assert re.search(rf"tests/contract/.*\[{name}\] PASSED", said), name
    assert "FAILED" not in said


def test_a_method_that_lacks_a_part_ends_in_one_line_that_names_it(fork: Path):
    add(fork, HALF)
    done = run(fork, [f"train model=mlp compression=[half] {QUICK}"])
    for path in HALF:
        (fork / path).unlink()
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{PACKAGE}: compression.half._target_=")
    assert line.endswith(f"{PACKAGE}.compression.half.Half has no replay; see docs/compression_methods.md")
