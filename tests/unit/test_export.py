"""ONNX files compute what the network computes, hold nothing else, and run on the kernels they were made for."""

import logging
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401, registers the operators of a converted network

from espalier.compression.base import Conversion
from espalier.errors import ConfigError
from espalier.export.onnx import Session, unshare, write
from espalier.export.onnx_operators import is_integer, operators, unfused
from espalier.models.cnn import CNN
from espalier.models.densenet import DenseNet
from espalier.models.mlp import MLP
from espalier.models.resnet import ResNet
from espalier.models.vit import ViT
from espalier.profiling.cost import count_params
from espalier.spec import of_shape

SHAPE = (1, 8, 8)
STEP = 0.05  # of quantized activations
Q = torch.ops.quantized_decomposed
MODELS = {
    "cnn": lambda: CNN(SHAPE, 10, (8, 16), (32,), 1, "relu", "batch", 0.1),
    "resnet": lambda: ResNet(SHAPE, 10, 8, "cifar", None, 8, "relu", "batch", 0.0),
    "densenet": lambda: DenseNet(SHAPE, 10, [2, 2], "cifar", 8, 0.5, "relu", "batch", 0.0),
    "vit": lambda: ViT(SHAPE, 10, 2, 32, 2, 4, 2, "token", "gelu", "layer", 0.1),
    "mlp": lambda: MLP(SHAPE, 10, (64, 64), "relu", "none", 0.0),
}


class QuantizedConv(nn.Module):
    """A convolution as a quantizer leaves it; no runtime can fuse it where its output is not `rounded`."""

    def __init__(self, rounds_output: bool) -> None:
        super().__init__()
        self.rounds_output = rounds_output
        self.register_buffer("weight", torch.randint(-127, 128, (16, 1, 3, 3), dtype=torch.int8))
        self.register_buffer("scale", torch.full((16,), 0.002))
        self.register_buffer("zero", torch.zeros(16, dtype=torch.int64))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight = Q.dequantize_per_channel(self.weight, self.scale, self.zero, 0, -127, 127, torch.int8)
        x_BCHW = F.relu(F.conv2d(rounded(x_BCHW, zero=128), weight, padding=1))
        return rounded(x_BCHW) if self.rounds_output else x_BCHW.sqrt()


class QuantizedNet(nn.Module):
    def __init__(self, rounds_output: bool) -> None:
        super().__init__()
        self.conv = QuantizedConv(rounds_output)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return rounded(self.conv(x_BCHW).mean((2, 3), keepdim=True)).flatten(1)


def rounded(x: Tensor, zero: int = 0) -> Tensor:
    grid = (STEP, zero, 0, 255, torch.uint8)
    return Q.dequantize_per_tensor(Q.quantize_per_tensor(x, *grid), *grid)


def network(name: str) -> nn.Module:
    """In evaluation mode, with norms that have seen data."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        model(torch.randn(64, *SHAPE))
    return model.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The float file of each network."""
    folder = tmp_path_factory.mktemp("float")
    for name in MODELS:
        write(network(name), of_shape(SHAPE), folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in MODELS}


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """An MLP that knows the handwritten digits, and these."""
    torch.manual_seed(0)
    images, y = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, *SHAPE) / 16 - 0.3, torch.tensor(y)
    model = MLP(SHAPE, 10, (64, 64), "relu", "none", 0.0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).float().mean())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_onnx_runtime_computes_what_torch_computes_at_any_batch_size(name: str, files):
    model = network(name)
    session = Session(files[name], threads=1)
    for batch_size in (1, 5):
        x = torch.randn(batch_size, *SHAPE)
        torch.testing.assert_close(session(x), model(x), atol=1e-5, rtol=1e-5)
    onnx.checker.check_model(onnx.load(files[name]), full_check=True)


def test_a_file_is_its_weights_and_hardly_anything_else(files):
    assert abs(files["mlp"].stat().st_size - 4 * count_params(network("mlp"))) < 600
    proto = onnx.load(files["resnet"])
    graph = proto.graph
    parts = [proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]
    assert len(parts) > 10
    assert not any(part.metadata_props or part.doc_string for part in parts)
    assert not graph.value_info
    assert not any(b"espalier" in path.read_bytes() for path in files.values())


def test_equal_constants_are_stored_once(tmp_path: Path):
    model = network("mlp")
    model.layers.linear2.weight = model.layers.linear1.weight  # one matrix, used twice
    write(model, of_shape(SHAPE), tmp_path / "model.onnx")
    initializers = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert Counter(tuple(constant.dims) for constant in initializers)[64, 64] == 1


def test_layers_are_named_after_their_modules(files):
    names = [node.name for node in onnx.load(files["vit"]).graph.node if node.name]
    assert {"patches", "head", "layers.0.branch.attention.qkv"} <= set(names)
    assert len(names) == len(set(names))


def test_exporting_is_silent_and_leaves_the_model_and_the_loggers_alone(tmp_path: Path, capfd):
    model = network("vit")
    model.layers[0].requires_grad_(False)
    before = [(module.training, *module.state_dict().values()) for module in model.modules()]
    handlers = list(logging.root.handlers)
    capfd.readouterr()
    write(model, of_shape(SHAPE), tmp_path / "model.onnx", Conversion("dynamic", 8))
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # no draft
    assert logging.root.handlers == handlers
    assert logging.root.manager.disable == logging.NOTSET
    for module, (training, *tensors) in zip(model.modules(), before, strict=True):
        assert module.training == training
        assert all(map(torch.equal, module.state_dict().values(), tensors))


def test_a_network_that_decides_by_values_is_refused_in_one_line_and_the_old_file_stays(tmp_path: Path):
    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(ConfigError, match=r"^export: torch cannot turn this network into ONNX \(.*\); .*$"):
        write(Undecided().eval(), of_shape(SHAPE), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


@torch.no_grad()
def test_a_quantized_graph_runs_on_integers_from_convolution_to_mean(tmp_path: Path):
    model = QuantizedNet(rounds_output=True).eval()
    write(model, of_shape(SHAPE), tmp_path / "model.onnx")
    counts = operators(tmp_path / "model.onnx")
    assert {name for name in counts if is_integer(name)} == {"QLinearConv", "QLinearGlobalAveragePool"}
    assert unfused(tmp_path / "model.onnx") == []
    x = torch.randn(5, *SHAPE)
    torch.testing.assert_close(Session(tmp_path / "model.onnx", threads=1)(x), model(x), atol=1.02 * STEP, rtol=0)


def test_a_quantized_layer_that_runs_in_float_is_named(tmp_path: Path):
    write(QuantizedNet(rounds_output=False).eval(), of_shape(SHAPE), tmp_path / "model.onnx")
    assert unfused(tmp_path / "model.onnx") == ["conv (Conv)"]


def test_a_float_graph_has_nothing_to_fuse(files):
    assert unfused(files["resnet"]) == []
    counts = operators(files["resnet"])
    assert counts["Conv"] == 9
    assert "GlobalAveragePool" in counts
    assert not any(map(is_integer, counts))


def test_dynamic_quantization_keeps_accuracy_on_integer_kernels(tmp_path: Path, trained):
    model, x, y = trained
    write(model, of_shape(SHAPE), tmp_path / "int8.onnx", Conversion("dynamic", 8))
    before = accuracy(model(x), y)
    after = accuracy(Session(tmp_path / "int8.onnx", threads=1)(x), y)
    assert before > 0.95
    assert after > before - 0.005
    assert operators(tmp_path / "int8.onnx")["DynamicQuantizeMatMul"] == 3
    written = Counter(node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node)
    assert written["MatMulInteger"] == written["DynamicQuantizeLinear"] == 3
    assert (tmp_path / "int8.onnx").stat().st_size < 1.25 * count_params(model)  # bytes; in float 4 a parameter


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
def test_a_skipped_module_and_what_lies_in_it_stay_float(kind, tmp_path: Path):
    model = nn.Sequential()  # three linear layers
    model.add_module("first", nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)))
    model.add_module("firs", nn.Linear(32, 10))
    write(model.eval(), of_shape(SHAPE), tmp_path / "model.onnx", Conversion(kind, 8, 32, ("firs", "first.1")))
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert counts["MatMulInteger"] + counts["MatMulNBits"] == 1
    assert counts["MatMul"] + counts["Gemm"] == 2


def test_no_two_operators_share_an_int8_constant_which_stays_what_it_was():
    zero = onnx.numpy_helper.from_array(torch.zeros((), dtype=torch.int8).numpy(), "zero")
    scale = onnx.numpy_helper.from_array(torch.tensor(0.5).numpy(), "scale")
    nodes = [onnx.helper.make_node("DequantizeLinear", [name, "scale", "zero"], [f"{name}_out"]) for name in "abc"]
    graph = onnx.helper.make_graph(nodes, "graph", [], [], [zero, scale])
    unshare(graph)
    values = {constant.name: onnx.numpy_helper.to_array(constant).tolist() for constant in graph.initializer}
    assert [values[node.input[2]] for node in graph.node] == [0, 0, 0]
    assert len({node.input[2] for node in graph.node}) == 3
    assert {node.input[1] for node in graph.node} == {"scale"}  # float constants are shared as before
