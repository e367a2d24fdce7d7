"""A network run through the graph that torch.export captured, which still behaves as an ordinary module.

Quantizers need a graph. A bare graph module keeps neither training mode, nor hooks, nor the names of the network it
came from; a `CapturedNet` owns the modules of the original network, so that names, masks, optimizer groups and
checkpoints stay what they were, and runs the graph instead of their `forward`.

Batch norm is folded into the convolution before it while its statistics still move, so that the weights being
quantized are those that will be deployed (Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2). Here and not by
torchao, which does it with a fixed eps and momentum, leaves unquantized layers unfolded, and divides by gamma = 0.
"""

import copy
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from espalier.config.hints import nearest
from espalier.errors import ConfigError
from espalier.signature import dynamic, example
from espalier.spec import DataSpec

ATEN = torch.ops.aten
BATCH_NORM = ATEN.batch_norm.default
BATCH_NORM_TRAINING, BATCH_NORM_EPS = 5, 7  # places of its arguments
TRAINING_ARGUMENT = {
    ATEN.dropout.default: 2,
    ATEN.dropout_.default: 2,
    ATEN.feature_dropout.default: 2,
    ATEN.alpha_dropout.default: 2,
    ATEN.feature_alpha_dropout.default: 2,
}
CONVOLUTIONS = frozenset(
    getattr(ATEN, name).__getattr__(overload)
    for name in ("conv1d", "conv2d", "conv3d")
    for overload in ("default", "padding")
)
MAX_BATCH = 4096
TINY_SCALE = 1e-12  # stands for gamma = 0, by which the output of the convolution is divided


class Mode(NamedTuple):
    """The mode, training or evaluation, for which the constants and the observers of a graph are set."""

    training: bool
    observes: bool
    gathers_statistics: bool


class CapturedNet(nn.Module):
    """A network whose modules are kept, while a captured graph runs in place of their `forward`.

    `training` is read at each forward, however it was set. In evaluation nothing changes its state. `watched` holds
    the outputs of the modules that `watch` named, of the last forward.
    """

    code: fx.GraphModule  # not registered, so that no name gets a prefix

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = getattr(model, registry)
        self.training = model.training
        self.name = model._get_name()
        self.frozen_observers = False
        self.frozen_statistics = False
        self.watched: dict[str, Tensor] = {}
        self._watched_names: tuple[str, ...] = ()
        self.run(graph)

    def _get_name(self) -> str:
        """Return the name that tables and `repr` show."""
        return f"{self.name} as a graph"

    def run(self, graph: fx.Graph, meta: dict[str, Any] | None = None) -> None:
        """Make `forward` run `graph`, which reads the tensors of this module and is not registered in it."""
        code = fx.GraphModule(self, graph)
        for registry in ("_parameters", "_buffers", "_modules"):
            code.__dict__[registry] = getattr(self, registry)
        code.meta = dict(meta or {})
        self.__dict__["code"] = code
        self._mode: Mode | None = None  # unknown

    @property
    def graph(self) -> fx.Graph:
        """Return the graph for reading; change it only through the functions of this file."""
        return self.code.graph

    def forward(self, *inputs: Tensor) -> Tensor:
        self.switch()
        output, *watched = self.code(*inputs)
        if watched:
            self.watched = dict(zip(self._watched_names, watched, strict=True))
        return output

    def switch(self) -> None:
        """Adapt the graph to `training` and to what is frozen; each `forward` calls this."""
        trains = self.training
        mode = Mode(trains, trains and not self.frozen_observers, trains and not self.frozen_statistics)
        if mode == self._mode:
            return
        for node in self.graph.nodes:
            if node.target in TRAINING_ARGUMENT:
                node.update_arg(TRAINING_ARGUMENT[node.target], mode.training)
            elif node.target is BATCH_NORM and node.args[3] is not None:
                node.update_arg(BATCH_NORM_TRAINING, mode.gathers_statistics)
            elif counts_batches(node):
                node.update_arg(1, int(mode.gathers_statistics))
        self.code.recompile()
        for module in self.children():
            if isinstance(observer_enabled := getattr(module, "observer_enabled", None), Tensor):
                observer_enabled.fill_(mode.observes)
        self._mode = mode

    def watch(self, names: Sequence[str]) -> None:
        """Keep the outputs of these modules in `watched` from the next forward on; an empty list keeps none.

        Raises:
            ConfigError: a module does not exist or computes nothing.
        """
        graph = copy.deepcopy(self.graph)
        nodes = {name: node for node in graph.nodes if node.op == "call_function" for name in module_names(node)}
        for name in names:
            if name not in nodes:
                raise ConfigError(
                    f"{name}: no module of this network computes under that name{nearest(name, [*nodes])}"
                )
        output = graph.output_node()
        output.args = ((output.args[0][0], *(_quantized(nodes[name]) for name in names)),)  # type: ignore[index]
        self._watched_names, self.watched = tuple(names), {}
        self.run(graph, self.code.meta)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CapturedNet":
        twin = CapturedNet.__new__(CapturedNet)
        memo[id(self)] = twin
        state = {name: value for name, value in self.__dict__.items() if name not in ("code", "watched")}
        twin.__dict__.update(copy.deepcopy(state, memo), watched={})
        twin.run(copy.deepcopy(self.graph), self.code.meta)
        return twin


def capture(model: nn.Module, spec: DataSpec) -> CapturedNet:
    """Return the graph of `model` for batches of 1 to MAX_BATCH; it shares modules and tensors with `model`.

    Raises:
        ConfigError: the network cannot be captured.
    """
    trains = model.training
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        program = torch.export.export(
            model.train(), example(spec, 2, device), dynamic_shapes=dynamic(model, spec, MAX_BATCH)
        )
    except Exception as error:  # torch.export documents no type
        raise ConfigError(
            f"{type(model).__name__}: torch.export cannot capture it, so it cannot be quantized "
            f"({str(error).strip().splitlines()[0] if str(error) else type(error).__name__}); "
            "keep Python branches on values of tensors out of forward"
        ) from error
    finally:
        model.train(trains)
    graph = program.module(check_guards=False).graph
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:  # a mask, or an adapter of a distillation, which goes before the graph does
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())  # plain arguments instead of trees, so that outputs can be added
    return CapturedNet(model, graph)


def module_names(node: fx.Node) -> Iterator[str]:
    """Yield the paths of the modules in whose `forward` the node was made, outermost first."""
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        yield path.partition("@")[0]  # a second call of the same module is `path@1`


def fuse_batch_norm(graph: fx.Graph) -> None:
    """Make each convolution before a batch norm use `weight * gamma / std`, and divide its output by that factor.

    The result is the same; quantizers now see the weights that `fold_batch_norm` will leave.
    """
    for norm in graph.find_nodes(op="call_function", target=BATCH_NORM):
        conv, gamma, _, _, variance = norm.args[:5]
        if conv.target not in CONVOLUTIONS or variance is None or readers(conv) != [norm]:
            continue
        weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
        with graph.inserting_before(conv):
            scale = graph.call_function(norm_scale, (gamma, variance, norm.args[BATCH_NORM_EPS]))
            scaled = graph.call_function(scale_weight, (weight, scale))
        with graph.inserting_after(conv):
            plain = graph.call_function(unscale_output, (conv, scale, bias))
        for node in (scale, scaled, plain):
            node.meta = {key: conv.meta[key] for key in ("nn_module_stack", "val") if key in conv.meta}
        conv.replace_all_uses_with(plain, delete_user_cb=lambda user, plain=plain: user is not plain)
        conv.update_arg(1, scaled)
        if bias is not None:
            conv.update_arg(2, None)


@torch.no_grad()
def fold_batch_norm(net: CapturedNet) -> None:
    """Replace what `fuse_batch_norm` made by one convolution, which equals convolution and norm in evaluation."""
    graph = net.graph
    for plain in graph.find_nodes(op="call_function", target=unscale_output):
        conv, scale_node, bias_node = plain.args
        (norm,) = readers(plain)
        scaled = next(node for node in _ancestors(conv.args[1]) if node.target is scale_weight)
        bias, gamma, beta, mean, variance = (_tensor(net, node) for node in (bias_node, *norm.args[1:5]))
        eps: Any = norm.args[BATCH_NORM_EPS]
        scale = norm_scale(gamma, variance, eps)
        new_weight = scale_weight(_tensor(net, scaled.args[0]), scale)
        new_bias = (0 if beta is None else beta) - (mean if bias is None else mean - bias) * scale
        with graph.inserting_before(scaled):
            scaled.replace_all_uses_with(_constant(net, f"{conv.name}_weight", new_weight))
        with graph.inserting_before(conv):
            conv.args = (*conv.args[:2], _constant(net, f"{conv.name}_bias", new_bias), *conv.args[3:])
        norm.replace_all_uses_with(conv)
        for node in (norm, plain, scaled, scale_node):
            graph.erase_node(node)
    net.run(graph, net.code.meta)


def norm_scale(gamma: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """Return gamma / sqrt(variance + eps), the factor of batch norm per channel, with TINY_SCALE in place of 0."""
    scale = torch.rsqrt(variance + eps)
    return scale if gamma is None else torch.where(gamma == 0, TINY_SCALE, gamma * scale)


def scale_weight(weight: Tensor, scale_C: Tensor) -> Tensor:
    """Return a kernel (C, ...) whose output channels are multiplied by `scale_C`."""
    return weight * scale_C.view(-1, *[1] * (weight.ndim - 1))


def unscale_output(output_BC: Tensor, scale_C: Tensor, bias_C: Tensor | None) -> Tensor:
    """Undo `scale_weight` on the output of the convolution, (B, C, ...), and add the bias that was left out."""
    shape = (-1, *[1] * (output_BC.ndim - 2))
    plain = output_BC / scale_C.view(shape)
    return plain if bias_C is None else plain + bias_C.view(shape)


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read this one to compute something; outputs that are only watched do not count."""
    return [user for user in node.users if user.op != "output"]


def counts_batches(node: fx.Node) -> bool:
    """Return whether the node counts the batches that a batch norm has seen."""
    counter = node.args[0] if node.target is ATEN.add_.Tensor else None
    return isinstance(counter, fx.Node) and str(counter.target).endswith("num_batches_tracked")


def _constant(net: CapturedNet, name: str, value: Tensor) -> fx.Node:
    net.register_parameter(name, nn.Parameter(value, requires_grad=False))
    net.code.register_parameter(name, net.get_parameter(name))
    return net.graph.get_attr(name)


def _tensor(net: CapturedNet, node: Any) -> Any:
    """Return the parameter or buffer that a node of the graph stands for, or None for no node."""
    return None if node is None else attrgetter(node.target)(net)


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the node, its first input, the first input of that, and so on."""
    while node.op.startswith("call"):
        yield node
        node = node.args[0]  # type: ignore[assignment]


def _quantized(node: fx.Node) -> fx.Node:
    """Return the fake-quantized value of a node, or the node itself if it has none."""
    return next((user for user in readers(node) if user.op == "call_module"), node)
