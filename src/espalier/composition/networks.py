"""Build the network of a checkpoint: as it was trained, as it is shipped, in float, or to start another training."""

from torch import nn

from espalier.composition import build
from espalier.composition.origin import require_same_data
from espalier.compression.base import Stage, replay, stage_of
from espalier.data.module import DataModule
from espalier.errors import ConfigError
from espalier.export import deployed
from espalier.export.deployed import Deployable
from espalier.runs import checkpoint
from espalier.runs.checkpoint import Checkpoint
from espalier.runs.run_folder import EVALUATED
from espalier.spec import Entry


def trained(stored: Checkpoint) -> nn.Module:
    """Return the network of a checkpoint as it was trained: masks, adapters and quantizers in place."""
    model = replay(build.stored_model(stored), stored.history)
    checkpoint.load_weights(model, stored)
    return model


def deployable(stored: Checkpoint) -> Deployable:
    """Return the network of a checkpoint as it is shipped, together with the form in which it was trained."""
    return deployed.deployable(trained(stored), stored.history)


def in_float(stored: Checkpoint) -> tuple[nn.Module, list[Entry]]:
    """Return the same weights without the quantizers, and the matching history."""
    history = [entry for entry in stored.history if stage_of(entry["method"]) < Stage.QUANTIZE]
    model = replay(build.stored_model(stored), history)
    checkpoint.load_fitting_weights(model, stored)
    return model, history


def of_teacher(key: str, reference: str, source: str | None, data: DataModule) -> Checkpoint:
    """Return the network of another RUN, trained on the same data; `source` means the run that this one starts from.

    Raises:
        ConfigError: there is no such run, or it was trained on other data.
    """
    if reference == "source" and not source:
        raise ConfigError(f"{key}=source: this run starts from no source; name the RUN of the teacher")
    stored = checkpoint.load_run(key, source if reference == "source" and source else reference, EVALUATED)
    require_same_data(key, data, stored)
    return stored
