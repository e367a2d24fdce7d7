"""Grad-CAM: feature maps of a convolutional layer, weighted by the mean gradient of the output, positive part.

Selvaraju et al. 2016, arXiv 1610.02391, section 3. Letters: B batch, C channels, H height, W width.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from espalier.compression.graph_module import CapturedNet, module_names
from espalier.config.hints import nearest
from espalier.errors import ConfigError, require
from espalier.explain.base import EXTRA, Explainer, Setting

MIN_SIDE = 4  # a coarser map says no more than left and right
PROBE = "grad_cam_probe"
FITTING = "use integrated_gradients, occlusion, smooth_grad, shap or lime"

Shapes = dict[str, tuple[int, ...]]  # module -> shape of its output, in the order in which modules finish


class GradCAM(Explainer):
    """Weights the feature maps of one layer by the mean gradient of the output."""

    package: ClassVar[str] = "captum"
    by_default: ClassVar[bool] = True

    def explain(self, model: nn.Module, x: Tensor, target: int, setting: Setting) -> Tensor:
        """Return where the feature maps of the layer speak for the output, at the size of the image; never negative."""
        assert setting.layer is not None, "prepare chooses it"
        captum = require("captum.attr", EXTRA)
        model, layer = _with_layer(model, setting.layer)
        found = captum.LayerGradCam(model, layer).attribute(
            x[None].clone().requires_grad_(), target=target, relu_attributions=True
        )
        return captum.LayerAttribution.interpolate(found, tuple(x.shape[1:]), "bilinear")[0, 0]

    def prepare(self, model: nn.Module, x: Tensor, setting: Setting) -> Setting:
        """Choose the last layer whose maps have at least MIN_SIDE positions a side, or the one with the finest maps.

        Raises:
            ConfigError: no layer has maps, or the one that the user named has none.
        """
        shapes = _output_shapes(model, x)
        maps: Shapes = {name: shape for name, shape in shapes.items() if len(shape) == 4 and min(shape[2:]) > 1}
        if x.ndim != 3 or not maps:
            raise ConfigError(f"task.method=[grad_cam]: this network has no convolutional feature maps; {FITTING}")
        if setting.layer is not None:
            if setting.layer not in maps:
                near = nearest(setting.layer, list(maps))
                raise ConfigError(
                    f"task.layer={setting.layer}: no layer with feature maps{near}; there are {_some(maps)}"
                )
            return setting
        last = list(maps)[-1]
        if any(len(shape) == 3 for shape in _after(shapes, last)):
            raise ConfigError(
                f"task.method=[grad_cam]: after {last} this network goes on in tokens, which are no feature maps; "
                f"{FITTING}, or task.layer={last}"
            )
        best = max(min(*shape[2:], MIN_SIDE) for shape in maps.values())
        return replace(setting, layer=[name for name, shape in maps.items() if min(*shape[2:], MIN_SIDE) == best][-1])


def _after(shapes: Shapes, name: str) -> list[tuple[int, ...]]:
    names = list(shapes)
    return [shapes[later] for later in names[names.index(name) + 1 :]]


def _some(maps: Shapes) -> str:
    """Return the last few layers that are not parts of others, as text."""
    outer = [name for name in maps if not any(name.startswith(f"{other}.") for other in maps)]
    return ", ".join(outer[-8:])


def _output_shapes(model: nn.Module, x: Tensor) -> Shapes:
    if isinstance(model, CapturedNet):
        nodes = _last_nodes(model.graph)
        return {name: tuple(node.meta["val"].shape) for name, node in nodes.items() if "val" in node.meta}
    shapes: Shapes = {}

    def note(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape)

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        model(x[None])
    for hook in hooks:
        hook.remove()
    return shapes


def _with_layer(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """Return the network and the module whose output is used; for a captured graph, a copy with such a module."""
    if not isinstance(model, CapturedNet):
        return model, model.get_submodule(name)
    twin, probe = copy.deepcopy(model), nn.Identity()
    twin.add_module(PROBE, probe)
    node = _last_nodes(twin.graph)[name]
    with twin.graph.inserting_after(node):
        seen = twin.graph.call_module(PROBE, (node,))
    node.replace_all_uses_with(seen, delete_user_cb=lambda user: user is not seen)
    twin.run(twin.graph, twin.code.meta)
    return twin, probe


def _last_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the node of each module's output, in the order in which modules finish, inner ones first."""
    nodes: dict[str, fx.Node] = {}
    for node in graph.nodes:
        for name in reversed(list(module_names(node))) if node.op == "call_function" else ():
            nodes.pop(name, None)
            nodes[name] = node
    return nodes
