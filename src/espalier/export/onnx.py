"""Write a deployable network as an ONNX file without anything a runtime does not need, and run it in ONNX Runtime.

Names and attributes are shortened or dropped: to an int8 network of 20 kB, torch adds 110 kB of stack traces.
Letters: B batch, N output features, K input features, J blocks of a row.
"""

import ast
from collections import Counter
from collections.abc import Callable, Collection
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from espalier.compression.base import Conversion
from espalier.compression.graph_module import CapturedNet
from espalier.compression.weight_only import encode
from espalier.config.ranges import Count
from espalier.errors import ConfigError
from espalier.export import session
from espalier.export.formats import Format, draft, quiet, reason, require_precision
from espalier.signature import dynamic, example
from espalier.spec import OUTPUT, DataSpec

OPSET = 20  # the first that has GELU as one operator
CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter says which module an operator comes from
INT8_ACCURACY = 4  # MatMulNBits rounds activations to int8; without it 8-bit weights have no kernel: 15x slower
LAYERS = ("Conv", "Gemm", "MatMul", "Add")  # operators that keep the name of their module
CONV_DEFAULTS = {"dilations": {1}, "strides": {1}, "pads": {0}}  # of each axis; the schema does not state them


def write(model: nn.Module, spec: DataSpec, path: Path, conversion: Conversion | None = None) -> None:
    """Write a network in evaluation mode to `path`, for batches of any size; a crash leaves the old file or the new.

    `conversion` replaces linear layers by operators of the runtime that torch does not have.

    Raises:
        ConfigError: torch cannot export the network, or the runtime has no kernels for its precision.
    """
    require_precision("onnx", model)
    with quiet():
        proto = _export(model, spec)
        _name_after_modules(proto.graph)
        if conversion is not None:
            proto = CONVERSIONS[conversion.kind](proto, conversion)
    _pool(proto.graph)
    _strip(proto)
    _shorten(proto.graph)
    unshare(proto.graph)
    with draft(path) as target:
        target.write_bytes(proto.SerializeToString())


class Session:
    """A file in ONNX Runtime, on the CPU; called with its inputs, (B, ...) each, it returns logits (B, K)."""

    def __init__(self, path: Path, threads: Count) -> None:
        self._session = session.opened(path, session.options(threads))

        self._names = [each.name for each in self._session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> Tensor:
        given = {name: x.numpy(force=True) for name, x in zip(self._names, inputs, strict=True)}
        (logits,) = self._session.run([OUTPUT], given)
        return torch.from_numpy(logits)


def _export(model: nn.Module, spec: DataSpec) -> ModelProto:
    if isinstance(model, CapturedNet):  # its graph knows the modules it came from; its forward hides them
        model.switch()
        model = model.code
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    try:
        program = torch.onnx.export(
            model,
            example(spec, 2, device),  # a batch of one would be taken for a constant
            dynamo=True,
            opset_version=OPSET,
            input_names=[each.name for each in spec.inputs],
            output_names=[OUTPUT],
            dynamic_shapes=dynamic(model, spec),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(
            f"export: torch cannot turn this network into ONNX ({reason(error)}); "
            "its forward must be tensor operations that do not depend on values"
        ) from error
    assert program is not None
    proto = program.model_proto
    _require_free(proto.graph, spec)
    return proto


def _require_free(graph: GraphProto, spec: DataSpec) -> None:
    """Raise `ConfigError` if torch has fixed the size of an axis that may differ, which it does without a word."""
    for given, each in zip(graph.input, spec.inputs, strict=True):
        sizes = given.type.tensor_type.shape.dim
        free = [0, *(place for place, axis in enumerate(each.shape, start=1) if isinstance(axis, str))]
        if fixed := [place for place in free if sizes[place].HasField("dim_value")]:
            raise ConfigError(
                f"export: torch could write this network for {sizes[fixed[0]].dim_value} "
                f"{'samples' if fixed[0] == 0 else 'tokens'} alone; its forward must work for any number of them"
            )


def _name_after_modules(graph: GraphProto) -> None:
    """Name each layer after its module, a second one `module/2`; remove the names of other operators."""
    counts: Counter[str] = Counter()
    for node in graph.node:
        node.name = _module_of(node) if node.op_type in LAYERS else ""
        if node.name:
            counts[node.name] += 1
            node.name += f"/{counts[node.name]}" if counts[node.name] > 1 else ""  # a name must be unique


def _module_of(node: NodeProto) -> str:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "['', '']")
    return str(ast.literal_eval(scopes)[-2])


def _dynamic(proto: ModelProto, conversion: Conversion) -> ModelProto:
    """Return the graph with int8 weights per output channel, and uint8 activations whose scale each call finds.

    Only linear layers change: a convolution has no fast kernel for it (a ResNet-8 takes 4 times as long as in float).
    """
    skipped = [node.name for node in proto.graph.node if _is_skipped(node, conversion)]
    with TemporaryDirectory() as folder:
        target = Path(folder) / "dynamic.onnx"
        quantize_dynamic(
            proto,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=skipped + [f"{name}_MatMul" for name in skipped],  # what a Gemm becomes
        )
        return onnx.load(target)


def _weight_only(proto: ModelProto, conversion: Conversion) -> ModelProto:
    """Return the graph with weights packed in blocks, decoded by the operator that multiplies.

    See `compression.weight_only`.
    """
    graph = proto.graph
    constants = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in constants or _is_skipped(node, conversion):
            continue
        x, weight, *bias = node.input
        matrix = torch.from_numpy(numpy_helper.to_array(constants[weight]).copy())
        is_NK = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        weight_NK = matrix if is_NK else matrix.T
        codes_NJB, scale_NJ = encode(weight_NK, conversion.bits, conversion.block)
        packed = codes_NJB if conversion.bits == 8 else codes_NJB[:, :, ::2] | codes_NJB[:, :, 1::2] << 4
        tensors = {f"{weight}/codes": packed, f"{weight}/scale": scale_NJ}
        graph.initializer.extend(numpy_helper.from_array(value.numpy(), name) for name, value in tensors.items())
        operator = onnx.helper.make_node(
            "MatMulNBits",
            [x, *tensors, *(["", "", *bias] if bias else [])],  # no zero points, no order of groups
            node.output,
            domain=CONTRIB,
            N=weight_NK.shape[0],
            K=weight_NK.shape[1],
            bits=conversion.bits,
            block_size=conversion.block,
            accuracy_level=INT8_ACCURACY,
        )
        node.CopyFrom(operator)
    proto.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
    return proto


CONVERSIONS: dict[str, Callable[[ModelProto, Conversion], ModelProto]] = {
    "dynamic": _dynamic,
    "weight_only": _weight_only,
}


def _is_skipped(node: NodeProto, conversion: Conversion) -> bool:
    module = node.name.partition("/")[0]
    return any(f"{module}.".startswith(f"{skipped}.") for skipped in conversion.skip)


def _pool(graph: GraphProto) -> None:
    """Replace the mean over height and width by the one operator for it, which the runtime also has for integers."""
    constants = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        if node.op_type != "ReduceMean" or node.input[1] not in constants:
            continue
        keeps_axes = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
        if keeps_axes and sorted(numpy_helper.to_array(constants[node.input[1]]).tolist()) in ([2, 3], [-2, -1]):
            node.CopyFrom(onnx.helper.make_node("GlobalAveragePool", node.input[:1], node.output))


def _strip(proto: ModelProto) -> None:
    """Remove everything that only describes the graph, and attributes that have their default."""
    graph = proto.graph
    for owner in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        owner.ClearField("metadata_props")
        owner.ClearField("doc_string")
    graph.ClearField("value_info")
    proto.ClearField("functions")
    for node in graph.node:
        if node.op_type not in LAYERS:
            node.name = ""
        needed = [attribute for attribute in node.attribute if not _is_default(node, attribute)]
        node.ClearField("attribute")
        node.attribute.extend(needed)


def _is_default(node: NodeProto, attribute: AttributeProto) -> bool:
    """Return whether the runtime would assume this value anyway, or read it from the shape of the kernel."""
    if node.op_type == "Conv" and (
        attribute.name == "kernel_shape" or set(attribute.ints) == CONV_DEFAULTS.get(attribute.name)
    ):
        return True
    if node.domain:
        return False
    default = onnx.defs.get_schema(node.op_type, OPSET).attributes[attribute.name].default_value
    has_default = default.type != AttributeProto.UNDEFINED
    return has_default and onnx.helper.get_attribute_value(default) == onnx.helper.get_attribute_value(attribute)


def _shorten(graph: GraphProto) -> None:
    """Shorten the names of all tensors but input and output; merge equal constants, and remove unused ones."""
    used = {name for node in graph.node for name in node.input}
    short: dict[str, str] = {"": "", OUTPUT: OUTPUT, **{each.name: each.name for each in graph.input}}
    constants: dict[bytes, TensorProto] = {}
    for constant in graph.initializer:
        if constant.name in used:
            name = constant.name
            constant.name = ""
            kept = constants.setdefault(
                constant.SerializeToString(), TensorProto.FromString(constant.SerializeToString())
            )
            kept.name = kept.name or f"{len(constants):x}"
            short[name] = kept.name
    names = (f"{number:x}" for number in range(len(constants) + 1, 1 << 30))
    for output in chain.from_iterable(node.output for node in graph.node):
        if output not in short:
            short[output] = next(names)
    graph.ClearField("initializer")
    graph.initializer.extend(constants.values())
    for node in graph.node:
        node.input[:] = [short[name] for name in node.input]
        node.output[:] = [short[name] for name in node.output]


def unshare(graph: GraphProto) -> None:
    """Give each operator its own copy of an int8 constant: the runtime cannot turn a shared one into uint8.

    The runtime does so on processors that lack exact int8 (see `session.py`).
    """
    shared = {constant.name: constant for constant in graph.initializer if constant.data_type == TensorProto.INT8}
    uses: Counter[str] = Counter()
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name not in shared:
                continue
            if uses[name]:
                copy = graph.initializer.add()
                copy.CopyFrom(shared[name])
                copy.name = node.input[place] = f"{name}.{uses[name]}"
            uses[name] += 1


class ONNX(Format):
    """An ONNX file, run by ONNX Runtime."""

    runtime: ClassVar[str] = "onnxruntime"
    files: ClassVar[tuple[str, ...]] = ("model.onnx",)
    precisions: ClassVar[Collection[str]] = ("fp32", "fp16")  # ONNX Runtime has no bfloat16 convolution
    conversions: ClassVar[Collection[str]] = tuple(CONVERSIONS)
    place: ClassVar[int] = 0

    def write(self, model: nn.Module, spec: DataSpec, path: Path, conversion: Conversion | None = None) -> None:
        write(model, spec, path, conversion)

    def session(self, path: Path, threads: Count) -> Callable[..., Tensor]:
        return Session(path, threads)
