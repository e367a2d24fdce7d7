"""What every export format promises. A new file is covered without touching this one."""

from pathlib import Path

import pytest
import torch
from torch import nn

from espalier.compression.base import Conversion
from espalier.errors import ConfigError
from espalier.export import formats
from espalier.models.cnn import CNN
from espalier.models.mlp import MLP
from espalier.spec import of_shape

SHAPE = (1, 8, 8)
TOLERANCE = 1e-3  # of a logit: that of the export task
NETWORKS = {
    "cnn": lambda: CNN(SHAPE, 10, (4, 8), (16,), 1, "relu", "batch", 0.1),
    "mlp": lambda: MLP(SHAPE, 10, (32,), "relu", "none", 0.0),
}
QUICK = [name for name in formats.names() if not formats.named(name).is_machine_code]  # others compile for seconds


def test_onnx_is_the_first_choice_and_formats_of_weights_are_not_run():
    assert formats.names()[0] == "onnx"
    assert set(formats.names()) - set(formats.runnable()) >= {"safetensors"}
    assert len(formats.runnable()) >= 3


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", QUICK)
def test_it_writes_the_files_that_it_names_and_its_runtime_answers_as_torch(name: str, network: str, tmp_path: Path):
    chosen, model = formats.named(name), a_network(network)
    try:
        chosen.require("task.format")
    except ConfigError as missing:
        pytest.skip(str(missing))
    path = tmp_path / chosen.files[0]
    chosen.write(
        model, of_shape(SHAPE), path, Conversion("dynamic", 8) if "dynamic" not in chosen.conversions else None
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(chosen.files)
    if chosen.runtime is None:
        return
    session = chosen.session(path, 1)
    for batch_size in (1, 3):
        x = torch.randn(batch_size, *SHAPE)
        logits = session(x)
        assert (logits.dtype, logits.device.type, logits.requires_grad) == (torch.float32, "cpu", False)
        torch.testing.assert_close(logits, model(x).detach(), atol=TOLERANCE, rtol=0)


def a_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()
