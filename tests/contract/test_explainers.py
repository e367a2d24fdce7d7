"""What every method of explanation promises on every model. A new file is covered without touching this one."""

from pathlib import Path

import pytest
import torch
from test_options import SMALL, options

from espalier.config import compose
from espalier.errors import ConfigError
from espalier.explain import base
from espalier.run import Run

OURS = {"grad_cam", "integrated_gradients", "occlusion", "smooth_grad", "lime", "shap"}


@pytest.mark.parametrize("model", options("model"))
def test_every_model_is_explained_by_every_method_that_says_it_fits(tmp_path: Path, model: str):
    cfg = compose.compose([f"model={model}", *SMALL.get(model, ()), "callbacks=[]", "logger=[]"])
    run = Run(cfg, [], tmp_path, "train")
    batch = run.data.samples(9)
    network = run.model.eval()
    setting = base.Setting(torch.zeros(1, 8, 8), batch.x[1:], 2, None, 8, 4, 0.1, 20, 16, 0)
    fitting, refused = [], {}
    for name in base.methods():
        try:
            own = base.method_named(name).prepare(network, batch.x[0], setting)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        found = base.attribute(name, network, batch.x[0], 3, own)
        assert found.shape == (8, 8)
        assert found.isfinite().all()
        fitting.append(name)
    assert all("\n" not in message for message in refused.values())
    if model in SMALL:
        assert len(OURS.intersection(fitting)) >= 5
        assert OURS.intersection(refused) == ({"grad_cam"} if model in ("mlp", "vit") else set())
        assert all("integrated_gradients" in refused[name] for name in OURS.intersection(refused))
