"""What a checkpoint's file may look like, and what it may say of itself, before anything is made of it."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from espalier.errors import ConfigError
from espalier.spec import DataSpec
from espalier.trust import archive, metadata

SPEC = DataSpec.single("digits", (1, 8, 8), 16.0, (0.3,), (0.4,), ("a", "b"), (3, 4)).to_dict()


def credible(beside: dict[str, Any] | None = None, **changes: Any) -> None:
    said = {"config": {"model": {"hidden": [8]}}, "spec": SPEC, "compression": [{"method": "qat"}], **changes}
    content = {"espalier": said, "state_dict": {"model.x": torch.ones(2)}, **(beside or {})}
    metadata.require_credible("source", Path(__file__), content)


def test_what_torch_writes_is_safe(tmp_path: Path):
    torch.save({"x": [torch.ones(3), torch.zeros(0)]}, tmp_path / "by_path.ckpt")
    with (tmp_path / "by_file.ckpt").open("wb") as file:
        torch.save({"x": torch.ones(3)}, file)
    archive.require_safe("source", tmp_path / "by_path.ckpt")
    archive.require_safe("source", tmp_path / "by_file.ckpt")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (["a/data.pkl", "a/../x"], "a member is called 'a/../x'"),
        (["/data.pkl"], "a member is called '/data.pkl'"),
        (["a/data.pkl", "a/b\\c"], "a member is called"),
        (["a/data.pkl", "b/data.pkl"], "below two folders"),
        ([], "below two folders"),
    ],
)
def test_members_lie_below_one_folder(tmp_path: Path, members: list[str], reason: str):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        for name in members:
            file.writestr(name, b"x")
    with pytest.raises(ConfigError, match=r"^source=.*x\.ckpt: ") as caught:
        archive.require_safe("source", path)
    assert reason in str(caught.value) or not members


def test_members_that_share_their_bytes_are_refused(tmp_path: Path):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", bytes(1000))
        twin = zipfile.ZipInfo("a/data/0")
        first = file.infolist()[0]
        for name in ("header_offset", "file_size", "compress_size", "CRC"):
            setattr(twin, name, getattr(first, name))
        file.filelist.append(twin)
    with pytest.raises(ConfigError, match="members share their bytes"):
        archive.require_safe("source", path)


def test_an_honest_description_is_credible():
    credible()


def loop() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    tree["x"] = tree
    return tree


def shared(depth: int) -> Any:
    """10^depth parts in `depth` lists."""
    return [shared(depth - 1)] * 10 if depth else 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": loop()}, "nested more than 64 deep"),
        ({"config": {"x": shared(12)}}, "more parts than any checkpoint has"),
        ({"config": {"x": torch.ones(1)}}, "no tree of plain values"),
        ({"config": {1: 2}}, "no tree of plain values"),
        ({"config": [1]}, "no tree of plain values"),
        ({"config": {"x": 10**30}}, "no tree of plain values"),
        ({"compression": [{"method": "../x"}]}, "no list of methods"),
        ({"compression": {"method": "qat"}}, "no list of methods"),
        ({"spec": {**SPEC, "shape": "8"}}, "spec.shape: no such value"),
        ({"spec": {**SPEC, "scale": float("nan")}}, "spec.scale: no such value"),
        ({"spec": {**SPEC, "x\n": 1}}, r"spec.x\n: no such value"),
        ({"spec": {"name": "x"}}, "spec.shape: missing"),
        ({"spec": None}, "spec: no dictionary"),
        ({"beside": {"state_dict": {"x": 1}}}, "holds more than tensors"),
        ({"beside": {"x": torch.ones(1).expand(10**6, 10**6)}}, "larger than the file"),
        ({"beside": {"hyper_parameters": {"_instantiator": "os.system"}}}, "names _instantiator"),
        ({"beside": {"callbacks": {"x": {"last_model_path": "s3://bucket/x"}}}}, "outside of its folder"),
        ({"beside": {"callbacks": {"x": {"best_k_models": {"/run/checkpoints/../../x": 1}}}}}, "outside of its folder"),
    ],
)
def test_what_is_not_credible_is_one_line(changes: dict[str, Any], reason: str):
    with pytest.raises(ConfigError, match=r"^source=.*: not used, ") as caught:
        credible(**changes)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_state_of_a_training_goes_on():
    with pytest.raises(ConfigError, match="holds no loops, so nothing goes on from it"):
        metadata.require_state("resume", Path("x"), {"epoch": 1, "global_step": 1})
