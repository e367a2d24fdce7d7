"""Put quantizers into a captured network, calibrate them, and convert the network to integers."""

import copy
import logging
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from espalier.compression.graph_module import (
    BATCH_NORM,
    CapturedNet,
    counts_batches,
    fold_batch_norm,
    fuse_batch_norm,
    readers,
    scale_weight,
)
from espalier.compression.quantizer import ANNOTATION, DROPOUTS, MIN_SCALE

logging.disable(logging.WARNING)  # as in quantizer.py
try:
    from torchao.quantization.pt2e import HistogramObserver
    from torchao.quantization.pt2e.fake_quantize import FakeQuantize
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import Quantizer
finally:
    logging.disable(logging.NOTSET)

CALIBRATION_BATCH = 64


def prepare(net: CapturedNet, quantizer: Quantizer) -> CapturedNet:
    """Insert quantizers into a network, in place; their ranges are not known until values are observed."""
    code = quantizer.transform_for_annotation(net.code)
    quantizer.annotate(code)
    quantizer.validate(code)
    fuse_batch_norm(code.graph)
    for scaled in code.graph.find_nodes(op="call_function", target=scale_weight):
        (conv,) = readers(scaled)
        if annotation := conv.meta.get(ANNOTATION):
            specs = annotation.input_qspec_map
            if scaled.args[0] in specs:
                specs[scaled] = specs.pop(scaled.args[0])
            annotation.input_qspec_map = {node: spec for node, spec in specs.items() if node in conv.all_input_nodes}
    _retarget(code.graph, BATCH_NORM, _batch_norm)  # or torchao searches for it, and fuses what has to stay
    with torch.random.fork_rng(devices=[]):  # torchao draws examples for patterns
        code = prepare_qat_pt2e(code, _Annotated())
    _retarget(code.graph, _batch_norm, BATCH_NORM)
    net.run(code.graph, code.meta)
    for node in net.graph.find_nodes(op="call_module"):
        grid = net.get_submodule(str(node.target))
        if not isinstance(grid, FakeQuantize):
            continue
        grid._non_persistent_buffers_set.add("observer_enabled")  # follows the mode of the network
        if grid.is_per_channel:
            weight = node.args[0]
            if weight.target is scale_weight:
                weight = weight.args[0]
            _set_channels(grid, attrgetter(weight.target)(net).shape[grid.ch_axis])
    return net


@torch.no_grad()
def calibrate(net: CapturedNet, inputs: Sequence[Tensor]) -> None:
    """Fix the ranges of a prepared network: of weights from their values, of activations from samples.

    Nothing is rounded meanwhile. The range is the one with the least mean square error on the histogram of the values.
    """
    net.eval().switch()
    histograms: dict[FakeQuantize, HistogramObserver] = {}
    hooks = []
    for grid in _grids(net):
        if grid.is_per_channel:  # of a weight
            grid.enable_observer()
            continue
        histogram = HistogramObserver(
            dtype=grid.dtype, qscheme=grid.qscheme, quant_min=grid.quant_min, quant_max=grid.quant_max, eps=MIN_SCALE
        )
        histograms[grid] = histogram
        hooks.append(grid.register_forward_pre_hook(lambda _, inputs, see=histogram: see(*inputs)))
        grid.disable_fake_quant()
    for part in zip(*(x.split(CALIBRATION_BATCH) for x in inputs), strict=True):
        net(*part)
    for hook in hooks:
        hook.remove()
    for grid, histogram in histograms.items():
        scale, zero_point = histogram.calculate_qparams()
        for end, code in (("min_val", grid.quant_min), ("max_val", grid.quant_max)):
            getattr(grid.activation_post_process, end).copy_(((code - zero_point) * scale).squeeze())
        grid.enable_fake_quant()
    for grid in _grids(net):
        grid.disable_observer()
    net(*(x[:1] for x in inputs))  # torch computes the scales from the ends, in each forward


def convert(net: CapturedNet) -> CapturedNet:
    """Return a new network that computes with the integers of the prepared one, batch norm folded."""
    net = copy.deepcopy(net)
    net.watch(())
    net.eval().switch()
    fold_batch_norm(net)
    for node in [node for node in net.graph.nodes if node.target in DROPOUTS or counts_batches(node)]:
        node.replace_all_uses_with(node.args[0])
        net.graph.erase_node(node)
    _retarget(net.graph, BATCH_NORM, _batch_norm)
    with torch.random.fork_rng(devices=[]):
        code = convert_pt2e(net.code)
    _retarget(code.graph, _batch_norm, BATCH_NORM)
    code.graph.eliminate_dead_code()
    return CapturedNet(fx.GraphModule(code, code.graph), code.graph).eval()  # without the tensors that are unused now


def _grids(net: CapturedNet) -> list[FakeQuantize]:
    """Return every FakeQuantize once, also where several values share it."""
    return [module for module in net.children() if isinstance(module, FakeQuantize)]


def _set_channels(grid: FakeQuantize, num_channels: int) -> None:
    """Give the buffers the shapes that they have after the first forward, so that a state dict fits before it."""
    grid.scale.resize_(num_channels).fill_(1)
    grid.zero_point.resize_(num_channels).fill_(0)
    grid.activation_post_process.min_val.resize_(num_channels).fill_(torch.inf)
    grid.activation_post_process.max_val.resize_(num_channels).fill_(-torch.inf)


class _Annotated(Quantizer):
    """A quantizer for a graph that is annotated already: it adds nothing."""

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        return model

    def validate(self, model: fx.GraphModule) -> None:
        pass


def _batch_norm(*args: Any) -> Tensor:
    return BATCH_NORM(*args)


def _retarget(graph: fx.Graph, old: Any, new: Any) -> None:
    for node in graph.find_nodes(op="call_function", target=old):
        node.target = new
