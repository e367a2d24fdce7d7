import copy
import io
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from espalier.compression import qat
from espalier.compression.graph_module import CapturedNet, capture
from espalier.compression.ptq import PTQ, linear_share
from espalier.compression.qat import QAT, RoundedLinear, round_inputs, round_weight
from espalier.compression.quantized_graph import prepare
from espalier.compression.quantizer import OnnxRuntimeQuantizer, make_quantizer
from espalier.data.loaders import Batch
from espalier.errors import ConfigError
from espalier.export import session
from espalier.export.onnx import unshare
from espalier.models.cnn import CNN
from espalier.models.densenet import DenseNet
from espalier.models.mlp import MLP
from espalier.models.resnet import ResNet
from espalier.models.vit import ViT
from espalier.signature import dynamic
from espalier.spec import DataSpec, of_shape

SHAPE = (3, 16, 16)
NUM_SAMPLES = 32


def spec(shape: tuple[int, ...] = SHAPE) -> DataSpec:
    return DataSpec.single("noise", shape, 1.0, (0.0,) * shape[0], (1.0,) * shape[0], tuple("abcdefghij"))


def samples(shape: tuple[int, ...] = SHAPE) -> Batch:
    x = torch.randn(NUM_SAMPLES, *shape, generator=torch.Generator().manual_seed(1))
    return Batch.single(x, torch.arange(NUM_SAMPLES) % 10, torch.arange(NUM_SAMPLES))


def resnet(activation: str = "relu", norm: str = "batch", stem: str = "cifar", block: str = "basic") -> nn.Module:
    torch.manual_seed(0)
    return ResNet(SHAPE, 10, [1, 1], stem, block, 8, activation, norm, 0.1)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViT(SHAPE, 10, 4, 32, 1, 4, 2, "mean", "gelu", "layer", 0.0)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP(SHAPE, 10, [32, 16], "relu", "batch", 0.0)


class Depthwise(nn.Module):
    """A separable convolution with a gate, as in mobile networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.Sigmoid())
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(F.relu6(self.norm(self.depthwise(F.relu(self.stem(x))))))
        return self.head((x * self.gate(x)).mean((2, 3)))


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 16, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 14, 10),
    )  # fmt: skip


CONVOLUTIONAL: dict[str, Callable[[], nn.Module]] = {
    "relu": resnet,
    "silu": lambda: resnet(activation="silu"),
    "gelu": lambda: resnet(activation="gelu"),
    "bottleneck": lambda: resnet(block="bottleneck"),
    "imagenet stem": lambda: resnet(stem="imagenet"),
    "group norm": lambda: resnet(norm="group"),
    "cnn": lambda: CNN(SHAPE, 10, [8, 16], [32], 2, "relu", "none", 0.1),
    "densenet": lambda: DenseNet(SHAPE, 10, [2, 2], "cifar", 8, 0.5, "relu", "batch", 0.0),
    "depthwise": Depthwise,
    "conv1d": conv1d,
}


SHAPES: dict[str, tuple[int, ...]] = {"conv1d": (2, 32)}


def randomised(model: nn.Module, eps: float = 1e-5, momentum: float = 0.1) -> nn.Module:
    """Batch norms that do something, and that are not torch's default."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eps, module.momentum = eps, momentum
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def train_step(model: nn.Module, batch: Batch) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    F.cross_entropy(model(batch.x), batch.y).backward()
    optimizer.step()


def make_qat(shape: tuple[int, ...] = SHAPE, skip: tuple[str, ...] = (), **options: Any) -> QAT:
    return QAT(
        **{"target": "onnxruntime", "observe": 0.5, "statistics": 0.75, "skip": skip, **options}, spec=spec(shape)
    )


def make_ptq(shape: tuple[int, ...] = SHAPE, skip: tuple[str, ...] = (), mode: str = "auto") -> PTQ:
    return PTQ(mode, "onnxruntime", NUM_SAMPLES, skip, spec(shape), lambda num: next(samples(shape).split(num)))


def deploy(model: nn.Module, shape: tuple[int, ...], folder: Path) -> tuple[Counter[str], Callable[[Tensor], Tensor]]:
    """The operators that ONNX Runtime really runs, and their output."""
    path, optimised = folder / "model.onnx", folder / "optimised.onnx"
    logging.disable(logging.WARNING)
    torch.onnx.export(
        model, (torch.zeros(2, *shape),), path, dynamo=True, opset_version=18, external_data=False,
        input_names=["input"], output_names=["logits"],
        dynamic_shapes=dynamic(model, of_shape(shape), 4096), verbose=False,
    )  # fmt: skip
    logging.disable(logging.NOTSET)
    proto = onnx.load(path)
    unshare(proto.graph)
    onnx.save(proto, path)
    options = session.options(threads=1)
    options.optimized_model_filepath = str(optimised)
    running = session.opened(path, options)
    operators = Counter(node.op_type for node in onnx.load(optimised).graph.node)
    return operators, lambda x: torch.from_numpy(np.asarray(running.run(None, {"input": x.numpy()})[0]))


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def equal_states(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Captured networks


def test_a_captured_network_computes_what_the_network_computes_in_both_modes_and_keeps_its_names():
    model = randomised(resnet(), eps=1e-3, momentum=0.03)
    net = capture(copy.deepcopy(model), of_shape(SHAPE))
    x = samples().x
    assert [*net.state_dict()] == [*model.state_dict()]
    for trains in (True, False, True):
        for network in (model.train(trains), net.train(trains)):
            torch.manual_seed(2)  # dropout
            network.output = network(x).detach()
        torch.testing.assert_close(net.output, model.output)
    assert equal_states(net.state_dict(), model.state_dict())


def test_assigning_the_attribute_alone_switches_the_mode():
    net = capture(resnet(), of_shape(SHAPE))
    x = samples().x
    net.eval()
    expected = net(x)
    net.training = True
    assert not torch.equal(net(x), expected)
    net = capture(resnet(), of_shape(SHAPE))
    net.training = False
    assert torch.equal(net(x), expected)


def test_evaluation_leaves_the_state_alone_and_does_not_depend_on_the_batch():
    net, _ = make_qat().apply(resnet())
    x = samples().x
    net.train()
    net(x)
    net.eval()
    before, alone = state_of(net), net(x[:1])
    assert torch.equal(net(x)[:1], alone) or torch.allclose(net(x)[:1], alone, atol=1e-6)
    assert equal_states(state_of(net), before)


@pytest.mark.parametrize("statistics_are_frozen", [False, True])
def test_folding_keeps_eps_momentum_and_gamma_zero(statistics_are_frozen: bool):
    model = randomised(resnet(), eps=1e-2, momentum=0.03)
    nn.init.zeros_(model.stem.conv.norm.weight[:2])
    net = prepare(
        capture(copy.deepcopy(model), of_shape(SHAPE)),
        OnnxRuntimeQuantizer([name for name, _ in model.named_children()]),
    )
    net.frozen_statistics = statistics_are_frozen
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(not statistics_are_frozen)
    x = samples().x
    for network in (model, net):
        torch.manual_seed(2)
        logits = network(x)
        F.cross_entropy(logits, samples().y).backward()
        network.output = logits.detach()
    torch.testing.assert_close(net.output, model.output)
    torch.testing.assert_close(net.get_buffer("stem.conv.norm.running_var"), model.stem.conv.norm.running_var)
    torch.testing.assert_close(
        net.get_parameter("stem.conv.conv.weight").grad[2:], model.stem.conv.conv.weight.grad[2:]
    )
    model.eval()
    folded = QAT.finalize(net, {})
    assert not any("norm" in str(node.target) for node in folded.graph.nodes)
    torch.testing.assert_close(folded(x), model(x))


def test_masks_and_adapters_survive_and_copies_are_independent():
    model = resnet()
    model.stem.conv.conv.register_buffer("weight_mask", torch.ones_like(model.stem.conv.conv.weight, dtype=torch.bool))
    model.adapters = nn.ModuleDict({"stem": nn.Conv2d(8, 4, 1)})
    net, _ = make_qat().apply(model)
    assert {"stem.conv.conv.weight_mask", "adapters.stem.weight"} <= net.state_dict().keys()
    train_step(net, samples())
    twin = copy.deepcopy(net)
    before = state_of(net)
    twin.frozen_observers = True
    train_step(twin, samples())
    assert equal_states(state_of(net), before)
    assert not equal_states(state_of(twin), before)
    assert twin.adapters["stem"](torch.zeros(1, 8, 2, 2)).shape == (1, 4, 2, 2)


def test_watched_outputs_are_those_of_the_modules_also_of_a_copy_after_rounding():
    model = resnet().eval()
    net = capture(copy.deepcopy(model), of_shape(SHAPE))
    seen: dict[str, Tensor] = {}
    for name in ("stem.conv.conv", "stages.0"):
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    x = samples().x
    logits = model(x)
    net.watch(["stem.conv.conv", "stages.0"])
    assert torch.equal(net(x), logits)
    torch.testing.assert_close(net.watched, seen)
    net = copy.deepcopy(prepare(net, OnnxRuntimeQuantizer([])))
    net.train()
    net(x)
    net.eval()
    net(x)
    assert [*net.watched] == [*seen]
    assert (net.watched["stages.0"] - seen["stages.0"]).norm() < 0.3 * seen["stages.0"].norm()
    assert QAT.finalize(net, {})(x).shape == logits.shape


def test_a_watched_name_that_is_none_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"stages\.3: no module .* did you mean stages\.\d\?"):
        capture(resnet(), of_shape(SHAPE)).watch(["stages.3"])


def test_a_network_that_branches_on_values_is_refused_in_one_line():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else self.conv(-x)

    with pytest.raises(ConfigError, match=r"Branching: torch\.export cannot capture it") as caught:
        make_qat().apply(Branching())
    assert len(str(caught.value).splitlines()) == 1


# Rounding


def test_inputs_are_rounded_sample_by_sample_to_256_values_with_zero_among_them():
    x = torch.tensor([[0.0, 1.0, 2.55], [-1.0, 0.004, 1.55], [5.1, 2.01, 1.0]])
    expected = torch.tensor([[0.0, 1.0, 2.55], [-1.0, 0.0, 1.55], [5.1, 2.0, 1.0]])
    torch.testing.assert_close(round_inputs(x), expected)


def test_weights_are_rounded_row_by_row_to_127_steps_of_their_largest():
    weight = torch.tensor([[1.27, -0.014, 0.016], [0.0, 0.0, 0.0], [-12.7, 6.04, 6.06]])
    expected = torch.tensor([[1.27, -0.01, 0.02], [0.0, 0.0, 0.0], [-12.7, 6.0, 6.1]])
    torch.testing.assert_close(round_weight(weight), expected)


def test_a_rounded_convolution_is_the_one_computed_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1))
    x = torch.rand(16, 1, 4, 4)

    def rounded(values: Tensor, step: Tensor) -> Tensor:
        return (values / step).round() * step

    def steps(weight: Tensor) -> Tensor:
        return weight.abs().amax((1, 2, 3), keepdim=True) / 127

    hidden = F.relu(F.conv2d(rounded(x, x.max() / 255), rounded(model[0].weight, steps(model[0].weight))))
    hidden = rounded(hidden, hidden.max() / 255)
    expected = F.conv2d(hidden, rounded(model[2].weight, steps(model[2].weight)), model[2].bias)
    net = prepare(capture(copy.deepcopy(model), of_shape((1, 4, 4))), OnnxRuntimeQuantizer([])).train()
    assert (net(x) - expected).abs().median() < 1e-6  # a value between two steps may go either way
    assert (model(x) - expected).abs().max() > 1e-3


# From training to the runtime


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_replayed_network_is_equal_to_the_last_bit_and_its_integers_compute_the_same(name: str):
    original = CONVOLUTIONAL[name]()
    shape = SHAPES.get(name, SHAPE)
    net, entry = make_qat(shape).apply(copy.deepcopy(original))
    train_step(net, samples(shape))
    x = samples(shape).x
    rounded = net.eval()(x).detach()
    weights, entry = through_a_file([net.state_dict(), entry])
    replayed = QAT.replay(original, entry)
    assert shapes_of(replayed) == {name: value.shape for name, value in weights.items()}
    replayed.load_state_dict(weights)
    assert torch.equal(replayed.eval()(x), rounded)
    torch.testing.assert_close(QAT.finalize(replayed, entry)(x), rounded, atol=0.02 * rounded.abs().max(), rtol=0)


@pytest.mark.parametrize("name", ["silu", "densenet", "depthwise", "conv1d"])
def test_every_convolution_runs_in_integers(tmp_path: Path, name: str):
    model, shape = CONVOLUTIONAL[name](), SHAPES.get(name, SHAPE)
    num_convolutions = sum(isinstance(module, nn.Conv1d | nn.Conv2d) for module in model.modules())
    net, entry = make_qat(shape).apply(model)
    train_step(net, samples(shape))
    x = samples(shape).x
    rounded = net.eval()(x).detach()
    operators, run = deploy(QAT.finalize(net, entry), shape, tmp_path)
    assert operators["QLinearConv"] == num_convolutions
    assert operators["Conv"] == operators["FusedConv"] == operators["Gemm"] == 0
    for part in (slice(None), slice(1)):
        torch.testing.assert_close(run(x[part]), rounded[part], atol=0.04 * rounded.abs().max(), rtol=0)


def test_sums_pools_and_the_head_run_in_integers_and_a_skipped_module_in_float_without_its_norm(tmp_path: Path):
    net, entry = make_qat(skip=("stem",)).apply(resnet())
    train_step(net, samples())
    operators, _ = deploy(QAT.finalize(net.eval(), entry), SHAPE, tmp_path)
    assert operators["QLinearConv"] == 5
    assert operators["FusedConv"] + operators["Conv"] == 1
    assert operators["QLinearAdd"] == 2
    assert operators["QLinearAveragePool"] == operators["QGemm"] == operators["QuantizeLinear"] == 1
    assert operators["BatchNormalization"] == operators["DequantizeLinear"] == 0  # QGemm gives float logits


def test_other_runtimes_have_quantizers_of_their_own():
    net, entry = make_qat(target="inductor", skip=("stem.conv.conv",)).apply(resnet())
    train_step(net, samples())
    net.eval()
    assert torch.allclose(QAT.finalize(net, entry)(samples().x), net(samples().x), atol=0.05)
    if "executorch" not in sys.modules:
        with pytest.raises(ConfigError, match="executorch is not installed"):
            make_quantizer("executorch", [])


@pytest.mark.parametrize("make", [mlp, vit])
def test_where_only_linear_layers_count_the_modules_stay_and_the_runtime_quantizes(make: Callable[[], nn.Module]):
    model = make()
    names, layers = [*model.state_dict()], [module for module in model.modules() if isinstance(module, nn.Linear)]
    net, entry = make_qat(skip=("head",)).apply(model)
    assert entry["mode"] == "dynamic"
    assert [*net.state_dict()] == names
    assert [type(layer) for layer in layers] == [RoundedLinear] * (len(layers) - 1) + [nn.Linear]
    train_step(net, samples())
    rounded = net.eval()(samples().x)
    plain = QAT.finalize(net, entry)
    assert {type(layer) for layer in layers} == {nn.Linear}
    assert 0 < (plain(samples().x) - rounded).norm() < 0.05 * rounded.norm()
    assert QAT.conversion(entry) == qat.Conversion("dynamic", bits=8, skip=("head",))


# Without training


def test_calibrated_networks_stay_close_to_the_float_one_and_calibration_draws_nothing():
    model = randomised(resnet(activation="silu")).eval()
    x = samples().x
    expected, random = model(x), torch.get_rng_state()
    first, entry = make_ptq().apply(copy.deepcopy(model))
    second, _ = make_ptq().apply(copy.deepcopy(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert equal_states(first.state_dict(), second.state_dict())
    before = state_of(first)
    assert (first(x) - expected).norm() < 0.05 * expected.norm()
    assert equal_states(state_of(first), before)
    torch.testing.assert_close(QAT.finalize(first, entry)(x), first(x), atol=0.02, rtol=0)


def test_a_transformer_may_have_fixed_ranges_where_asked_for():
    model = vit().eval()
    expected = model(samples().x)
    assert make_ptq().apply(copy.deepcopy(model))[1]["mode"] == "dynamic"
    net, entry = make_ptq(mode="static").apply(model)
    assert QAT.conversion(entry) is None
    assert (QAT.finalize(net, entry)(samples().x) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("method", [make_qat, make_ptq])
def test_wrong_skips_are_refused_in_one_line(method: Callable[..., QAT | PTQ]):
    name = method.__name__.removeprefix("make_")
    with pytest.raises(ConfigError, match=rf"compression\.{name}\.skip=haed: no module .*; did you mean head\?"):
        method(skip=("haed",)).require(resnet())
    with pytest.raises(ConfigError, match=rf"compression\.{name}\.skip=.*no linear layer or convolution is left"):
        method(skip=("layers", "head")).require(mlp())


def test_dynamic_ranges_are_refused_where_most_parameters_are_those_of_convolutions():
    cnn = CNN(SHAPE, 10, [8, 16], [32], 2, "relu", "none", 0.1)
    convolutions, dense, head = 3 * 8 * 9 + 8 + 8 * 16 * 9 + 16, 64 * 32 + 32, 32 * 10 + 10
    assert linear_share(cnn, ()) == pytest.approx((dense + head) / (convolutions + dense + head))
    assert linear_share(cnn, ("layers",)) == pytest.approx(head / (convolutions + head))
    for model in (cnn, vit(), mlp()):
        make_ptq(mode="dynamic").require(model)
    make_ptq(mode="static").require(resnet())
    with pytest.raises(ConfigError, match=r"ptq\.mode=dynamic: .* hold 3\.3% .* less than 50%; use mode=static"):
        make_ptq(mode="dynamic").require(resnet())


# Inside a fit


class Fitted(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model: nn.Module = ResNet((1, 8, 8), 10, 8, "cifar", None, 8, "relu", "batch", 0.0)
        self.frozen: list[tuple[bool, bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        net = self.model
        assert isinstance(net, CapturedNet)
        self.frozen.append((net.frozen_observers, net.frozen_statistics))
        return F.cross_entropy(net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def fit(folder: Path, num_epochs: int, resumed: Path | None = None) -> tuple[Fitted, L.Trainer]:
    """Four steps an epoch, then a validation."""
    learner, method = Fitted(), make_qat((1, 8, 8))
    method.history = []
    if resumed:  # as `run` does: what the checkpoint's history says, before Lightning loads the weights
        learner.model = QAT.replay(learner.model, qat.make_entry("static", "onnxruntime", [], spec((1, 8, 8))))
        method.is_applied = True
    batches = [(part.x, part.y) for part in samples((1, 8, 8)).split(8)]
    trainer = L.Trainer(
        max_epochs=num_epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[method], default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    method.on_train_start = lambda *_: vars(method).update(observed_steps=8, counted_steps=12)  # of 16, also if broken
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(learner, loader, loader, ckpt_path=resumed)
    return learner, trainer


def test_a_resumed_run_ends_with_the_same_bits_although_the_checkpoint_was_written_in_evaluation(tmp_path: Path):
    unbroken, _ = fit(tmp_path, num_epochs=4)
    broken, trainer = fit(tmp_path, num_epochs=1)
    broken.eval()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = fit(tmp_path, num_epochs=4, resumed=tmp_path / "last.ckpt")
    assert resumed.frozen == unbroken.frozen[4:]
    assert unbroken.frozen == [(step >= 8, step >= 12) for step in range(16)]
    assert equal_states(resumed.state_dict(), unbroken.state_dict())


def test_ranges_and_statistics_stop_at_their_shares_of_the_run():
    method, net = make_qat(), prepare(capture(resnet(), of_shape(SHAPE)), OnnxRuntimeQuantizer([]))
    learner = L.LightningModule()
    learner.model = net

    class Trainer:
        estimated_stepping_batches = 8
        global_step = 0

    trainer: Any = Trainer()
    method.on_train_start(trainer, learner)
    changes = []
    for step in range(8):
        trainer.global_step = step
        method.on_train_batch_start(trainer, learner, None, 0)
        before = state_of(net)
        net.train()
        net(samples().x * (1 + step))
        changed = {name.rpartition(".")[2] for name, value in net.state_dict().items() if not value.equal(before[name])}
        changes.append((bool(changed & {"scale", "max_val"}), bool(changed & {"running_mean", "num_batches_tracked"})))
    assert changes == [(step < 4, step < 6) for step in range(8)]


def distributed(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net, _ = make_qat().apply(resnet())
    wrapped = DistributedDataParallel(net)
    for step in range(4):
        net.frozen_observers = net.frozen_statistics = step >= 2
        batch = samples()
        train_step(wrapped, Batch.single(batch.x[rank::2] * (1 + rank), batch.y[rank::2], batch.index[rank::2]))
    torch.save(net.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_same_weights_and_scales(tmp_path: Path):
    torch.multiprocessing.start_processes(distributed, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert any(name.endswith("scale") for name in first)
    assert equal_states(first, second)
