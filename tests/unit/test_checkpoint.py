"""Checkpoints describe themselves, reach the disk whole, and give their weights only to networks that they fit."""

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from espalier.errors import ConfigError, EspalierError
from espalier.runs import checkpoint
from espalier.runs.checkpoint import Checkpoint, CheckpointIO
from espalier.spec import DataSpec

SPEC = DataSpec.single("toy", (4,), 1.0, (0.0,) * 4, (1.0,) * 4, ("no", "yes"), (3, 5))
CONFIG = {"model": {"_target_": "espalier.models.mlp.MLP", "hidden": [3]}, "seed": 0}


def network(num_outputs: int = 2, width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, num_outputs))


def stored(model: nn.Module, **others: torch.Tensor) -> Checkpoint:
    state = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    return Checkpoint(Path("some.ckpt"), {"state_dict": {**state, **others}})


def save(path: Path, **content: object) -> None:
    CheckpointIO(CONFIG, SPEC, []).save_checkpoint({"state_dict": {"model.w": torch.ones(2)}, **content}, path)


def test_what_is_saved_is_loaded_with_its_config_and_spec(tmp_path: Path):
    save(tmp_path / "new" / "a.ckpt", epoch=3)
    found = checkpoint.load("source", tmp_path / "new" / "a.ckpt")
    assert (found.config, found.spec, found.content["epoch"]) == (CONFIG, SPEC, 3)
    assert found.weights.keys() == {"w"}
    assert torch.load(tmp_path / "new" / "a.ckpt", weights_only=True)["epoch"] == 3


def test_weights_are_those_of_the_model_alone():
    model = network()
    checkpointed = stored(model, class_weights=torch.ones(2), **{"teacher.w": torch.ones(1)})
    assert checkpointed.weights.keys() == model.state_dict().keys()


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "a.ckpt", epoch=1)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        EspalierError, match=r"a\.ckpt: not written, No space left on device; what was there.*Make room"
    ):
        save(tmp_path / "a.ckpt", epoch=2)
    assert checkpoint.load("source", tmp_path / "a.ckpt").content["epoch"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "SHA256SUMS"}


def test_every_truncation_is_noticed(tmp_path: Path):
    save(tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "part.ckpt").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"^resume=.*part\.ckpt: damaged"):
            checkpoint.load("resume", tmp_path / "part.ckpt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": {}, "espalier": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(ConfigError, match="plain types alone"):
        checkpoint.load("source", tmp_path / "trap.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path):
    torch.save({"state_dict": {}, "espalier": {"version": 0}}, tmp_path / "old.ckpt")
    with pytest.raises(ConfigError, match="not a checkpoint of this version"):
        checkpoint.load("source", tmp_path / "old.ckpt")


def test_weights_that_fit_are_taken_over():
    model, other = network(), network()
    checkpoint.load_weights(model, stored(other))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("other", [network(num_outputs=5), network().append(nn.Linear(2, 2)), network()[:1]])
def test_weights_of_another_architecture_are_refused_and_nothing_changes(other: nn.Module):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="another architecture"):
        checkpoint.load_weights(model, stored(other))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_that_does_not_fit_stays_new_and_is_named():
    model, other = network(num_outputs=5), network(num_outputs=2)
    head = model[2].weight.clone()
    assert checkpoint.load_fitting_weights(model, stored(other)) == ["2.weight", "2.bias"]
    assert torch.equal(model[0].weight, other[0].weight)
    assert torch.equal(model[2].weight, head)


def test_a_warm_start_from_another_architecture_is_refused():
    with pytest.raises(ConfigError, match="only 1 of 4 tensors fit"):
        checkpoint.load_fitting_weights(network(), stored(network(width=9)))


def test_a_picture_set_of_before_there_was_a_background_keeps_the_black_one_that_it_was_trained_with():
    data = {"_target_": "espalier.data.hub_images.HubImages", "path": "photos"}
    stored = Checkpoint(Path("last.ckpt"), {"espalier": {"config": {"data": data, "seed": 0}}})
    assert stored.config == {"data": {**data, "background": "black", "broken": "refuse"}, "seed": 0}
    chosen = {**data, "background": "white", "broken": "skip"}
    assert Checkpoint(Path("last.ckpt"), {"espalier": {"config": {"data": chosen}}}).config == {"data": chosen}
