import io
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn

from espalier.callbacks import ema
from espalier.callbacks.ema import EMA
from espalier.callbacks.monitor import Monitor
from espalier.callbacks.progress import Progress
from espalier.callbacks.summary import Summary, parts
from espalier.compression.graph_module import capture
from espalier.compression.quantized_graph import prepare
from espalier.compression.quantizer import OnnxRuntimeQuantizer
from espalier.errors import ConfigError
from espalier.models.resnet import ResNet
from espalier.profiling.cost import count_macs, count_params
from espalier.runs.checkpoint import CheckpointIO
from espalier.spec import DataSpec, of_shape

CONF = Path(__file__).parents[2] / "conf"
CALLS_PER_STEP = 25  # what a watching callback may cost
BATCH_SIZE = 8


class Batch(NamedTuple):
    x: Tensor
    y: Tensor
    index: Tensor


def batch() -> Batch:
    x = torch.randn(BATCH_SIZE, 4, generator=torch.Generator().manual_seed(1))
    return Batch(x, x[:, :3].argmax(1), torch.arange(BATCH_SIZE))


class Batches:
    """The same batch over and over, so that a resumed run sees what an unbroken one sees."""

    def __init__(self, num: int, delay: float = 0.0) -> None:
        self.num, self.delay, self.batch = num, delay, batch()

    def __len__(self) -> int:
        return self.num

    def __iter__(self):
        for _ in range(self.num):
            time.sleep(self.delay)
            yield self.batch


SPEC = DataSpec.single("toy", (4,), 1.0, (0.0,) * 4, (1.0,) * 4, ("a", "b", "c"), (1, 1, 1))


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.example_input_array = (torch.zeros(2, 4),)
        self.last_loss: Tensor | None = None
        self.validated: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(batch.x), batch.y)
        self.last_loss = loss.detach()
        return loss

    def on_train_epoch_end(self) -> None:
        if self.last_loss is not None:  # resumed after the last step of an epoch
            self.log("train/loss", self.last_loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(self.model[0].weight.detach().clone())
        self.log("val/loss", nn.functional.cross_entropy(self.model(batch.x), batch.y), batch_size=BATCH_SIZE)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test/loss", nn.functional.cross_entropy(self.model(batch.x), batch.y), batch_size=BATCH_SIZE)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Memory(Logger):
    """Keeps what was logged."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, metrics))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        return None


def trainer(folder: Path, *callbacks: L.Callback, **knobs: Any) -> L.Trainer:
    return L.Trainer(
        **{"max_epochs": 2, "logger": False, **knobs},
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        num_sanity_val_steps=0,
    )


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# --- configuration ------------------------------------------------------------------------------------------------


def composed(folder: Path, *words: str) -> DictConfig:
    """The two groups alone, so that no other group decides whether this passes."""
    groups = "  - callbacks: [default]\n  - logger: [csv, wandb]\n  - _self_\n"
    (folder / "config.yaml").write_text(f"defaults:\n{groups}hydra:\n  searchpath: ['file://{CONF}']\n")
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("config", list(words))


def test_options_compose_as_a_list_and_each_owns_its_name(tmp_path):
    cfg = composed(tmp_path, "callbacks=[default,ema,early_stopping]", "callbacks.checkpoint.save_top_k=3")
    assert list(cfg.callbacks) == ["checkpoint", "progress", "summary", "monitor", "ema", "early_stopping"]
    assert cfg.callbacks.checkpoint.save_top_k == 3


@pytest.mark.parametrize("nothing", ["callbacks=[]", "callbacks=none"])
def test_there_may_be_no_callback_at_all(tmp_path, nothing):
    assert not composed(tmp_path, nothing).get("callbacks")


def test_every_option_builds_and_says_in_its_first_line_what_it_is(tmp_path):
    options = sorted(file.stem for file in (CONF / "callbacks").glob("*.yaml"))
    assert len(options) >= 8
    for option in options:
        assert (CONF / "callbacks" / f"{option}.yaml").read_text().startswith("# ")
    names = [option for option in options if option not in {"default", "none"}]
    cfg = composed(tmp_path, f"callbacks=[{','.join(names)}]")
    assert sorted(cfg.callbacks) == names
    for name, node in cfg.callbacks.items():
        best = {"monitor": "val/loss", "mode": "min", "dirpath": tmp_path}
        supplied = {"early_stopping": {"monitor": "val/loss"}, "checkpoint": best}.get(name, {})
        assert isinstance(instantiate(node, **supplied, _convert_="all"), L.Callback)


@pytest.mark.parametrize(("mode", "is_best"), [("min", True), ("max", False)])
def test_the_last_checkpoint_is_the_file_of_the_best_where_they_are_the_same(tmp_path, mode, is_best):
    """The loss falls with every epoch."""
    node, folder = composed(tmp_path).callbacks.checkpoint, tmp_path / "checkpoints"
    keeper = instantiate(node, dirpath=folder, monitor="val/loss", mode=mode, _convert_="all")
    trainer(tmp_path, keeper, max_epochs=3, plugins=[CheckpointIO({}, SPEC, [])]).fit(Net(), Batches(2), Batches(1))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["BEST", "SHA256SUMS", "best.ckpt", "last.ckpt", "previous.ckpt"]
    assert (folder / "BEST").read_text() == "best.ckpt\n"
    assert (folder / "best.ckpt").samefile(folder / "last.ckpt") == is_best
    assert [saved(folder / name)["epoch"] for name in names[2:]] == [2 if is_best else 0, 2, 1]


# --- exponential moving average -----------------------------------------------------------------------------------


def test_the_average_moves_by_one_minus_decay_towards_the_weights():
    average, current = [torch.tensor([1.0, 2.0])], [torch.tensor([5.0, 0.0])]
    ema.update(average, current, decay=0.75)
    assert average[0].tolist() == [2.0, 1.5]
    assert current[0].tolist() == [5.0, 0.0]


def test_decay_starts_low_and_ends_at_its_value():
    assert [ema.decay_at(step, 0.9) for step in (0, 8, 1000)] == [0.1, 0.5, 0.9]


def test_parameters_and_batch_norm_statistics_are_averaged_but_no_other_buffer():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.ones(2))
    assert ema.averaged_names(model) == [
        *("0.weight", "0.bias", "1.weight", "1.bias"),
        *("1.running_mean", "1.running_var"),
    ]


class Recorder(L.Callback):
    """Raw weights of the first layer after every step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, learner: L.LightningModule, *_: Any) -> None:
        self.weights.append(learner.model[0].weight.detach().clone())


def test_validation_and_the_trained_learner_use_the_average_of_all_steps(tmp_path):
    recorder, net = Recorder(), Net()
    average = net.model[0].weight.detach().clone()
    trainer(tmp_path, recorder, EMA(decay=0.5, every_n_steps=1)).fit(net, Batches(5), Batches(1))
    assert len(recorder.weights) == 10
    expected = []
    for step, weight in enumerate(recorder.weights, start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        expected.append(average)
    torch.testing.assert_close(net.validated[0], expected[4])
    torch.testing.assert_close(net.validated[1], expected[9])
    torch.testing.assert_close(net.model[0].weight.detach(), expected[9])


def test_the_average_of_a_network_in_16_bits_reaches_the_weights_and_leaves_them_as_they_are():
    net, average = Net().bfloat16(), EMA(decay=0.999, every_n_steps=1)
    average.on_train_start(SimpleNamespace(global_step=0), net)
    weight = net.model[0].weight
    with torch.no_grad():
        weight.fill_(1.203125)
    for step in range(1, 10_000):
        average._catch_up(step)
    assert float(average.average[0].min()) == pytest.approx(1.203125, abs=1e-4)
    exact = [tensor.clone() for tensor in average.average]
    average._show(average=True)
    average._show(average=False)
    assert torch.equal(weight, torch.full_like(weight, 1.203125))
    assert all(map(torch.equal, average.average, exact))
    assert average.average[0].dtype == torch.float32


def test_a_checkpoint_holds_the_average_under_plain_names_and_loads_safely(tmp_path):
    net = Net()
    keeper = ModelCheckpoint(tmp_path, filename="best", save_last=True, enable_version_counter=False)
    trainer(tmp_path, EMA(decay=0.5, every_n_steps=1), keeper).fit(net, Batches(5), Batches(1))
    content = saved(tmp_path / "last.ckpt")
    assert content["state_dict"].keys() == Net().state_dict().keys()
    assert torch.equal(content["state_dict"]["model.0.weight"], net.validated[-1])
    assert not torch.equal(content["ema"]["raw"]["model.0.weight"], net.validated[-1])


class SaveAt(L.Callback):
    """Writes a checkpoint at one place of the run."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.step, self.path = step, path
        setattr(self, hook, self.save)

    def save(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("hook", "step", "is_first"),
    [
        ("on_train_batch_end", 3, False),
        ("on_train_batch_end", 3, True),  # between the optimizer's step and the update of the average
        ("on_validation_batch_end", 5, False),  # while the learner holds the average
        ("on_train_epoch_end", 5, False),
    ],
)
def test_a_resumed_run_ends_bit_equal_to_an_unbroken_one(tmp_path, hook, step, is_first):
    average = EMA(decay=0.9, every_n_steps=1)
    save = SaveAt(hook, step, tmp_path / "middle.ckpt")
    unbroken = Net()
    whole = trainer(tmp_path, *((save, average) if is_first else (average, save)), max_epochs=3)
    whole.fit(unbroken, Batches(5), Batches(1))

    resumed = Net()
    rest = trainer(tmp_path, EMA(decay=0.9, every_n_steps=1), max_epochs=3)
    rest.fit(resumed, Batches(5), Batches(1), ckpt_path=tmp_path / "middle.ckpt", weights_only=True)

    assert rest.global_step == whole.global_step == 15
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in unbroken.state_dict().items())


def test_a_sharding_strategy_is_refused_with_the_way_out(tmp_path):
    from lightning.pytorch.strategies import ModelParallelStrategy

    sharded = type("T", (), {"strategy": ModelParallelStrategy()})()
    with pytest.raises(ConfigError, match="strategy=ddp"):
        EMA(decay=0.9, every_n_steps=1).setup(sharded, Net(), "fit")


# --- monitor ------------------------------------------------------------------------------------------------------


def test_learning_rate_and_throughput_are_logged_every_n_steps(tmp_path):
    memory = Memory()
    trainer(tmp_path, Monitor(), logger=memory, log_every_n_steps=4).fit(Net(), Batches(6), Batches(1))
    rows = [(step, metrics) for step, metrics in memory.logged if "lr" in metrics]
    assert [step for step, _ in rows] == [4, 8, 12]
    assert all(metrics.keys() == {"lr", "samples_per_second", "data_wait_share"} for _, metrics in rows)
    assert all(metrics["lr"] == 0.1 for _, metrics in rows)


def test_time_spent_in_a_slow_loader_is_reported_as_waiting(tmp_path):
    memory, monitor = Memory(), Monitor()
    fit = trainer(tmp_path, monitor, logger=memory, log_every_n_steps=5, max_epochs=1)
    fit.fit(Net(), Batches(10, delay=0.03))
    last = [metrics for _, metrics in memory.logged if "lr" in metrics][-1]
    assert last["data_wait_share"] > 0.5
    assert last["samples_per_second"] < BATCH_SIZE / 0.03


def test_totals_count_every_sample_and_leave_validation_out_of_the_throughput(tmp_path):
    monitor = Monitor()
    trainer(tmp_path, monitor).fit(Net(), Batches(3), Batches(4, delay=0.05))
    assert monitor.samples == 2 * 3 * BATCH_SIZE
    assert monitor.train_seconds > 0.4  # two validations of four batches of 50 ms
    assert monitor.seconds < monitor.train_seconds - 0.4
    assert monitor.samples_per_second == monitor.samples / monitor.seconds


def test_totals_of_a_resumed_run_include_the_part_before(tmp_path):
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    first = Monitor()
    trainer(tmp_path, first, keeper, max_epochs=1).fit(Net(), Batches(3, delay=0.05))
    second = Monitor()
    rest = trainer(tmp_path, second, max_epochs=2)
    rest.fit(Net(), Batches(3), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert second.samples == 2 * 3 * BATCH_SIZE
    assert second.train_seconds > 0.15


# --- progress -----------------------------------------------------------------------------------------------------


def progress(*, is_terminal: bool) -> tuple[Progress, io.StringIO]:
    written = io.StringIO()
    bar = Progress(refreshes_per_second=10.0)
    bar.console = Console(file=written, force_terminal=is_terminal, soft_wrap=True, highlight=False, width=120)
    return bar, written


def test_a_file_gets_one_plain_line_per_epoch(tmp_path):
    bar, written = progress(is_terminal=False)
    fit = trainer(tmp_path, bar, max_epochs=3)
    net = Net()
    fit.fit(net, Batches(2), Batches(1))
    fit.test(net, Batches(1), verbose=False)
    lines = written.getvalue().splitlines()
    assert [line[:9] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    last = lines[-1].split()
    assert last[2::2][:2] == ["train/loss", "val/loss"]
    assert float(last[3]) == pytest.approx(float(fit.callback_metrics.get("train/loss", net.last_loss)), rel=1e-3)
    assert last[-1] == "s"


def test_an_epoch_without_a_validation_repeats_no_old_numbers(tmp_path):
    bar, written = progress(is_terminal=False)
    trainer(tmp_path, bar, max_epochs=4, check_val_every_n_epoch=2).fit(Net(), Batches(2), Batches(1))
    assert ["val/loss" in line for line in written.getvalue().splitlines()] == [False, True, False, True]


def test_a_terminal_is_redrawn_by_the_clock_and_shows_the_loss(tmp_path, monkeypatch):
    bar, written = progress(is_terminal=True)
    redraws = []
    redraw = bar._redraw
    monkeypatch.setattr(bar, "_redraw", lambda *args: (redraws.append(args), redraw(*args)))
    started = time.monotonic()
    trainer(tmp_path, bar, max_epochs=1).fit(Net(), Batches(300))
    assert 1 <= len(redraws) <= 10 * (time.monotonic() - started) + 2
    assert len(redraws) < 100
    assert "loss" in written.getvalue()
    assert bar.bar is None  # stopped: the cursor is back


def test_an_exception_gives_the_terminal_back(tmp_path):
    bar, written = progress(is_terminal=True)

    class Broken(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, bar).fit(Broken(), Batches(2))
    assert bar.bar is None
    hidden, shown = (written.getvalue().rfind(f"\x1b[?25{end}") for end in "lh")
    assert shown > hidden >= 0


# --- cost of watching ---------------------------------------------------------------------------------------------


def calls_per_step(folder: Path, *callbacks: L.Callback) -> float:
    """Python calls of one more step, without what a fit costs once."""
    return (_calls(folder, 150, *callbacks) - _calls(folder, 50, *callbacks)) / 100


def _calls(folder: Path, steps: int, *callbacks: L.Callback) -> int:
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    fit = trainer(folder, *callbacks, max_epochs=1, logger=Memory(), log_every_n_steps=10)
    net, batches = Net(), Batches(steps)
    sys.setprofile(note)
    try:
        fit.fit(net, batches)
    finally:
        sys.setprofile(None)
    return count


class Idle(L.Callback):
    """What Lightning itself spends on any callback."""


@pytest.mark.parametrize("watcher", ["monitor", "progress"])
def test_watching_costs_few_calls_per_step(tmp_path, watcher):
    bar, _ = progress(is_terminal=True)
    bar.interval = 1000.0  # the price between two redraws
    callback = Monitor() if watcher == "monitor" else bar
    _calls(tmp_path, 1, callback, Idle())  # imports and caches
    extra = calls_per_step(tmp_path, callback) - calls_per_step(tmp_path, Idle())
    assert extra < CALLS_PER_STEP


# --- summary ------------------------------------------------------------------------------------------------------


def test_the_summary_shows_shapes_parameters_and_macs_of_each_part():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Flatten(), nn.Linear(8 * 6 * 6, 10)))
    whole, convolution, head = parts(model, [torch.zeros(1, 3, 8, 8)], depth=1)
    assert (convolution.name, convolution.kind, convolution.output_shape) == ("0", "Conv2d", (8, 6, 6))
    assert (convolution.params, convolution.macs) == (3 * 9 * 8 + 8, 36 * 27 * 8)
    assert (head.params, head.macs, head.output_shape) == (288 * 10 + 10, 2880, (10,))
    assert whole.macs == convolution.macs + head.macs


def test_depth_decides_how_far_the_summary_looks_in():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1))
    assert [part.name for part in parts(model, [torch.zeros(1, 2)], depth=1)] == ["", "0", "1"]
    assert [part.name for part in parts(model, [torch.zeros(1, 2)], depth=2)] == ["", "0", "0.0", "0.1", "1"]


def test_the_summary_lists_no_part_that_is_neither_called_nor_has_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].observer = nn.Identity()
    assert [part.name for part in parts(model, [torch.zeros(1, 2)], depth=2)] == ["", "0", "1"]


def test_the_summary_of_a_graph_lists_its_layers_without_quantizers_and_claims_no_macs_for_them():
    network = ResNet((1, 8, 8), 10, 8, "cifar", None, 8, "relu", "batch", 0.0)
    params = {name: count_params(module) for name, module in network.named_children()}
    macs = count_macs(network, of_shape((1, 8, 8)))
    graph = prepare(capture(network, of_shape((1, 8, 8))), OnnxRuntimeQuantizer([]))
    whole, *layers = parts(graph, [torch.zeros(1, 1, 8, 8)], depth=1)
    assert (whole.kind, whole.macs, whole.output_shape) == ("ResNet as a graph", macs, (10,))
    assert {part.name: part.params for part in layers} == {name: num for name, num in params.items() if num}
    assert [part.cells[-1] for part in layers] == [""] * 3


def test_a_fit_starts_with_the_summary(tmp_path, capsys):
    trainer(tmp_path, Summary(depth=1), max_epochs=1).fit(Net(), Batches(1))
    [total] = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["total"]]
    assert total == ["total", "Sequential", "3", str(4 * 8 + 8 + 2 * 8 + 8 * 3 + 3), str(4 * 8 + 8 * 3)]
