"""Choose where a captured network is quantized: uint8 activations with a scale and a zero point, int8 weights.

ONNX Runtime runs an operator in integers only if every input and its output are quantized, with unsigned activations
on x86; torchao's own quantizers leave outputs or residual sums in float, and a network quantized so is slower than the
float one. Weights have one scale per output channel and no zero point, in [-127, 127] (Jacob et al. 2017, arXiv
1712.05877; Krishnamoorthi 2018, arXiv 1806.08342). Prepared networks simulate all of it in float; `convert` makes the
integers.
"""

import logging
from collections.abc import Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor, fx

from espalier.compression.graph_module import (
    ATEN,
    BATCH_NORM,
    CONVOLUTIONS,
    module_names,
    readers,
)
from espalier.errors import require

logging.disable(logging.WARNING)  # torchao warns of each CUDA kernel that a CPU build lacks
try:
    from torchao.quantization.pt2e import (
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.fake_quantize import FakeQuantize
    from torchao.quantization.pt2e.quantizer import (
        DerivedQuantizationSpec,
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
        SharedQuantizationSpec,
    )
finally:
    logging.disable(logging.NOTSET)

Target = Literal["onnxruntime", "executorch", "inductor"]

LAYERS = CONVOLUTIONS | {ATEN.linear.default}  # transposed convolutions stay float: the runtime has no integer kernel
CLIPS = {ATEN.relu.default, ATEN.relu_.default, ATEN.hardtanh.default, ATEN.hardtanh_.default, ATEN.relu6.default}
PAIRS = {ATEN.add.Tensor, ATEN.add_.Tensor, ATEN.mul.Tensor, ATEN.mul_.Tensor}
POOLS = {
    ATEN.sigmoid.default,
    ATEN.avg_pool1d.default,
    ATEN.avg_pool2d.default,
    ATEN.adaptive_avg_pool1d.default,
    ATEN.adaptive_avg_pool2d.default,
    ATEN.mean.dim,
}
MOVES = {  # values that only change their place keep their scale
    ATEN.max_pool1d.default,
    ATEN.max_pool2d.default,
    ATEN.flatten.using_ints,
    ATEN.reshape.default,
    ATEN.view.default,
    ATEN.permute.default,
    ATEN.transpose.int,
    ATEN.slice.Tensor,
    ATEN.select.int,
    ATEN.squeeze.dim,
    ATEN.unsqueeze.default,
}
DROPOUTS = {ATEN.dropout.default, ATEN.dropout_.default, ATEN.feature_dropout.default}
MIN_SCALE = 2**-14  # of values that are all zero; as torch sets it in training
ANNOTATION = "quantization_annotation"  # where torchao looks


class Grid(FusedMovingAvgObsFakeQuantize):
    """Rounds to a grid whose ends follow the values seen; `convert` uses the same grid as training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())  # torch has no kernel for what mixed precision computes with

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point


ACTIVATION = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=Grid.with_args(observer=MovingAverageMinMaxObserver),
)
WEIGHT = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-127,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
    observer_or_fake_quant_ctr=Grid.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        averaging_constant=1.0,  # weights are known, not sampled
    ),
)


class OnnxRuntimeQuantizer(Quantizer):
    """Quantizes what ONNX Runtime runs in integers, at each of its inputs and its output.

    Norms, softmax, attention and smooth activations stay float between quantized neighbours. Modules named in `skip`
    stay float as a whole.
    """

    def __init__(self, skip: Sequence[str]) -> None:
        self.skip = frozenset(skip)

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Replace operators without an integer kernel by equal ones that have one."""
        for node in model.graph.find_nodes(op="call_function", target=ATEN.silu.default):
            with model.graph.inserting_before(node):
                gate = model.graph.call_function(ATEN.sigmoid.default, node.args)
            gate.meta = dict(node.meta)
            node.target, node.args = ATEN.mul.Tensor, (node.args[0], gate)
        for node in model.graph.find_nodes(op="call_function", target=ATEN.adaptive_avg_pool2d.default):
            if list(node.args[1]) == [1, 1]:
                whole_map = list(node.args[0].meta["val"].shape[2:])
                node.target, node.args = ATEN.avg_pool2d.default, (node.args[0], whole_map)
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        for node in model.graph.nodes:
            if node.op != "call_function" or self.skip & set(module_names(node)):
                continue
            if node.target in LAYERS:
                _annotate(node, inputs=node.args[:1], output=_last(node, {BATCH_NORM}, CLIPS), weight=node.args[1])
                if not readers(node) and node.args[2:] and node.args[2] is not None:
                    node.meta[ANNOTATION].input_qspec_map[node.args[2]] = _bias(node)
            elif node.target in PAIRS and all(map(_is_activation, node.args[:2])) and not node.kwargs:
                _annotate(node, inputs=node.args[:2], output=_last(node, CLIPS))
            elif node.target is ATEN.cat.default:
                _annotate(node, inputs=node.args[0], output=_last(node, CLIPS))
            elif node.target in POOLS:
                _annotate(node, inputs=node.args[:1], output=node)
            elif node.target in MOVES and _is_quantized(node.args[0]):
                _annotate(node, inputs=node.args[:1], output=None)
                node.meta[ANNOTATION].output_qspec = SharedQuantizationSpec((node.args[0], node))
            elif node.target in DROPOUTS:  # quantized before: the values that training scales up are not those deployed
                _annotate(node, inputs=node.args[:1], output=None)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Accept every model: what is not annotated stays float."""


def make_quantizer(target: Target, skip: Sequence[str]) -> Quantizer:
    """Return the quantizer that fits the kernels of a runtime."""
    if target == "onnxruntime":
        return OnnxRuntimeQuantizer(skip)
    if target == "inductor":
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as inductor

        config = inductor.get_default_x86_inductor_quantization_config(is_qat=True)
        quantizer = inductor.X86InductorQuantizer().set_global(config)
        for name in skip:
            quantizer.set_module_name_qconfig(name, None)
        return quantizer
    xnnpack = require("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", "executorch")
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    quantizer = xnnpack.XNNPACKQuantizer().set_global(config)
    for name in skip:
        quantizer.set_module_name(name, None)
    return quantizer


def _annotate(node: fx.Node, inputs: Sequence[fx.Node], output: fx.Node | None, weight: fx.Node | None = None) -> None:
    specs = {source: ACTIVATION for source in inputs if source.target not in DROPOUTS}
    if weight is not None:
        specs[weight] = WEIGHT
    node.meta.setdefault(ANNOTATION, QuantizationAnnotation(_annotated=True)).input_qspec_map.update(specs)
    if output is not None and readers(output):  # the logits are nobody's input: they keep their precision
        output.meta.setdefault(ANNOTATION, QuantizationAnnotation(_annotated=True)).output_qspec = ACTIVATION


def _bias(layer: fx.Node) -> DerivedQuantizationSpec:
    """Return the grid of a layer's sums of products; the runtime cannot derive it if the output stays float."""
    source: Any = layer.args[0]
    reader = layer
    while source.target in DROPOUTS:
        source, reader = source.args[0], source

    def grid(grids: list[FakeQuantize]) -> tuple[Tensor, Tensor]:
        (input_scale, _), (weight_scale_C, weight_zero_C) = (each.calculate_qparams() for each in grids)
        return input_scale * weight_scale_C, weight_zero_C

    return DerivedQuantizationSpec(
        derived_from=[(source, reader), (layer.args[1], layer)],
        derive_qparams_fn=grid,
        dtype=torch.int32,
        quant_min=-(2**31),
        quant_max=2**31 - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def _last(node: fx.Node, *kinds: Set[Any]) -> fx.Node:
    """Return the last of the operators that the runtime fuses into `node`; each kind is fused once at most."""
    for targets in kinds:
        users = readers(node)
        if len(users) == 1 and users[0].target in targets:
            node = users[0]
    return node


def _is_activation(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op != "get_attr" and value.meta["val"].is_floating_point()


def _is_quantized(node: fx.Node) -> bool:
    annotation = node.meta.get(ANNOTATION)
    return annotation is not None and annotation.output_qspec is not None
