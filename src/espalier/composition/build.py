"""Build the object that one node of the configuration describes: a part of a run, or a network."""

import inspect
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from espalier.config import redaction
from espalier.errors import ConfigError
from espalier.processes import shortage
from espalier.runs.checkpoint import Checkpoint
from espalier.spec import DataSpec
from espalier.trust.targets import check_stored


def part(key: str, node: DictConfig, **supplied: Any) -> Any:
    """Return the object that a node describes; arguments of `check.SUPPLIED` are added if it accepts them.

    Raises:
        ConfigError: the object refuses its arguments; the message names `key`.
    """
    redaction.require_told(OmegaConf.to_container(node, resolve=True), key)
    factory = instantiate(node, _partial_=True, _convert_="all")
    accepted = inspect.signature(factory.func).parameters
    try:
        return factory(**{name: value for name, value in supplied.items() if name in accepted})
    except (ValueError, TypeError, ImportError, MisconfigurationException, InstantiationException) as error:
        raise ConfigError(f"{key}: {error}") from error
    except RuntimeError as error:
        if not shortage.is_of_memory(error):
            raise
        raise ConfigError(f"{key}: does not fit into memory, {str(error).splitlines()[0]}") from error


def model(node: DictConfig, spec: DataSpec) -> nn.Module:
    """Return a network with new weights for data of this spec.

    Raises:
        ConfigError: it refuses its arguments, or takes one tensor of numbers where the data have something else.
    """
    supplied: dict[str, Any] = {"inputs": spec.inputs, "num_outputs": spec.num_outputs}
    if spec.is_plain:
        supplied["input_shape"] = spec.shape
    elif "inputs" not in inspect.signature(get_object(node._target_)).parameters:
        raise ConfigError(
            f"model: {node._target_.rpartition('.')[2]} takes one tensor of numbers, and a sample of {spec.name} is "
            f"{' and '.join(each.kind for each in spec.inputs)}; choose a model for that, such as model=text_cnn"
        )
    return part("model", node, **supplied)


def stored_model(stored: Checkpoint) -> nn.Module:
    """Return the network of a checkpoint with new weights; its configuration may name trusted targets only."""
    node = OmegaConf.create({"model": stored.config.get("model")})
    check_stored(node)
    return model(node.model, stored.spec)
