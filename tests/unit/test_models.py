"""Every model option on real shapes; parameter counts against the papers; parts against a second route."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from espalier.models import blocks
from espalier.models.cnn import average_to_grid
from espalier.models.densenet import DenseLayer
from espalier.spec import Input

FILES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))}
TOKENS = ("text_cnn", "transformer")
OPTIONS = {name: path for name, path in FILES.items() if name not in TOKENS}  # that take one tensor of numbers
IMAGE_MODELS = ["cnn", "densenet", "resnet", "vit"]
DIGITS = (1, 8, 8)
SMALL: dict[str, dict[str, Any]] = {  # each family at its fastest
    "cnn": {"channels": [4, 8], "hidden": [8]},
    "densenet": {"depth": [2, 2], "growth": 4},
    "mlp": {"hidden": [16, 8]},
    "resnet": {"depth": [1, 1], "width": 4},
    "vit": {"depth": 2, "width": 16},
}
NORMS = [
    *[(option, norm) for option in ("cnn", "densenet", "resnet") for norm in get_args(blocks.Norm)],
    *[("mlp", norm) for norm in get_args(blocks.FeatureNorm)],
    ("vit", "layer"),
    ("vit", "rms"),
]


def build(option: str, shape: tuple[int, ...] = DIGITS, num_outputs: int = 10, **knobs: Any) -> nn.Module:
    torch.manual_seed(0)
    config = OmegaConf.merge(OmegaConf.load(OPTIONS[option]), knobs)
    return instantiate(config, input_shape=shape, num_outputs=num_outputs, _convert_="all")


def samples(num: int, shape: tuple[int, ...] = DIGITS, seed: int = 0) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed))


def num_params(option: str, shape: tuple[int, ...], num_outputs: int, **knobs: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(option, shape, num_outputs, **knobs).parameters())


def test_each_option_is_known_here_and_its_first_line_says_what_it_is():
    assert list(FILES) == ["cnn", "densenet", "mlp", "resnet", *TOKENS, "vit"]
    assert all(path.read_text().startswith("# ") for path in FILES.values())


@pytest.mark.parametrize("option", TOKENS)
def test_padding_changes_no_answer_and_a_gradient_reaches_every_parameter(option: str):
    torch.manual_seed(0)
    entry = Input("tokens", "tokens", ("T",), vocabulary=tuple("abcdefgh"))
    made = instantiate(OmegaConf.load(FILES[option]), dropout=0.0, _partial_=True, _convert_="all")
    network = made(inputs=[entry], num_outputs=3)
    ids_BT = torch.randint(2, 10, (4, 6), generator=torch.Generator().manual_seed(1))
    expected = network(ids_BT)
    torch.testing.assert_close(network(F.pad(ids_BT, (0, 5))), expected)
    expected.square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 16, 24)], ids=str)
def test_every_option_turns_images_into_logits(option: str, shape: tuple[int, ...]):
    assert build(option, shape, num_outputs=7).eval()(samples(2, shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("option", "knobs"),
    [
        ("cnn", {}),
        ("resnet", {"depth": 18, "stem": "imagenet", "width": 8}),
        ("resnet", {"depth": 50, "stem": "imagenet", "width": 8}),
        ("densenet", {"depth": [2, 2, 2, 2], "stem": "imagenet"}),
        ("vit", {"patch": 16}),
    ],
    ids=str,
)
def test_large_images_work(option: str, knobs: dict[str, Any]):
    assert build(option, (3, 224, 224), 5, **knobs).eval()(samples(1, (3, 224, 224))).shape == (1, 5)


def test_a_table_fits_the_mlp_and_no_hidden_layer_makes_it_linear():
    model = build("mlp", (30,), 2, hidden=[])
    x = samples(4, (30,))
    torch.testing.assert_close(model(x), x @ model.head.weight.T + model.head.bias)
    assert num_params("mlp", (30,), 2, hidden=[20]) == 30 * 20 + 20 + 20 * 2 + 2


def test_resnet_20_has_the_parameters_that_its_table_implies():
    """Section 4.2: 1 + 6n convolutions and 10 outputs; two numbers per channel and norm; 1x1 projections."""
    kernels = 9 * 3 * 16 + 9 * (6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    head = 64 * 10 + 10
    assert kernels + norms + projections + head == 272_474
    assert num_params("resnet", (3, 32, 32), 10) == 272_474
    assert num_params("resnet", (1, 8, 8), 10) == 272_474 - 9 * 2 * 16


@pytest.mark.parametrize(
    ("option", "knobs", "published"),
    [
        ("resnet", {"depth": 18}, 11_689_512),
        ("resnet", {"depth": 34}, 21_797_672),
        ("resnet", {"depth": 50}, 25_557_032),
        ("resnet", {"depth": 101}, 44_549_160),
        ("resnet", {"depth": 152}, 60_192_808),
        ("densenet", {"depth": 121, "growth": 32}, 7_978_856),
        ("densenet", {"depth": 161, "growth": 48}, 28_681_000),
        ("densenet", {"depth": 169, "growth": 32}, 14_149_480),
        ("densenet", {"depth": 201, "growth": 32}, 20_013_928),
    ],
    ids=str,
)
def test_imagenet_networks_have_their_published_size(option: str, knobs: dict[str, int], published: int):
    assert num_params(option, (3, 224, 224), 1000, stem="imagenet", **knobs) == published


def test_vit_base_16_has_its_published_size():
    base = {"patch": 16, "width": 768, "depth": 12, "heads": 12, "expansion": 4, "pool": "token"}
    assert num_params("vit", (3, 224, 224), 1000, **base) == 86_567_656


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_size_of_table_6(depth: int, millions: float):
    assert num_params("resnet", (3, 32, 32), 10, depth=depth) / 1e6 == pytest.approx(millions, rel=0.02)


def test_densenet_bc_100_has_the_size_of_table_2():
    assert num_params("densenet", (3, 32, 32), 10, depth=100) / 1e6 == pytest.approx(0.8, rel=0.05)


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 56, 152])
def test_depth_counts_the_layers_with_weights(depth: int):
    with torch.device("meta"):
        model = build("resnet", depth=depth)
    shortcuts = [layer for name, layer in model.named_modules() if name.endswith("shortcut.conv")]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) - len(shortcuts) == depth


def test_the_stem_or_the_block_decides_between_the_two_networks_of_depth_50():
    def stages(**knobs: Any) -> list[int]:
        with torch.device("meta"):
            return [len(stage) for stage in build("resnet", (3, 64, 64), depth=50, **knobs).stages]

    assert stages() == [8, 8, 8]
    assert stages(stem="imagenet") == [3, 4, 6, 3]
    assert stages(block="bottleneck") == [3, 4, 6, 3]


def test_dense_layers_append_to_what_they_read():
    model = build("densenet", depth=[3], growth=4)
    x = samples(2, (8, 8, 8))
    grown = model.blocks[0](x)
    assert grown.shape == (2, 8 + 3 * 4, 8, 8)
    assert torch.equal(grown[:, :8], x)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_prediction_does_not_depend_on_its_batch(option: str):
    model = build(option)
    model(samples(16))  # batch norm has seen something
    model.eval()
    x = samples(5, seed=1)
    alone = torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_gradient_reaches_every_parameter(option: str):
    model = build(option, **SMALL[option])
    F.cross_entropy(model(samples(16)), torch.arange(16) % 10).backward()
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert without == []


@pytest.mark.parametrize("option", OPTIONS)
def test_an_untrained_network_gives_all_classes_nearly_the_same_probability(option: str):
    loss = F.cross_entropy(build(option)(samples(64)), torch.arange(64) % 10)
    assert float(loss.detach()) == pytest.approx(math.log(10), abs=0.1)


@pytest.mark.parametrize(("option", "norm"), NORMS)
def test_every_norm_learns(option: str, norm: str):
    assert_learns(build(option, norm=norm, **SMALL[option]), num_steps=40)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("activation", get_args(blocks.Activation))
def test_every_activation_learns(option: str, activation: str):
    assert_learns(build(option, activation=activation, **SMALL[option]), num_steps=15)


def assert_learns(model: nn.Module, num_steps: int) -> None:
    x, y = samples(16), torch.arange(16) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("option", OPTIONS)
def test_dropout_acts_in_training_only(option: str):
    model = build(option, dropout=0.5, norm="layer", **SMALL[option])
    x = samples(4)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("option", OPTIONS)
def test_weights_keep_their_names_whatever_the_dropout(option: str):
    assert build(option, dropout=0.5).state_dict().keys() == build(option, dropout=0.0).state_dict().keys()


@pytest.mark.parametrize("option", OPTIONS)
def test_the_last_layer_is_a_linear_layer_named_head(option: str):
    model = build(option, num_outputs=3)
    assert type(model.head) is nn.Linear
    assert model.head.out_features == 3


@pytest.mark.parametrize("option", OPTIONS)
def test_no_activation_module_serves_twice(option: str):
    model = build(option, **SMALL[option])
    calls: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.GELU):
            module.register_forward_hook(lambda module, *_: calls.update({module: calls.get(module, 0) + 1}))
    model.eval()(samples(1))
    assert calls
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_exported_program_takes_any_batch_size(option: str):
    model = build(option, **SMALL[option]).eval()
    program = torch.export.export(model, (samples(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = samples(5, seed=2)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("option", IMAGE_MODELS)
def test_channels_last_changes_the_layout_only(option: str):
    model = build(option, **SMALL[option]).eval()
    x = samples(3)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("option", IMAGE_MODELS)
def test_a_table_is_refused_by_image_models(option: str):
    assert re.search(r"\(30,\); use model=mlp", refusal(option, (30,)))


@pytest.mark.parametrize(
    ("option", "knobs", "complaint"),
    [
        ("cnn", {"channels": [4, 4, 4, 4]}, "at least 16 pixels.*model.channels"),
        ("resnet", {"depth": 18, "stem": "imagenet"}, "at least 32 pixels.*model.stem=cifar"),
        ("resnet", {"depth": [1] * 5}, "at least 16 pixels.*model.depth"),
        ("resnet", {"depth": 18, "norm": "instance"}, "at least 16 pixels.*model.depth"),
        ("resnet", {"depth": 21}, r"model.depth=21 .*18, 34, 50, 101, 152"),
        ("resnet", {"depth": 2}, "model.depth=2 .*8, 14, 20"),
        ("resnet", {"depth": 20, "stem": "imagenet"}, "model.depth=20 .*stem=imagenet"),
        ("resnet", {"depth": 20, "block": "bottleneck"}, "bottleneck blocks; use 50, 101, 152"),
        ("resnet", {"depth": []}, r"model.depth=\[\]"),
        ("densenet", {"depth": 41}, "model.depth=41 .*121, 161, 169, 201"),
        ("densenet", {"depth": 4}, "model.depth=4 .*10, 16, 22"),
        ("densenet", {"depth": []}, r"model.depth=\[\]"),
        ("densenet", {"depth": 121, "stem": "imagenet"}, "at least 32 pixels.*model.stem=cifar"),
        ("vit", {"patch": 3}, "model.patch=3 .*8 x 8"),
        ("vit", {"patch": 16}, "at least 16 pixels.*model.patch"),
        ("vit", {"heads": 3}, "model.width=64 .*model.heads=3"),
    ],
    ids=str,
)
def test_an_impossible_network_is_refused_by_the_name_of_its_knob(option: str, knobs: dict[str, Any], complaint: str):
    assert re.search(complaint, refusal(option, **knobs))


def refusal(option: str, shape: tuple[int, ...] = DIGITS, **knobs: Any) -> str:
    """The message of the ValueError that ends the building."""
    with pytest.raises(InstantiationException) as caught:
        build(option, shape, **knobs)
    assert isinstance(caught.value.__cause__, ValueError)
    return str(caught.value.__cause__)


def test_the_order_of_the_patches_matters():
    """A transformer without positions would answer the same for a shuffled image."""
    model = build("vit").eval()
    x = samples(1)
    assert not torch.allclose(model(x), model(x.flip(2)), atol=1e-3)


def test_without_norms_152_layers_keep_the_signal_in_bounds():
    """Each of L blocks multiplies the mean square by at most 1 + 2/L (the ReLU passes positive sums), so below e**2."""
    model = build("resnet", (1, 8, 8), depth=152, norm="none")
    with torch.no_grad():
        energies = [model.stem(samples(16))]
        for stage in model.stages:
            energies.append(stage(energies[-1]))
    squares = [float(x.square().mean()) for x in energies]
    assert all(0.05 < later / earlier < math.e**2 for earlier, later in pairwise(squares))


def test_initial_weights_have_the_variance_of_he_et_al():
    weight = build("mlp", (2000,), hidden=[500]).layers.linear1.weight
    assert float(weight.detach().square().mean()) == pytest.approx(2 / 2000, rel=0.02)


@pytest.mark.parametrize(("side", "grid"), [(28, 4), (12, 3), (6, 6)])
def test_the_grid_is_plain_averaging_where_it_divides_the_side(side: int, grid: int):
    x = samples(2, (3, side, side))
    torch.testing.assert_close(average_to_grid(side, side, grid)(x), F.adaptive_avg_pool2d(x, grid))


@pytest.mark.parametrize(("height", "width"), [(7, 9), (14, 5), (3, 30), (1, 1)])
def test_the_grid_reads_every_pixel_and_never_exceeds_its_size(height: int, width: int):
    x = torch.zeros(1, 1, height, width, requires_grad=True)
    averages = average_to_grid(height, width, 4)(x)
    assert averages.shape == (1, 1, min(4, height), min(4, width))
    averages.sum().backward()
    assert bool((x.grad > 0).all())


def test_any_layer_list_can_be_changed():
    assert [layer.out_channels for layer in layers_of(build("cnn", channels=[5, 7]), nn.Conv2d)] == [5, 7]
    assert layers_of(build("cnn", channels=[], hidden=[]), nn.Conv2d) == []
    assert [layer.out_features for layer in layers_of(build("mlp", hidden=[9, 8, 7]), nn.Linear)] == [9, 8, 7, 10]
    assert [len(stage) for stage in build("resnet", depth=[1, 2]).stages] == [1, 2]
    first, _transition, second = build("densenet", depth=[1, 2]).blocks
    assert [len(layers_of(block, DenseLayer)) for block in (first, second)] == [1, 2]


def layers_of(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]
