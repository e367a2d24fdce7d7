"""Each format computes what the network computes, in its runtime alone, and its files say nothing of this machine."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from espalier.compression.base import Conversion, finalize
from espalier.compression.low_rank import LowRank
from espalier.compression.prune_nm import PruneNM
from espalier.compression.ptq import PTQ
from espalier.data.loaders import Batch
from espalier.errors import ConfigError
from espalier.export import formats
from espalier.export.formats import InPrecision, draft, in_precision
from espalier.models.cnn import CNN
from espalier.models.mlp import MLP
from espalier.models.resnet import ResNet
from espalier.models.vit import ViT
from espalier.spec import DataSpec, of_shape

SHAPE = (1, 8, 8)
SPEC = DataSpec.single("noise", SHAPE, 1.0, (0.0,), (1.0,), tuple("abcdefghij"))
DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
FORMATS = tuple(formats.names())
RUN = [name for name in FORMATS if name != "safetensors"]
QUICK = [name for name in RUN if name != "aotinductor"]  # which compiles for seconds
TARGETS = {"executorch": "executorch"}  # of quantized networks; the others take those for onnxruntime
FEW_STEPS = 0.01  # of logits with a standard deviation of 0.05: runtimes round sums at other places
OUR_PLACES = (b"/work", b"/tmp", b"/home", b"site-packages", b".py", b"espalier", str(Path.cwd()).encode())


def cnn() -> nn.Module:
    return CNN(SHAPE, 10, (4, 8), (16,), 1, "relu", "batch", 0.1)


def resnet() -> nn.Module:
    return ResNet(SHAPE, 10, [1, 1], "cifar", None, 8, "relu", "batch", 0.0)


def vit() -> nn.Module:
    return ViT(SHAPE, 10, 2, 16, 1, 4, 2, "token", "gelu", "layer", 0.1)


def mlp() -> nn.Module:
    return MLP(SHAPE, 10, (32, 16), "relu", "none", 0.0)


def seen(make: Callable[[], nn.Module]) -> nn.Module:
    """In evaluation mode, with norms that have seen data."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        model(torch.randn(64, *SHAPE))
    return model.eval()


def few_ranks() -> nn.Module:
    """A network whose second dense layer is two thin ones."""
    model = LowRank.replay(seen(mlp), {"ranks": {"layers.linear2": 3}})
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)
    return model.eval()


def masked() -> nn.Module:
    """A network half of whose first kernel is zero, and deployed so."""
    model = seen(cnn)
    name = next(name for name, parameter in model.named_parameters() if parameter.ndim == 4)
    entry = {"names": [name], "dense": []}
    model = PruneNM.replay(model, entry)
    masks = dict(model.named_buffers())
    masks[f"{name}_mask"][:2] = False
    with torch.no_grad():
        model.get_parameter(name).mul_(masks[f"{name}_mask"])
    return PruneNM.finalize(model, entry).eval()


def samples(num: int) -> Batch:
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))[:num]
    return Batch.single(x, torch.arange(num) % 10, torch.arange(num))


def int8(target: str = "onnxruntime", skip: tuple[str, ...] = ()) -> nn.Module:
    """Every value and weight of a network, but for the layers to skip, as integers with fixed scales."""
    method = PTQ("static", target, 32, skip, SPEC, samples)  # type: ignore[arg-type]
    model, entry = method.apply_to(seen(resnet))
    return finalize(model, [entry])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{make.__name__: lambda make=make: seen(make) for make in (cnn, resnet, vit, mlp)},
    "masked": masked,
    "low_rank": few_ranks,
}


def require(name: str) -> formats.Format:
    """The format, or a skip that says what is missing."""
    module = formats.named(name)
    try:
        module.require("task.format")
    except ConfigError as missing:
        pytest.skip(str(missing))
    return module


def written(name: str, model: nn.Module, folder: Path) -> Path:
    """The file that a session opens."""
    module = require(name)
    path = folder / module.files[0]
    module.write(model, of_shape(SHAPE), path)
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network of integers and of float layers, and its machine code, which takes the compiler 15 s."""
    model = int8(skip=("stages.1",))
    return model, written("aotinductor", model, tmp_path_factory.mktemp("compiled"))


def assert_equal(session: Callable[[Tensor], Tensor], model: nn.Module, tolerance: float) -> None:
    with torch.no_grad():
        for batch_size in (1, 2, 7, 40):
            x = torch.randn(batch_size, *SHAPE)
            logits = session(x)
            assert (logits.dtype, logits.device.type, logits.requires_grad) == (torch.float32, "cpu", False)
            torch.testing.assert_close(logits, model(x), atol=tolerance, rtol=0)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", QUICK)
def test_the_runtime_computes_what_torch_computes_at_any_batch_size(name: str, network: str, tmp_path: Path):
    model = NETWORKS[network]()
    path = written(name, model, tmp_path)
    assert_equal(formats.named(name).session(path, 1), model, 1e-6)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(formats.named(name).files)


@pytest.mark.parametrize("name", [name for name in QUICK if name != "litert"])
def test_integers_stay_integers_and_compute_the_same_within_a_few_steps(name: str, tmp_path: Path):
    require(name)
    model = int8(TARGETS.get(name, "onnxruntime"))
    path = written(name, model, tmp_path)
    assert_equal(formats.named(name).session(path, 1), model, 1e-7 if name == "torch_export" else FEW_STEPS)
    weights = sum(tensor.numel() for tensor in model.state_dict().values() if tensor.dtype == torch.int8)
    binary = path.with_suffix(".bin") if name == "openvino" else path
    program = 0 if name in ("onnx", "openvino") else 80_000  # what is not weights: JSON, plans
    assert weights < binary.stat().st_size < 4 * weights + program


def test_openvino_runs_every_quantized_convolution_in_8_bits(tmp_path: Path):
    import_openvino = pytest.importorskip("openvino")
    path = written("openvino", int8(), tmp_path)
    graph = import_openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    found = [(node.get_rt_info()["layerType"].astype(str), node.get_rt_info()["runtimePrecision"].astype(str))
             for node in graph.get_ops()]  # fmt: skip
    precisions = [precision for layer, precision in found if layer in ("Convolution", "FullyConnected")]
    assert precisions == ["u8"] * 7


def test_machine_code_computes_what_torch_computes_at_any_batch_size(compiled):
    model, path = compiled
    kinds = {value.dtype for value in model.state_dict().values() if value.ndim == 4}
    assert kinds == {torch.int8, torch.float32}
    assert_equal(formats.named("aotinductor").session(path, 1), model, 1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_files_name_no_place_of_this_machine_and_no_code(name: str, tmp_path: Path, request):
    require(name)
    is_compiled = name == "aotinductor"
    path = request.getfixturevalue("compiled")[1] if is_compiled else written(name, seen(cnn), tmp_path)
    files = list(path.parent.iterdir())
    assert len(files) == len(formats.named(name).files)
    for file in files:
        content = file.read_bytes()
        assert [place for place in OUR_PLACES if place in content] == []


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_weights_in_8_bits_are_kept_by_the_formats_that_say_so(name: str, tmp_path: Path):
    module, model = require(name), seen(mlp)
    assert "weight_only" in module.conversions
    path = tmp_path / module.files[0]
    module.write(model, of_shape(SHAPE), path, Conversion("weight_only", 8, 32))
    assert_equal(module.session(path, 1), model, 0.02)
    weights = path if name == "onnx" else path.with_suffix(".bin")
    assert weights.stat().st_size < 2 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["torch_export", "openvino"])
def test_what_a_format_does_not_convert_stays_in_float(name: str, tmp_path: Path):
    module, model = require(name), seen(mlp)
    path = tmp_path / module.files[0]
    module.write(model, of_shape(SHAPE), path, Conversion("dynamic", 8))
    assert "dynamic" not in module.conversions
    assert_equal(module.session(path, 1), model, 1e-6)


@pytest.mark.parametrize("name", QUICK)
def test_a_network_that_decides_by_values_is_refused_in_one_line_and_the_old_file_stays(name: str, tmp_path: Path):
    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    module = require(name)
    path = tmp_path / module.files[0]
    path.write_text("old")
    with pytest.raises(ConfigError, match=r"^(task\.format=|export: ).*\)") as refused:
        module.write(Undecided().eval(), of_shape(SHAPE), path)
    assert "\n" not in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


def test_a_killed_write_leaves_the_old_file_whole(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_text("old")
    child = os.fork()
    if child == 0:
        with draft(path) as target:
            target.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_text() == "old"
    with draft(path) as target:
        target.write_text("new")
    assert path.read_text() == "new"


def test_exporting_is_silent_and_leaves_the_network_alone(tmp_path: Path, capfd):
    model = seen(cnn)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("torch_export", "openvino", "safetensors"):
        written(name, model, tmp_path / name)
    assert capfd.readouterr() == ("", "")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "package", "remedy"),
    [
        ("executorch", "executorch", "pip install 'espalier[executorch]'"),
        ("openvino", "openvino", "pip install 'espalier[openvino]'"),
        ("litert", "litert_torch", "pip install litert-torch==0.10.0, then pip install 'typing-extensions>=4.16'"),
    ],
)
def test_a_missing_package_is_one_line_that_says_how_to_get_it(name: str, package: str, remedy: str, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=re.escape(remedy)) as missing:
        formats.named(name).require("task.format")
    assert str(missing.value).startswith(f"task.format: needs {package}, which is not installed; ")


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"^task\.format: aotinductor needs the C\+\+ compiler \S+, which is not"):
        formats.named("aotinductor").require("task.format")


def test_16_bits_lie_between_float32_samples_and_float32_logits(tmp_path: Path):
    model = seen(vit)
    half = in_precision(model, "bf16")
    path = written("torch_export", half, tmp_path)
    assert_equal(formats.named("torch_export").session(path, 1), half, 0)
    x = torch.randn(4, *SHAPE)
    with torch.no_grad():
        assert 0 < (half(x) - model(x)).abs().max() < 0.05
    assert path.stat().st_size < written("torch_export", model, tmp_path / "full").stat().st_size
    assert next(model.parameters()).dtype == torch.float32, "the network itself keeps its precision"
    assert in_precision(model, "fp32") is model


@pytest.mark.parametrize("name", ["onnx", "openvino", "litert"])
def test_a_format_without_kernels_for_16_bits_names_those_that_have_them(name: str, tmp_path: Path):
    line = (
        rf"^task\.precision=bf16: {name} does not run .* these do: torch_export, aotinductor, executorch, safetensors$"
    )
    with pytest.raises(ConfigError, match=line):
        formats.named(name).write(InPrecision(seen(cnn), torch.bfloat16), of_shape(SHAPE), tmp_path / "model")


def test_integers_are_not_cast_to_16_bits():
    with pytest.raises(ConfigError, match=r"^task\.precision=bf16: the network is quantized to 8 bits already"):
        in_precision(int8(), "bf16")


def test_weights_come_back_by_name_to_the_last_bit(tmp_path: Path):
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.randn(4, 6).T))  # not contiguous
    model.tied = nn.Linear(4, 6, bias=False)
    model.tied.weight = model.weight
    model.register_buffer("mask", torch.rand(3) > 0.5)
    model.register_buffer("codes", torch.randint(-127, 128, (5,), dtype=torch.int8))
    model.register_buffer("scale", torch.tensor(0.1))
    loaded = load_file(written("safetensors", model, tmp_path))
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert all(loaded[name].dtype == value.dtype for name, value in model.state_dict().items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "input_shape": json.dumps(SHAPE)}


def test_16_bits_keep_the_names_of_the_network(tmp_path: Path):
    model = seen(cnn)
    loaded = load_file(written("safetensors", in_precision(model, "bf16"), tmp_path))
    assert loaded.keys() == model.state_dict().keys()
    assert torch.equal(loaded["head.weight"], model.head.weight.detach().bfloat16())


def test_a_session_leaves_the_threads_of_the_process_as_they_were(tmp_path: Path):
    path = written("torch_export", seen(mlp), tmp_path)
    session = formats.named("torch_export").session(path, 2)
    session(torch.zeros(1, *SHAPE))
    assert torch.get_num_threads() == 1


def scripts() -> dict[str, str]:
    """By format, what docs/formats.md shows for a process without this package."""
    found = re.findall(r"^```python\n# (\w+): [^\n]*\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


def test_every_format_has_a_script():
    assert tuple(scripts()) == FORMATS
    assert all(script.strip().count("\n") <= 12 for script in scripts().values())


@pytest.mark.parametrize("name", RUN)
def test_the_runtime_alone_reads_the_file(name: str, tmp_path: Path, request):
    require(name)
    if name == "aotinductor":
        model, path = request.getfixturevalue("compiled")
    else:
        model = int8() if name == "torch_export" else NETWORKS["cnn"]()
        path = written(name, model, tmp_path)
    x = torch.randn(3, *SHAPE)
    answers = run_alone(scripts()[name], path, x, tmp_path)
    with torch.no_grad():
        np.testing.assert_allclose(answers, model(x).numpy(), atol=1e-6)


def test_the_weights_alone_are_read(tmp_path: Path):
    model = seen(cnn)
    answers = run_alone(scripts()["safetensors"], written("safetensors", model, tmp_path), torch.zeros(0), tmp_path)
    assert dict(answers) == {name: str(list(value.shape)) for name, value in model.state_dict().items()}


def run_alone(script: str, path: Path, x: Tensor, folder: Path) -> np.ndarray:
    """What a script of the page saves, run by a process that imports nothing of ours."""
    np.save(folder / "samples.npy", x.numpy())
    script += "\nassert not {'espalier', 'lightning', 'hydra', 'wandb'} & set(sys.modules)\n"
    words = [sys.executable, "-c", script, path, folder / "samples.npy", folder / "answers.npy"]
    ended = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 0, ended.stderr
    answers: np.ndarray = np.load(folder / "answers.npy")
    return answers
