"""Programs that would run code of their author are refused before torch reads them; each is shown to be dangerous."""

import contextlib
import io
import json
import os
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from torch import nn

from espalier.errors import ConfigError
from espalier.export.torch_export import Session, TorchExport
from espalier.models.mlp import MLP
from espalier.spec import of_shape
from espalier.trust import torch_program
from espalier.trust.torch_program import require_harmless

SHAPE = (1, 4, 4)
PROGRAM, SAMPLE = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "model.pt2"
    torch.manual_seed(0)
    TorchExport().write(MLP(SHAPE, 3, (5,), "relu", "none", 0.0).eval(), of_shape(SHAPE), path)
    return path


def pickled(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def altered(honest: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The same archive after `change` of its entries, by name."""
    with ZipFile(honest) as source:
        entries = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
    change(entries)
    with ZipFile(target, "w") as copy:
        for name, content in entries.items():
            copy.writestr(name.removeprefix("/") if name.startswith("/") else f"model/{name}", content)
    return target


def in_json(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, bytes]], None]:
    def apply(entries: dict[str, bytes]) -> None:
        content = json.loads(entries[name])
        change(content)
        entries[name] = json.dumps(content).encode()

    return apply


def test_an_honest_program_is_loaded(honest: Path):
    require_harmless(honest)
    assert Session(honest, 1)(torch.zeros(2, *SHAPE)).shape == (2, 3)


class Grouped(nn.Module):
    """Its forward needs sizes that are computed from the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.head(x.reshape(x.shape[0] * 2, 8))
        return parts.view(x.shape[0], 2, 3).mean(1) * x.shape[0] / (x.shape[0] + 1)


def test_sizes_computed_from_the_batch_are_honest(tmp_path: Path):
    model = Grouped().eval()
    TorchExport().write(model, of_shape(SHAPE), tmp_path / "model.pt2")
    x = torch.randn(5, *SHAPE)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(Session(tmp_path / "model.pt2", 1)(x), expected)


def sample(path: Path) -> Callable[[dict[str, bytes]], None]:
    return lambda entries: entries.update({SAMPLE: pickled((Touches(path),))})


def weight(path: Path) -> Callable[[dict[str, bytes]], None]:
    def change(entries: dict[str, bytes]) -> None:
        entries["data/weights/weight_0"] = pickled(Touches(path))
        in_json(WEIGHTS, lambda config: next(iter(config["config"].values())).update(use_pickle=True))(entries)

    return change


def constant(path: Path) -> Callable[[dict[str, bytes]], None]:
    def change(entries: dict[str, bytes]) -> None:
        entries["data/constants/opaque_obj_0"] = pickle.dumps(Touches(path))
        held = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        in_json(CONSTANTS, lambda config: config["config"].update(held=held))(entries)

    return change


def old_weights(path: Path) -> Callable[[dict[str, bytes]], None]:
    return lambda entries: entries.update({"data/weights/model.pt": pickled({"w": Touches(path)})})


def size(path: Path) -> Callable[[dict[str, bytes]], None]:
    words = f"__import__('os').mkdir({str(path)!r})"

    def poison(node: Any) -> None:
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            poison(value)
        if isinstance(node, dict) and "expr_str" in node:
            node["expr_str"] = words

    return in_json(PROGRAM, poison)


def guard(path: Path) -> Callable[[dict[str, bytes]], None]:
    words = f"__import__('os').mkdir({str(path)!r}) is None"
    return in_json(PROGRAM, lambda program: program.update(guards_code=[words]))


HOSTILE = {
    "a pickled sample": (sample, "pickled objects"),
    "a pickled weight": (weight, "pickled objects"),
    "a pickled constant": (constant, "opaque_obj_0"),
    "weights as torch wrote them before": (old_weights, "data/weights/model.pt"),
    "a size that is a call": (size, "no number"),
    "a guard": (guard, "guards, which are Python"),
}


@pytest.mark.parametrize(("make", "problem"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_would_run_code_is_refused_in_one_line_and_not_run(honest: Path, tmp_path: Path, make, problem: str):
    touched = tmp_path / "touched"
    path = altered(honest, tmp_path / "model.pt2", make(touched))
    with pytest.raises(ConfigError, match="not loaded, ") as refused:
        Session(path, 1)
    assert "\n" not in str(refused.value)
    assert problem in str(refused.value)
    assert not touched.exists()
    with contextlib.suppress(Exception):
        torch.export.load(path).module()(torch.zeros(2, *SHAPE))
    assert touched.exists(), "torch alone runs it"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda entries: entries.update({"data/aotinductor/model/model.so": b""}), "data/aotinductor"),
        (lambda entries: entries.update({"/version": b"8.14"}), "no program of torch.export"),
        (lambda entries: entries.pop(SAMPLE), "pickled"),
        (lambda entries: entries.update({PROGRAM: b"["}), "no program of torch.export"),
        (lambda entries: entries.update({"archive_format": b"zip"}), "no program of torch.export"),
    ],
    ids=["machine code", "an older layout", "no sample", "half a program", "another archive"],
)
def test_what_write_does_not_write_is_refused(honest: Path, tmp_path: Path, change, problem: str):
    with pytest.raises(ConfigError, match=f"not loaded, .*({problem})"):
        require_harmless(altered(honest, tmp_path / "model.pt2", change))


@pytest.mark.parametrize(
    "target",
    [
        *("torch.ops.aten.save.default", "torch.ops.aten.from_file.default", "torch.ops.aten.add.__init__"),
        *("torch.serialization.os.mkdir", "torch.hub.load", "_operator.methodcaller", "math.ceil", "#made:up"),
    ],
)
def test_nothing_but_operators_on_tensors_is_called(honest: Path, tmp_path: Path, target: str):
    def change(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = target

    with pytest.raises(ConfigError, match=re.escape(f"calls '{target}', which is no operator on tensors")):
        require_harmless(altered(honest, tmp_path / "model.pt2", in_json(PROGRAM, change)))


@pytest.mark.parametrize("text", ["1", "s1", "s11", "Mod1", "'s1'", "positive=True"])
def test_a_long_text_in_place_of_a_size_is_judged_in_time(text: str):
    began = time.perf_counter()
    assert not torch_program.SIZE.fullmatch(text * 1000 + "!")
    assert time.perf_counter() - began < 5  # each digit doubled it: years
    assert torch_program.SIZE.fullmatch("Mul(Integer(4), Symbol('s77', positive=True, integer=True)) + s0*12")
