"""What each kind of target means is the same for numpy and for torch, on its way to a file, a server and a figure."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from espalier.spec import DataSpec
from espalier.targets.kind import TargetKind
from espalier.targets.kinds import kind_of

NAMES = tuple("abcdef")
CLASSES = DataSpec.single("pictures", (3,), 1.0, (0.0,) * 3, (1.0,) * 3, NAMES)
NUMBER = DataSpec.single("houses", (3,), 1.0, (0.0,) * 3, (1.0,) * 3, target_mean=50.0, target_std=8.0)
BOTH = pytest.mark.parametrize("spec", [CLASSES, NUMBER], ids=["classes", "numbers"])


def outputs(spec: DataSpec, num: int = 64) -> torch.Tensor:
    return 3 * torch.randn(num, spec.num_outputs, generator=torch.Generator().manual_seed(0))


def test_every_kind_keeps_the_contract():
    kinds = TargetKind.__subclasses__()
    assert {type(kind_of(spec)) for spec in (CLASSES, NUMBER)} == set(kinds)
    for kind in kinds:
        assert not kind.__abstractmethods__
        assert kind.word
        assert kind.learner
        assert kind.monitor
        assert kind.statistics


@BOTH
def test_what_is_served_is_what_is_measured(spec: DataSpec):
    kind, output = kind_of(spec), outputs(spec)
    answer_NK = kind.answer(output.numpy())
    table = kind.columns(output.numpy(), is_full=True)
    if spec.num_classes:
        torch.testing.assert_close(torch.from_numpy(answer_NK), output.softmax(1))
        assert table["predicted"].tolist() == [NAMES[place] for place in kind.predicted(output).tolist()]
        assert [*table] == ["predicted", "probability", *(f"p_{name}" for name in NAMES)]
    else:
        assert torch.equal(torch.from_numpy(answer_NK[:, 0]), kind.predicted(output))
        assert torch.equal(torch.from_numpy(table["predicted"]), kind.predicted(output))


@BOTH
def test_metrics_of_a_file_are_those_of_torchmetrics(spec: DataSpec):
    kind, output = kind_of(spec), outputs(spec)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(1))
    y = torch.randint(6, (64,), generator=torch.Generator().manual_seed(1)) if spec.num_classes else 50 + 8 * noise
    metrics = {name: metric for name, metric in kind.metrics("val").items() if name in ("accuracy", "rmse", "mae")}
    for metric in metrics.values():
        metric.update(kind.measured(output), y)
    columns = kind.true(y.numpy()), kind.columns(output.numpy(), is_full=False)["predicted"]
    halves = [tuple(column[part] for column in columns) for part in (slice(0, 40), slice(40, 64))]
    expected = {name: pytest.approx(float(metric.compute()), rel=1e-5) for name, metric in metrics.items()}
    assert kind.score(halves) == expected  # type: ignore[arg-type]


@BOTH
def test_the_monitored_metric_and_the_tables_of_a_test_exist(spec: DataSpec):
    kind = kind_of(spec)
    assert kind.monitor.partition("/")[2] in kind.metrics("val")
    assert set(kind.metrics("test")) > set(kind.metrics("val"))


def test_a_reply_has_the_words_of_its_kind():
    assert kind_of(NUMBER).reply([3.5], 0) == {"value": 3.5}
    reply = kind_of(CLASSES).reply([0.1, 0.5, 0.1, 0.1, 0.1, 0.1], 1)
    assert (reply["label"], reply["probability"], [*reply["probabilities"]]) == ("b", 0.5, [*NAMES])


def test_numbers_of_a_network_that_answers_with_nan_stay_nan():
    broken = np.full((1, 6), np.nan, dtype=np.float32)
    assert np.isnan(kind_of(CLASSES).answer(broken)).all()


def test_a_server_needs_no_torch_for_any_kind():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['matplotlib'] = None; import numpy\n"
        "from espalier.spec import DataSpec; from espalier.targets.kinds import kind_of\n"
        "for names in ((), ('a', 'b')):\n"
        "    kind = kind_of(DataSpec.single('data', (3,), 1.0, (0.0,), (1.0,), names))\n"
        "    values = kind.answer(numpy.zeros((1, kind.spec.num_outputs), 'float32'))[0].tolist()\n"
        "    print(kind.said, kind.groups, kind.reply(values, 0))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "one number ('output',) {'value': 0.0}"
