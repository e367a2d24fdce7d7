"""Weight-only quantization rounds to the grid that is deployed, and the deployed operator computes the same."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from espalier.compression.base import Conversion, conversion, finalize, replay
from espalier.compression.weight_only import WeightOnly, decode, encode
from espalier.errors import ConfigError
from espalier.export.onnx import Session, write
from espalier.export.onnx_operators import operators
from espalier.models.mlp import MLP
from espalier.models.resnet import ResNet
from espalier.models.vit import ViT
from espalier.spec import of_shape

SHAPE = (1, 8, 8)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP(SHAPE, 10, (72,), "relu", "none", 0.0).eval()  # 72: the last block is not full


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViT(SHAPE, 10, 2, 32, 2, 4, 2, "mean", "gelu", "layer", 0.0).eval()


def test_the_largest_magnitude_is_the_lowest_code_and_the_others_are_rounded_to_its_eighths():
    codes, scale = encode(torch.tensor([[0.8, -0.24, 0.06, 0.0]]), bits=4, block=4)
    assert scale.tolist() == [[pytest.approx(-0.1)]]  # 0.8 / -8
    assert codes.tolist() == [[[0, 10, 7, 8]]]  # -8, 2.4 -> 2, -0.6 -> -1 and 0 steps, plus 8
    weights = decode(codes, scale, bits=4, num_inputs=4)
    torch.testing.assert_close(weights, torch.tensor([[0.8, -0.2, 0.1, 0.0]]))


def test_each_block_of_each_row_has_its_own_scale_and_zeros_stay_zeros():
    codes, scale = encode(torch.tensor([[1.0, 0.5, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, -2.0, 0.0]]), bits=8, block=2)
    torch.testing.assert_close(scale, torch.tensor([[1.0, 0.0, 4.0], [0.0, -2.0, 0.0]]) / -128)
    assert codes[0].tolist() == [[0, 64], [128, 128], [0, 128]]  # the third is padded


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_decoded_encodes_to_the_same_weights_to_the_last_bit(bits: int):
    weight = torch.randn(24, 50)
    once = decode(*encode(weight, bits, 16), bits, 50)
    assert torch.equal(decode(*encode(once, bits, 16), bits, 50), once)
    largest_step = weight.abs().max() / 2 ** (bits - 1)
    assert (once - weight).abs().max() <= largest_step * 1.001  # half a step, a whole one at the end that is cut off


@pytest.mark.parametrize(("make", "bits"), [(mlp, 8), (mlp, 4), (vit, 8)])
@torch.no_grad()
def test_the_deployed_operator_computes_what_the_rounded_network_computes(make, bits: int, tmp_path: Path):
    model, entry = WeightOnly(bits, 32, []).apply_to(make())
    write(finalize(model, [entry]), of_shape(SHAPE), tmp_path / "model.onnx", conversion([entry]))
    x = torch.randn(64, *SHAPE)
    assert relative(Session(tmp_path / "model.onnx", threads=1)(x), model(x)) < 0.02  # activations of 8 bits
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert operators(tmp_path / "model.onnx")["MatMulNBits"] == len(layers)
    num_weights = sum(layer.out_features * -(-layer.in_features // 32) * 32 for layer in layers)  # whole blocks
    num_rest = sum(parameter.numel() for parameter in model.parameters()) - sum(
        layer.weight.numel() for layer in layers
    )
    num_bytes = num_weights * bits // 8 + 4 * num_weights // 32 + 4 * num_rest  # codes, scales, float
    assert (
        abs((tmp_path / "model.onnx").stat().st_size - num_bytes)
        < 60 * len(onnx.load(tmp_path / "model.onnx").graph.node) + 600
    )


@torch.no_grad()
def test_eight_bits_change_the_logits_little_and_four_bits_more():
    model, x = vit(), torch.randn(64, *SHAPE)
    before = model(x)
    eight, _ = WeightOnly(8, 32, []).apply(vit())
    four, _ = WeightOnly(4, 32, []).apply(vit())
    assert 0 < relative(eight(x), before) < 0.02 < relative(four(x), before) < 0.3


def relative(logits: Tensor, reference: Tensor) -> float:
    return float((logits - reference).norm() / reference.norm())


@torch.no_grad()
def test_replay_and_a_strict_load_give_the_same_logits_and_the_entry_is_plain(tmp_path: Path):
    model, entry = WeightOnly(4, 16, ["head"]).apply_to(vit())
    torch.save({"history": [entry], "state_dict": model.state_dict()}, tmp_path / "run.ckpt")
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)
    loaded = replay(ViT(SHAPE, 10, 2, 32, 2, 4, 2, "mean", "gelu", "layer", 0.0).eval(), stored["history"])
    loaded.load_state_dict(stored["state_dict"])
    x = torch.randn(3, *SHAPE)
    assert torch.equal(loaded(x), model(x))
    assert conversion(stored["history"]) == Conversion("weight_only", 4, 16, ("head",))


def test_a_skipped_module_keeps_its_weights():
    before = vit()
    model, _ = WeightOnly(4, 32, ["layers.0", "head"]).apply(vit())
    kept = {
        name
        for (name, weight), old in zip(model.named_parameters(), before.parameters(), strict=True)
        if torch.equal(weight, old)
    }
    assert {"head.weight", "layers.0.branch.attention.qkv.weight", "patches.weight"} <= kept
    assert not {"layers.1.branch.mlp.linear1.weight", "layers.2.branch.attention.qkv.weight"} & kept


def test_a_convolutional_network_is_refused_with_the_share_of_its_linear_layers():
    model = ResNet(SHAPE, 10, 8, "cifar", None, 8, "relu", "batch", 0.0)
    with pytest.raises(ConfigError, match=r"^compression\.weight_only\.skip=\[\]: .* hold 1\.6% of the parameters"):
        WeightOnly(8, 32, []).require(model)


def test_a_misspelt_module_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"^compression\.weight_only\.skip=haed: .*did you mean head\?$"):
        WeightOnly(8, 32, ["haed"]).require(mlp())
    WeightOnly(8, 32, ["head"]).require(mlp())
