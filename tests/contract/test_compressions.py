"""What every compression method promises on every model. A new file in `conf/` is covered without touching this one."""

import copy
import io
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from test_options import composed, options, run_of, small, word
from torch import Tensor, nn

from espalier.compression.base import Stage, conversion, finalize, methods, replay, stage_of
from espalier.errors import ConfigError
from espalier.export import onnx
from espalier.run import Run
from helpers import forked

MODELS = options("model")
SETTINGS = {  # for networks of a few channels
    "low_rank": (
        "compression.low_rank.budget=rank",
        "compression.low_rank.keep=0.25",
        "compression.low_rank.round_to=1",
    ),
    "prune_channels": ("compression.prune_channels.round_to=2",),
}
OURS = ("prune_channels", "low_rank", "prune_magnitude", "prune_nm", "distill", "qat", "ptq", "weight_only")
ROUNDED = 0.25  # of the largest logit: int8 operators round on their own
TOLERANCE = {"weight_only": 0.05}


def run_with(folder: Path, method: str, model: str) -> Run:
    """A run that is about to apply one method to a small, briefly disturbed network."""
    words = (*small(model), word("compression", method), *SETTINGS.get(method, ()))
    run = run_of(folder, composed(*words).copy())
    run.__dict__["network_of"] = lambda key, reference: frozen_copy(run.model)  # the teacher: itself
    return run


def frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def test_every_option_is_a_method_and_every_method_an_option():
    assert sorted(methods()) == sorted(options("compression"))
    assert len(methods()) >= 8


@pytest.mark.parametrize("method", options("compression"))
def test_an_option_owns_the_key_of_its_name_and_its_target_lies_in_the_file_of_its_name(method: str):
    recipe = OmegaConf.to_container(composed(word("compression", method)).compression)
    assert list(recipe) == [method]
    target = recipe[method]["_target_"]
    assert target.startswith(f"espalier.compression.{method}.")


@pytest.mark.parametrize("method", [name for name in OURS if name in options("compression")])
def test_a_method_of_ours_names_its_source(method: str):
    assert "arXiv" in (import_module(f"espalier.compression.{method}").__doc__ or "")


def tolerance(method: str) -> float:
    """How far the runtime may be from torch, as a share of the largest logit."""
    return TOLERANCE.get(method, ROUNDED if stage_of(method) == Stage.QUANTIZE else 1e-4)


def through_a_file(value: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def pairs() -> Iterator[Any]:
    """Each method with each model; exported with one of them, with the others where time is no matter."""
    for place, method in enumerate(options("compression")):
        for model in MODELS:
            is_its_own = model == MODELS[place % len(MODELS)]
            yield pytest.param(method, model, is_its_own, id=f"{method}-{model}")
            if not is_its_own:
                yield pytest.param(method, model, True, id=f"{method}-{model}-exported", marks=pytest.mark.slow)


@pytest.mark.parametrize(("method", "model", "is_exported"), pairs())
def test_what_was_applied_is_rebuilt_to_the_last_bit_and_exported(
    tmp_path: Path, method: str, model: str, is_exported: bool
):
    run = run_with(tmp_path, method, model)
    original = copy.deepcopy(run.model)
    try:
        [compression] = run.compressions
        network, entry = compression.apply_to(run.model)
    except ConfigError as error:
        [line] = str(error).splitlines()
        pytest.skip(f"not for this model: {line}")
    x = run.data.samples(64).inputs
    network.train()
    network(*x)  # observers and batch norms have seen something
    network.eval()
    stored = through_a_file({"weights": network.state_dict(), "history": [entry]})
    fresh = replay(copy.deepcopy(original), stored["history"])
    fresh.load_state_dict(stored["weights"])
    fresh.eval()
    assert torch.equal(logits(fresh, x), logits(network, x))
    deployed = finalize(copy.deepcopy(fresh), stored["history"])
    again = finalize(copy.deepcopy(network), [entry])
    expected = logits(deployed, x)
    assert torch.equal(expected, logits(again, x))
    if not is_exported:
        return
    onnx.write(deployed, run.data.spec, tmp_path / "model.onnx", conversion(stored["history"]))
    exported = onnx.Session(tmp_path / "model.onnx", threads=1)(*x)
    assert (exported - expected).abs().max() <= tolerance(method) * expected.abs().max()


REBUILT = """
import sys
from pathlib import Path
import torch
from espalier.compression.base import replay
from espalier.config.compose import compose
from espalier.validate import prepare

for file in map(Path, sys.argv[1:]):
    stored = torch.load(file, weights_only=True)
    words = [*stored["words"], "callbacks=[]", "logger=[]"]
    model = replay(prepare(compose(words), words, file.parent, "train").model, stored["history"])
    model.load_state_dict(stored["weights"])
    with torch.no_grad():
        torch.save(model.eval()(*stored["x"]), file.with_suffix(".logits"))
assert "torch_pruning" not in sys.modules
"""


def applied_where_it_fits(folder: Path, method: str) -> tuple[str, Run, nn.Module, dict[str, Any]]:
    """The first model that a method does not refuse, the run, the network after the method, and its entry."""
    refused = []
    for model in sorted(MODELS, key=lambda name: ("resnet", "vit", name).index(name)):
        run = run_with(folder, method, model)
        try:
            [compression] = run.compressions
            return model, run, *compression.apply_to(run.model)
        except ConfigError as error:
            refused.append(str(error))
    raise AssertionError(f"{method} fits no model: {refused}")


def test_every_method_is_rebuilt_in_a_new_process_to_the_last_bit(tmp_path: Path):
    expected = {}
    for method in options("compression"):
        model, run, network, entry = applied_where_it_fits(tmp_path, method)
        x = run.data.samples(64).inputs
        network.train()
        network(*x)
        expected[method] = logits(network.eval(), x)
        stored = {
            "words": [*small(model)],
            "history": [entry],
            "weights": network.state_dict(),
            "x": x,
        }
        torch.save(stored, tmp_path / f"{method}.pt")
    files = [str(tmp_path / f"{method}.pt") for method in expected]
    done = forked.run(["-c", REBUILT, *files])
    assert done.returncode == 0, done.stderr
    found = {method: torch.load(tmp_path / f"{method}.logits", weights_only=True) for method in expected}
    assert [method for method in expected if not torch.equal(found[method], expected[method])] == []


@torch.no_grad()
def logits(network: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    return network(*inputs)
