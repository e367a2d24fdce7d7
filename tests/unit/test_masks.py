from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from espalier.callbacks.ema import EMA, averaged_names
from espalier.compression import base, masks
from espalier.compression.prune_magnitude import PruneMagnitude, keep_mask, keep_masks, sparsity_at
from espalier.compression.prune_nm import PruneNM, keep_nm
from espalier.data.digits import Digits
from espalier.errors import ConfigError
from espalier.learners.classifier import Classifier
from espalier.models.resnet import ResNet
from espalier.models.vit import ViT
from espalier.optim.schedules import constant

BATCHES = 4  # of an epoch
EPOCHS = 3
STEPS = BATCHES * EPOCHS
SPLITS = Digits(64, {}, 0).splits
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
KNOBS = {"sparsity": 0.9, "scope": "global", "start": 0.0, "end": 0.5, "every_n_steps": 1, "skip": [], "rewind": False}


def magnitude(history: Sequence[base.Entry] = (), **knobs: Any) -> PruneMagnitude:
    return with_ledger(PruneMagnitude(**{**KNOBS, **knobs}), history)


def n_of_m(history: Sequence[base.Entry] = (), n: int = 2, m: int = 4, start: float = 0.5) -> PruneNM:
    return with_ledger(PruneNM(n, m, start, skip=[]), history)


def with_ledger(method: Any, history: Sequence[base.Entry]) -> Any:
    method.history, method.is_applied = list(history), bool(history)
    return method


def resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet((1, 8, 8), 10, 8, "cifar", None, 8, "relu", "batch", 0.0)


def learner(model: nn.Module, optimizer: Any = ADAMW) -> Classifier:
    return Classifier(model, SPLITS.spec, optimizer, partial(constant), 0, 0.0, None, False, False, None, None)


def data() -> Digits:
    digits = Digits(64, {}, 0)
    digits.splits = SPLITS
    return digits


def fit(
    folder: Path, net: Classifier, *callbacks: L.Callback, ckpt_path: Path | None = None, **knobs: Any
) -> L.Trainer:
    trainer = L.Trainer(
        **{"max_epochs": EPOCHS, "limit_train_batches": BATCHES, "limit_val_batches": 1, **knobs},
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(net, data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def keeper(folder: Path, **knobs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        **{"dirpath": folder, "filename": "best", "monitor": "val/accuracy", "mode": "max", "save_last": True, **knobs},
        enable_version_counter=False,
    )


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def num_zeros(state: dict[str, Tensor]) -> int:
    """Zeros of all kernels and matrices of a state dict."""
    return sum(int((value == 0).sum()) for name, value in state.items() if name.endswith("weight") and value.ndim > 1)


def num_weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)


class Watch(L.Callback):
    """Calls a function at the end of each step, after the callbacks before it."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer: L.Trainer, net: L.LightningModule, *_: Any) -> None:
        self.seen.append(self.look(trainer, net))


class SaveAt(L.Callback):
    """Writes a checkpoint after one batch."""

    def __init__(self, batch: int, path: Path) -> None:
        self.left, self.path = batch, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            trainer.save_checkpoint(self.path)


# --- which weights go ---------------------------------------------------------------------------------------------


def test_half_of_the_weights_are_zero_and_the_largest_survive():
    mask = keep_mask(torch.tensor([0.1, -3.0, 2.0, -0.2]), sparsity=0.5)
    assert mask.tolist() == [False, True, True, False]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_the_count_is_exact_although_all_magnitudes_are_equal(sparsity):
    mask = keep_mask(torch.ones(10, 37), sparsity)
    assert mask.shape == (10, 37)
    assert int((~mask).sum()) == round(sparsity * 370)
    assert not mask.flatten()[: round(sparsity * 370)].any()  # ties fall in index order


def test_ranked_together_a_layer_of_small_weights_loses_more():
    small, large = keep_masks([torch.tensor([[0.1, 0.4], [0.2, 0.3]]), torch.tensor([5.0, 0.35])], sparsity=0.5)
    assert small.tolist() == [[False, True], [False, False]]
    assert large.tolist() == [True, True]


def test_a_pruned_weight_goes_before_one_that_happens_to_be_zero():
    weight, mask = torch.tensor([0.0, 1.0, 0.0, 2.0]), torch.tensor([True, True, False, True])
    assert keep_mask(masks.magnitude(weight, mask), sparsity=0.25).tolist() == [True, True, False, True]


def test_two_of_four_input_channels_stay_at_each_position_of_a_kernel():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, -1.0, 0.0]])
    assert keep_nm(weight, 2, 4).int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]
    kernel = weight.view(1, 8, 1, 1) * torch.tensor([[1.0, -2.0]])
    assert torch.equal(keep_nm(kernel, 2, 4)[0, :, 0, 1], keep_nm(weight, 2, 4)[0])


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 8)])
def test_every_group_of_m_keeps_its_n_largest(n, m):
    weight = torch.randn(6, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = keep_nm(weight, n, m)
    for out in range(6):
        for row in range(3):
            for first in range(0, 16, m):
                group = weight[out, first : first + m, row, 1].abs()
                kept = mask[out, first : first + m, row, 1]
                assert group[kept].tolist() == [value for value in group.tolist() if value in group.topk(n).values]


# --- when ---------------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_cubic_of_zhu_and_gupta():
    at = partial(sparsity_at, first=10, last=30, initial=0.2, final=0.9)
    assert [at(step) for step in (0, 10, 30, 99)] == [0.2, 0.2, 0.9, 0.9]
    assert at(20) == pytest.approx(0.9 - 0.7 * 0.5**3)
    assert at(15) == pytest.approx(0.9 - 0.7 * 0.75**3)


@pytest.mark.parametrize(("steps", "share"), [(1, 0.0), (1, 1.0), (3, 0.4), (3, 1.0)])
def test_a_very_short_run_still_ends_with_every_zero(tmp_path, steps, share):
    for method in (magnitude(start=share, end=share, every_n_steps=100), n_of_m(start=share)):
        net = learner(resnet())
        fit(tmp_path, net, method, max_steps=steps, max_epochs=-1)
        expected = 0.9 if isinstance(method, PruneMagnitude) else 0.5
        dense = 0 if isinstance(method, PruneMagnitude) else 72  # the first layer has one input channel
        assert num_zeros(net.state_dict()) == round(expected * (num_weights(net.model) - dense))


# --- real runs ----------------------------------------------------------------------------------------------------


def test_zeros_follow_the_schedule_and_never_come_back(tmp_path):
    def look(trainer: L.Trainer, net: Classifier) -> tuple[int, dict[str, Tensor]]:
        state = net.model.state_dict()
        return num_zeros(state), {name: value.clone() for name, value in state.items() if name.endswith("_mask")}

    net, watch = learner(resnet()), Watch(look)
    fit(tmp_path, net, magnitude(), watch)
    total = num_weights(net.model)
    expected = [round(sparsity_at(step, 0, STEPS // 2, 0.0, 0.9) * total) for step in range(STEPS)]
    assert [zeros for zeros, _ in watch.seen] == expected
    for (_, before), (_, after) in zip(watch.seen, watch.seen[1:], strict=False):
        assert not any((after[name] & ~mask).any() for name, mask in before.items())


def test_each_layer_gets_the_same_sparsity_where_that_is_asked_for(tmp_path):
    net = learner(resnet())
    fit(tmp_path, net, magnitude(scope="layer", skip=["stem", "head"]))
    for name, weight in masks.prunable(net.model, []).items():
        expected = 0 if name.startswith(("stem", "head")) else round(0.9 * weight.numel())
        assert int((weight == 0).sum()) == expected


@pytest.mark.parametrize("method", [magnitude, n_of_m])
@pytest.mark.parametrize("optimizer", [ADAMW, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_momentum_and_clipping_leave_zeros_alone(tmp_path, method, optimizer):
    zeros = Watch(lambda trainer, net: [bool(weight[~mask].any()) for weight, mask in masks.masked(net.model).values()])
    net = learner(resnet(), optimizer)
    fit(tmp_path, net, method(), zeros, gradient_clip_val=0.1)
    assert len(zeros.seen) == STEPS
    assert not any(map(any, zeros.seen))


def test_the_gradient_norm_that_is_clipped_is_that_of_the_kept_weights(tmp_path):
    norms = []

    class Norm(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, net: L.LightningModule, optimizer: Any) -> None:
            pairs = masks.masked(net.model).values()
            norms.append([bool(weight.grad[~mask].any()) for weight, mask in pairs])

    fit(tmp_path, learner(resnet()), magnitude(), Norm())
    assert len(norms) == STEPS
    assert not any(map(any, norms))


@pytest.mark.parametrize("with_ema", [False, True])
def test_best_and_last_checkpoint_have_exactly_the_zeros_that_were_asked_for(tmp_path, with_ema):
    net = learner(resnet())
    trainer = fit(tmp_path, net, magnitude(), *[EMA(0.9, 1)] * with_ema, keeper(tmp_path))
    expected = round(0.9 * num_weights(net.model))
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "best.ckpt")
    for file in ("best.ckpt", "last.ckpt"):
        assert num_zeros(saved(tmp_path / file)["state_dict"]) == expected
    assert num_zeros(net.state_dict()) == expected  # with EMA, the average


def test_a_better_checkpoint_with_fewer_zeros_does_not_win(tmp_path):
    class Best(L.Callback):
        """Reports a value that is best in the first epoch."""

        def on_validation_epoch_end(self, trainer: L.Trainer, net: L.LightningModule) -> None:
            net.log("worse", -float(trainer.current_epoch))

    keep = keeper(tmp_path, monitor="worse", save_top_k=3, filename="best-{epoch}")
    trainer = fit(tmp_path, learner(resnet()), magnitude(), Best(), keep)
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "best-epoch=1.ckpt")  # final from step 6 of 12
    assert sorted(path.name for path in tmp_path.glob("best*")) == ["best-epoch=1.ckpt", "best-epoch=2.ckpt"]


def test_there_is_no_best_checkpoint_where_none_was_written_since_the_last_zeros(tmp_path):
    trainer = fit(tmp_path, learner(resnet()), n_of_m(start=0.9), keeper(tmp_path), check_val_every_n_epoch=2)
    assert trainer.checkpoint_callback.best_model_path == ""
    assert not (tmp_path / "best.ckpt").exists()


# while zeros grow, just after the last ones, and later
@pytest.mark.parametrize(("batch", "accumulate"), [(3, 1), (3, 2), (7, 2), (10, 1)])
@pytest.mark.parametrize("method", [magnitude, partial(magnitude, rewind=True), n_of_m])
def test_a_resumed_run_ends_bit_equal_to_an_unbroken_one(tmp_path, method, batch, accumulate):
    settings = {"accumulate_grad_batches": accumulate, "limit_train_batches": BATCHES * accumulate}
    unbroken, whole = learner(resnet()), method()
    average = [] if getattr(whole, "rewind", False) else [EMA(0.9, 1)]
    fit(tmp_path, unbroken, whole, *average, SaveAt(batch * accumulate, tmp_path / "middle.ckpt"), **settings)

    resumed = learner(base.replay(resnet(), whole.history))
    average = [EMA(0.9, 1)] if average else []
    fit(tmp_path, resumed, method(whole.history), *average, ckpt_path=tmp_path / "middle.ckpt", **settings)
    assert unbroken.state_dict().keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in unbroken.state_dict().items())
    assert num_zeros(resumed.state_dict()) > 1000


def test_rewinding_gives_what_is_kept_its_first_values_and_the_optimizer_a_fresh_start(tmp_path):
    first = resnet().state_dict()

    class Start(L.Callback):
        """Looks at the network where the first step under the final masks begins."""

        def on_train_batch_start(self, trainer: L.Trainer, net: Classifier, *_: Any) -> None:
            if trainer.global_step == STEPS // 2:
                self.weights = {name: value.clone() for name, value in net.model.named_parameters()}
                self.optimizer = dict(trainer.optimizers[0].state)

    net, start = learner(resnet()), Start()
    fit(tmp_path, net, magnitude(rewind=True), start)
    state = net.model.state_dict()
    for name, value in start.weights.items():
        assert torch.equal(value, first[name] * state.get(f"{name}_mask", torch.tensor(True)))
    assert not start.optimizer
    assert num_zeros(start.weights) == round(0.9 * num_weights(net.model))


def test_a_sparse_network_keeps_its_zeros_and_the_schedule_starts_from_them(tmp_path):
    sparse = learner(resnet())
    first = n_of_m(start=0.0)
    fit(tmp_path, sparse, first, max_epochs=1)
    before = {name: mask.clone() for name, (_, mask) in masks.masked(sparse.model).items()}

    zeros = Watch(lambda trainer, net: num_zeros(net.model.state_dict()))
    second = magnitude(end=1.0)
    second.history = list(first.history)
    fit(tmp_path, learner(sparse.model), second, zeros)
    assert [entry["method"] for entry in second.history] == ["prune_nm", "prune_magnitude"]
    total = num_weights(sparse.model)
    start = (total - 72) / 2 / total
    assert zeros.seen == [round(sparsity_at(step, 0, STEPS - 1, start, 0.9) * total) for step in range(STEPS)]
    after = masks.masked(sparse.model)
    assert not any((after[name][1] & ~mask).any() for name, mask in before.items())


def test_a_layer_that_is_sparser_than_asked_for_stays_so():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    pruning = magnitude(scope="layer", sparsity=0.8)
    pruning.apply(model)
    pruning.pairs = masks.masked(model)
    masks.prune(pruning.pairs.values(), [keep_mask(model[0].weight, 0.9), keep_mask(model[1].weight, 0.1)])
    masks.prune(pruning.pairs.values(), pruning.keeps(0.8))
    assert [int((~mask).sum()) for _, mask in pruning.pairs.values()] == [90, 80]


def test_a_layer_of_which_nothing_is_left_is_named(tmp_path, caplog):
    model = resnet()
    with torch.no_grad():
        model.head.weight.mul_(1e-6)
    fit(tmp_path, learner(model), magnitude(end=0.0))
    assert "nothing is left of head.weight; " in caplog.text


def test_zeros_of_a_source_survive_a_recipe_without_masks(tmp_path):
    model = resnet()
    masks.attach(model, masks.prunable(model, []))
    masks.prune(masks.masked(model).values(), [keep_mask(w, 0.7) for w, _ in masks.masked(model).values()])
    before = num_zeros(model.state_dict())
    net = learner(model)
    fit(tmp_path, net, masks.KeepMasks(), EMA(0.9, 1))
    assert num_zeros(net.state_dict()) == before > 0.69 * num_weights(model)


def test_the_average_of_weights_is_masked_even_where_it_was_not_updated_since(tmp_path):
    net = learner(resnet())
    save = SaveAt(STEPS // 2 + 2, tmp_path / "middle.ckpt")
    fit(tmp_path, net, magnitude(), save, EMA(0.99, every_n_steps=1000))
    content = saved(tmp_path / "middle.ckpt")
    expected = round(0.9 * num_weights(net.model))
    assert num_zeros(content["state_dict"]) == num_zeros(content["ema"]["raw"]) == expected
    kept = content["state_dict"]["model.head.weight_mask"]
    assert torch.equal(content["state_dict"]["model.head.weight"][kept], resnet().head.weight[kept])  # the first values


def test_statistics_are_averaged_in_a_captured_network_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    captured = torch.export.export(model, (torch.zeros(2, 2),)).module()
    assert sorted(averaged_names(captured)) == sorted(averaged_names(model))
    assert {"1.running_mean", "1.running_var"} <= set(averaged_names(captured))


# --- structure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [magnitude, n_of_m])
def test_a_checkpoint_replays_to_the_last_bit_and_folds_to_a_plain_network(tmp_path, method):
    net, pruning = learner(resnet()), method()
    fit(tmp_path, net, pruning, keeper(tmp_path))
    weights = {
        name.removeprefix("model."): value for name, value in saved(tmp_path / "last.ckpt")["state_dict"].items()
    }
    history = pruning.history
    torch.save(history, tmp_path / "history.pt")
    replayed = base.replay(resnet(), saved(tmp_path / "history.pt"))
    replayed.load_state_dict(weights)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = net.model.eval()(x)
    assert torch.equal(replayed.eval()(x), expected)
    folded = base.finalize(replayed, history)
    assert folded.state_dict().keys() == resnet().state_dict().keys()
    assert torch.equal(folded(x), expected)
    assert num_zeros(folded.state_dict()) == num_zeros(weights)


def test_masks_are_found_in_a_captured_network_under_the_same_names():
    model = resnet()
    names = list(masks.prunable(model, ["head"]))
    masks.attach(model, names)
    captured = torch.export.export(model, (torch.zeros(2, 1, 8, 8),)).module()
    assert sorted(masks.masked(captured)) == sorted(names)
    assert sorted(masks.prunable(captured, ["head"])) == sorted(names)


def test_kernels_and_matrices_are_prunable_and_nothing_else():
    names = masks.prunable(ViT((1, 8, 8), 10, 2, 16, 1, 2, 2, "token", "gelu", "layer", 0.0), [])
    assert sorted(names) == sorted(
        f"{name}.weight"
        for name, module in ViT((1, 8, 8), 10, 2, 16, 1, 2, 2, "token", "gelu", "layer", 0.0).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    )


def test_attaching_again_changes_no_mask():
    model = nn.Sequential(nn.Linear(2, 2))
    masks.attach(model, ["0.weight"])
    model[0].weight_mask[0, 0] = False
    masks.attach(model, ["0.weight"])
    assert model[0].weight_mask.tolist() == [[False, True], [True, True]]


def test_sparsity_is_counted_over_all_tensors_together():
    assert masks.sparsity([torch.tensor([0.0, 1.0, -0.0]), torch.tensor([[True, True, True, False, False]])]) == 0.5


# --- wrong inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: magnitude(start=0.6), r"prune_magnitude.start=0.6: must not be above end=0.5"),
        (lambda: magnitude(skip=["haed"]).require(resnet()), r"skip=haed: .*; did you mean head\?"),
        (lambda: magnitude(skip=["stem", "stages", "head"]).require(resnet()), r"skip fewer"),
        (lambda: n_of_m(n=4), r"prune_nm.n=4: must be below m=4"),
        (lambda: n_of_m(m=7).require(resnet()), r"prune_nm.m=7: .*use compression=\[prune_magnitude\]"),
    ],
)
def test_wrong_knobs_end_in_one_line(wrong, message):
    with pytest.raises(ConfigError, match=message):
        wrong()


def test_more_zeros_than_are_asked_for_cannot_be_undone():
    model = resnet()
    magnitude().apply(model)
    pairs = masks.masked(model).values()
    masks.prune(pairs, [keep_mask(weight, 0.9) for weight, _ in pairs])
    with pytest.raises(ConfigError, match=r"sparsity=0.5: the source has 0.9"):
        magnitude(sparsity=0.5).apply(model)


@pytest.mark.parametrize("method", [magnitude, n_of_m])
def test_what_may_end_the_run_early_is_refused(tmp_path, method):
    with pytest.raises(ConfigError, match=r"callbacks.early_stopping: .*compression.prune"):
        fit(tmp_path, learner(resnet()), method(), EarlyStopping("val/accuracy"))
    with pytest.raises(ConfigError, match=r"trainer.max_time: .*use trainer.max_epochs"):
        fit(tmp_path, learner(resnet()), method(), max_time="00:01:00:00")


def test_an_average_cannot_be_rewound(tmp_path):
    with pytest.raises(ConfigError, match=r"rewind=true: .*drop callbacks.ema"):
        fit(tmp_path, learner(resnet()), magnitude(rewind=True), EMA(0.9, 1))
