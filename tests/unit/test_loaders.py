"""Loaders: keyed order, sharding, exact resume under a real Trainer, and how little they do per batch."""

import cProfile
import multiprocessing
import pstats
from dataclasses import dataclass
from itertools import chain

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from espalier import seeding
from espalier.data.augment import Crop, Flip
from espalier.data.loaders import Batch, BatchLoader, Loader, Order, Samples, StreamLoader
from espalier.data.mixing import Mixup
from espalier.data.module import DataModule, Splits
from espalier.data.splits import statistics
from espalier.errors import ConfigError
from espalier.spec import DataSpec

CPU = torch.device("cpu")
NUM_TRAIN, NUM_VAL, BATCH_SIZE = 53, 11, 8
STEPS_PER_EPOCH = NUM_TRAIN // BATCH_SIZE


class Pieces:
    """A reader of tensors, as a data set on disk would be."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> Samples:
        return Samples(self.samples.x[indices], self.samples.y[indices])


class Pictures(DataModule):
    """Random images that fit in memory (`num_workers` None) or are read by workers."""

    def __init__(self, num_workers: int | None, augment=None, seed: int = 3) -> None:
        super().__init__(BATCH_SIZE, seed, augment or {}, num_workers or 0)
        self.is_streamed = num_workers is not None

    def load(self) -> Splits:
        x = torch.randint(0, 256, (NUM_TRAIN + NUM_VAL, 1, 6, 6), generator=seeding.generator(8), dtype=torch.uint8)
        y = torch.arange(len(x)) % 3
        train, val = Samples(x[:NUM_TRAIN], y[:NUM_TRAIN]), Samples(x[NUM_TRAIN:], y[NUM_TRAIN:])
        mean, std = statistics(train.x, 255)
        spec = DataSpec.single("pictures", (1, 6, 6), 255.0, mean, std, ("a", "b", "c"), (18, 18, 17))
        if self.is_streamed:
            return Splits(spec, Pieces(train), Pieces(val), Pieces(val))
        return Splits(spec, train, val, val)


class Probe(L.LightningModule):
    """Trains one layer and writes down every batch it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(36, 3)
        self.trace: list[tuple[int, int, Tensor, Tensor, Tensor]] = []
        self.evaluated: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trace.append((self.current_epoch, batch_idx, batch.index.clone(), batch.x.clone(), batch.y.clone()))
        return nn.functional.cross_entropy(self.layer(batch.x.flatten(1)), batch.y)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluated.append(batch.index)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@dataclass
class Fit:
    probe: Probe
    checkpoints: ModelCheckpoint


def fit(folder, num_workers, augment, max_epochs: int, ckpt_path=None, limit: int | None = None) -> Fit:
    """Train with fresh objects; a checkpoint after every second step."""
    torch.manual_seed(0)
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    probe = Probe()
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[checkpoints],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        limit_train_batches=limit,
    )
    trainer.fit(probe, datamodule=Pictures(num_workers, augment), ckpt_path=ckpt_path, weights_only=True)
    return Fit(probe, checkpoints)


def assert_same_trace(one, other) -> None:
    assert [(epoch, batch) for epoch, batch, *_ in one] == [(epoch, batch) for epoch, batch, *_ in other]
    for (*_, index, x, y), (*_, other_index, other_x, other_y) in zip(one, other, strict=True):
        assert torch.equal(index, other_index)
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def indices(loader: Loader) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


@pytest.mark.parametrize("num_workers", [None, 0, 2], ids=["in memory", "0 workers", "2 workers"])
@pytest.mark.parametrize("step", [4, 6, 8], ids=["mid-epoch", "end of epoch", "second epoch"])
def test_a_resumed_run_sees_the_batches_that_were_missing(tmp_path, num_workers, step):
    augment = {"crop": Crop(padding=0.2), "flip": Flip(probability=0.5), "mixup": Mixup(1.0, 1.0)}
    unbroken = fit(tmp_path / "unbroken", num_workers, augment, max_epochs=3).probe
    assert len(unbroken.trace) == 3 * STEPS_PER_EPOCH
    resumed = fit(tmp_path / "resumed", num_workers, augment, 3, tmp_path / "unbroken" / f"step={step}.ckpt").probe
    assert_same_trace(resumed.trace, unbroken.trace[step:])
    assert torch.equal(resumed.layer.weight, unbroken.layer.weight)


def test_a_run_resumed_twice_still_sees_every_batch_once(tmp_path):
    unbroken = fit(tmp_path / "unbroken", None, {}, max_epochs=2).probe
    fit(tmp_path / "second", None, {}, 2, tmp_path / "unbroken" / "step=2.ckpt")
    resumed = fit(tmp_path / "third", None, {}, 2, tmp_path / "second" / "step=4.ckpt").probe
    assert_same_trace(resumed.trace, unbroken.trace[4:])


def test_a_resumed_run_with_shortened_epochs_starts_the_next_epoch_whole(tmp_path):
    unbroken = fit(tmp_path / "unbroken", None, {}, max_epochs=3, limit=4).probe
    resumed = fit(tmp_path / "resumed", None, {}, 3, tmp_path / "unbroken" / "step=4.ckpt", limit=4).probe
    assert_same_trace(resumed.trace, unbroken.trace[4:])


def test_memory_and_stream_give_the_same_batches(tmp_path):
    augment = {"crop": Crop(padding=0.2)}
    in_memory = fit(tmp_path / "memory", None, augment, max_epochs=2).probe
    streamed = fit(tmp_path / "stream", 0, augment, max_epochs=2).probe
    assert_same_trace(in_memory.trace, streamed.trace)


def test_validation_in_a_trainer_sees_every_sample_once(tmp_path):
    probe = fit(tmp_path, None, {}, max_epochs=1).probe
    assert torch.cat(probe.evaluated).tolist() == list(range(NUM_VAL))


def test_epochs_differ_and_each_takes_no_sample_twice(tmp_path):
    trace = fit(tmp_path, None, {}, max_epochs=2).probe.trace
    first, second = (torch.cat([row[2] for row in trace if row[0] == epoch]).tolist() for epoch in (0, 1))
    assert len(set(first)) == len(first) == STEPS_PER_EPOCH * BATCH_SIZE
    assert first != second


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = {}
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        order = Order(40, 10, seed, rank=0, world_size=1)
        order.set_epoch(epoch)
        orders[seed, epoch] = [batch.tolist() for batch in order.batches(CPU)]
    again = Order(40, 10, 0, rank=0, world_size=1)
    assert [batch.tolist() for batch in again.batches(CPU)] == orders[0, 0]
    assert orders[0, 0] != orders[0, 1]
    assert orders[0, 0] != orders[1, 0]
    assert sorted(chain(*orders[0, 1])) == list(range(40))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_see_the_batches_of_one_process_with_the_global_batch_size(world_size):
    ranks = [Order(50, 4, 0, rank, world_size).batches(CPU) for rank in range(world_size)]
    together = [torch.cat(parts).tolist() for parts in zip(*ranks, strict=True)]
    alone = Order(50, 4 * world_size, 0, rank=0, world_size=1).batches(CPU)
    assert together == [batch.tolist() for batch in alone]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [24, 25, 35, 1])
def test_evaluation_loses_and_repeats_no_sample_on_any_number_of_ranks(world_size, num_samples):
    orders = [Order(num_samples, 4, None, rank, world_size) for rank in range(world_size)]
    ranks = [order.batches(CPU) for order in orders]
    assert [len(batches) for batches in ranks] == [len(orders[0])] * world_size
    seen = torch.cat([batch for batches in ranks for batch in batches]).tolist()
    assert sorted(seen) == list(range(num_samples))
    assert all(len(batch) <= 4 for batches in ranks for batch in batches)


@pytest.mark.parametrize("num_workers", [None, 0], ids=["in memory", "streamed"])
def test_a_rank_without_samples_gets_an_empty_batch_of_the_right_shape(num_workers):
    data = Pictures(num_workers)
    data._place = lambda: (2, 3, CPU)
    data.batch_size = 3  # 9 + 2 samples for three ranks
    last = list(data.val_dataloader())[-1]
    assert last.x.shape == (0, 1, 6, 6)
    assert len(last.y) == len(last.index) == 0


def test_more_samples_per_global_batch_than_there_are_is_one_clear_error():
    with pytest.raises(ConfigError, match=r"^data\.batch_size=40: .* batch of 80, .* only 53 .* at most 26$"):
        Order(53, 40, 0, rank=0, world_size=2)


def test_iterating_twice_gives_the_same_epoch_twice():
    loader = Pictures(None).train_dataloader()
    assert indices(loader) == indices(loader)


def test_an_iterator_made_before_the_epoch_is_set_follows_the_epoch():
    data = Pictures(None)
    early, late = data.train_dataloader(), data.train_dataloader()
    iterator = iter(early)  # Lightning makes it in `setup_data`, before `set_epoch`
    early.sampler.set_epoch(5)
    late.sampler.set_epoch(5)
    assert [batch.index.tolist() for batch in iterator] == indices(late)


def test_a_state_is_not_applied_to_another_epoch():
    loader = Pictures(None).train_dataloader()
    loader.load_state_dict({"epoch": 4, "num_batches": 2})
    loader.sampler.set_epoch(5)
    assert len(indices(loader)) == STEPS_PER_EPOCH


def test_a_state_saved_before_the_first_batch_of_an_epoch_belongs_to_the_last_one():
    loader = Pictures(None).train_dataloader()
    indices(loader)
    loader.sampler.set_epoch(1)
    assert loader.state_dict() == {"epoch": 0, "num_batches": STEPS_PER_EPOCH}


def test_streaming_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    indices(Pictures(0).train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_live_on_and_follow_the_next_epoch():
    streamed, in_memory = Pictures(2).train_dataloader(), Pictures(None).train_dataloader()
    assert isinstance(streamed, StreamLoader)
    next(iter(streamed))  # an epoch that is left after one batch
    for epoch in (0, 1):
        streamed.sampler.set_epoch(epoch)
        in_memory.sampler.set_epoch(epoch)
        assert indices(streamed) == indices(in_memory)


def test_no_worker_outlives_a_fit(tmp_path):
    before = set(multiprocessing.active_children())
    fitted = fit(tmp_path, 1, {}, max_epochs=1)
    assert len(fitted.probe.evaluated) == 2
    assert set(multiprocessing.active_children()) == before


def test_a_loader_of_any_split_is_in_order_and_takes_its_own_batch_size():
    batches = indices(Pictures(None, {"flip": Flip(1.0)}).loader("train", batch_size=20))
    assert batches == [list(range(20)), list(range(20, 40)), list(range(40, 53))]


def test_a_batch_that_is_on_its_device_is_passed_on_untouched():
    data = Pictures(None)
    batch = next(iter(data.train_dataloader()))
    assert data.transfer_batch_to_device(batch, CPU, 0) is batch
    assert data.transfer_batch_to_device(batch, torch.device("meta"), 0).x.device.type == "meta"


def test_an_unaugmented_batch_in_memory_takes_a_handful_of_calls():
    x = torch.rand(64 * 200, 8)
    loader = BatchLoader(Samples(x, torch.zeros(len(x))), Order(len(x), 64, 0, rank=0, world_size=1), finish=None)
    iterator = iter(loader)
    next(iterator)  # the permutation of the epoch
    profile = cProfile.Profile()
    profile.enable()
    num = sum(1 for _ in iterator)
    profile.disable()
    assert pstats.Stats(profile).total_calls / num < 12
