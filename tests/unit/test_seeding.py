import torch

from espalier import seeding


def test_a_number_depends_on_its_sample_and_not_on_the_batch_around_it():
    whole = seeding.uniform(seed=3, epoch=2, index_B=torch.arange(100), num=4, stream=1)
    part = seeding.uniform(seed=3, epoch=2, index_B=torch.tensor([41, 7]), num=4, stream=1)
    assert torch.equal(part, whole[[41, 7]])


def test_numbers_are_uniform_and_uncorrelated_between_neighbours():
    draws = seeding.uniform(seed=0, epoch=0, index_B=torch.arange(20_000), num=2, stream=0).double()
    assert abs(draws.mean().item() - 0.5) < 0.005
    assert abs(draws.var().item() - 1 / 12) < 0.002
    assert abs(torch.corrcoef(draws.T)[0, 1].item()) < 0.03
    assert abs(torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1].item()) < 0.03
    assert draws.min() >= 0
    assert draws.max() < 1


def test_every_part_of_the_key_matters():
    index = torch.arange(8)
    base = seeding.uniform(0, 0, index, 1, 0)
    others = [
        seeding.uniform(1, 0, index, 1, 0),
        seeding.uniform(0, 1, index, 1, 0),
        seeding.uniform(0, 0, index, 1, 1),
    ]
    assert not any(torch.equal(base, other) for other in others)


def test_the_tensor_mix_is_the_integer_mix():
    # SplitMix64 reference, seed 1234567: the published first output, doi.org/10.1145/2660193.2660195
    state = torch.tensor([1234567], dtype=torch.int64) + seeding._signed(seeding.GOLDEN)
    assert seeding._mix(state).item() & seeding.BITS_64 == 6457827717110365317


def test_seed_step_repeats_dropout_and_differs_between_ranks():
    def draw(rank):
        seeding.seed_step(seed=0, epoch=1, batch=5, rank=rank)
        return torch.rand(4)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
