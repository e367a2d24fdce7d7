"""Inspect a file as ONNX Runtime runs it: the operators that it executes, and the layers that it left in float."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnxruntime
from onnx import GraphProto

from espalier.export import session
from espalier.export.onnx import LAYERS

VIEWS = ("Transpose", "Reshape")  # operators that move numbers and compute none
FLOAT_LAYERS = frozenset({*LAYERS, "FusedConv", "FusedGemm", "FusedMatMul"})
INTEGER_LAYERS = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulNBits")


def operators(path: Path) -> Counter[str]:
    """Count the operators of each type that the runtime executes, after it has fused what it can."""
    return Counter(node.op_type for node in _optimised(path, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL).node)


def is_integer(operator: str) -> bool:
    """Return whether a layer of this type multiplies or adds integers."""
    return operator.startswith(INTEGER_LAYERS)


def unfused(path: Path) -> list[str]:
    """Return the layers that are quantized in the file but computed in float by the runtime, by module and operator.

    A layer that reads a float tensor was not meant to be quantized and is not listed.
    """
    proto = onnx.load(path)
    decoded: set[str] = set()
    meant: dict[str, str] = {}  # a number as the name of a layer that reads decoded integers, and what to call it
    for number, node in enumerate(proto.graph.node):
        if node.op_type == "DequantizeLinear" or (node.op_type in VIEWS and node.input[0] in decoded):
            decoded.update(node.output)
        if node.op_type in LAYERS and decoded.issuperset(node.input[:2]):
            meant[str(number)] = f"{node.name.partition('/')[0] or 'the network itself'} ({node.op_type})"
        node.name = str(number)  # fusion keeps names where it keeps layers
    graph = _optimised(proto.SerializeToString(), onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    in_float = [node.name for node in graph.node if node.op_type in FLOAT_LAYERS]
    return list(dict.fromkeys(meant[name] for name in in_float if name in meant))


def _optimised(model: Path | bytes, level: onnxruntime.GraphOptimizationLevel) -> GraphProto:
    options = session.options()
    options.graph_optimization_level = level
    with TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath).graph
