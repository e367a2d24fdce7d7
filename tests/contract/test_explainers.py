"""What every method of explanation promises on every model. A new file is covered without touching this one."""

import pytest
import torch
from test_options import SMALL, options, small
from torch import Tensor, nn

from espalier.config import compose
from espalier.errors import ConfigError
from espalier.explain import base
from espalier.run import Run

OURS = ("grad_cam", "integrated_gradients", "occlusion", "smooth_grad", "lime", "shap")
REFUSED = {"grad_cam": {"mlp", "vit"}}  # models of ours that methods of ours do not fit

Networks = dict[str, tuple[nn.Module, Tensor]]  # with a few samples, by model


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    found = {}
    for model in options("model"):
        words = small(model)
        if "data=text" in words:
            continue  # explain refuses texts
        cfg = compose.compose([*words, "callbacks=[]", "logger=[]"])
        run = Run(cfg, [], tmp_path_factory.mktemp(model), "train")
        found[model] = run.model.eval(), run.data.samples(9).x
    return found


def test_our_methods_are_found():
    assert len([name for name in OURS if name in base.methods()]) >= 6


@pytest.mark.parametrize("name", base.methods())
def test_every_model_is_explained_by_every_method_that_says_it_fits(networks: Networks, name: str):
    fitting, refused = [], {}
    for model, (network, x) in networks.items():
        setting = base.Setting(torch.zeros(1, 8, 8), x[1:], 2, None, 8, 4, 0.1, 20, 16, 0)
        try:
            own = base.method_named(name).prepare(network, x[0], setting)
        except ConfigError as error:
            refused[model] = str(error)
            continue
        found = base.attribute(name, network, x[0], 3, own)
        assert found.shape == (8, 8)
        assert found.isfinite().all()
        fitting.append(model)
    assert fitting
    assert all("\n" not in message for message in refused.values())
    if name in OURS:
        assert SMALL.keys() & refused == REFUSED.get(name, set())
        assert all("integrated_gradients" in message for message in refused.values())
