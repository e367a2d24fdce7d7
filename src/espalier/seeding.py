"""Randomness as a function of (seed, epoch, step, index), never a state.

A generator that is advanced has a position that a crash loses. Here every random number is computed from the place
where it is used, so a resumed run, another number of workers or another batch size draws the same numbers.
The mixing function is SplitMix64 (Steele, Lea and Flood 2014, doi.org/10.1145/2660193.2660195).
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
BITS_64 = (1 << 64) - 1


def key(*parts: int) -> int:
    """Return one well-mixed integer in [0, 2**63) for a sequence of integers; order matters."""
    mixed = 0
    for part in parts:
        mixed = (mixed + GOLDEN + (part & BITS_64)) & BITS_64
        mixed = ((mixed ^ (mixed >> 30)) * MIX_1) & BITS_64
        mixed = ((mixed ^ (mixed >> 27)) * MIX_2) & BITS_64
        mixed ^= mixed >> 31
    return mixed >> 1


def generator(*parts: int) -> torch.Generator:
    """Return a CPU generator that starts at `key(*parts)`."""
    return torch.Generator().manual_seed(key(*parts))


def uniform(seed: int, epoch: int, index_B: Tensor, num: int, stream: int) -> Tensor:
    """Return `num` numbers in [0, 1) for each sample, shape (B, num), float32 on the device of `index_B`.

    A number depends on (seed, epoch, sample index, its column, stream) alone: not on the batch around the sample.
    `stream` keeps two users apart; give each augmentation its own.
    """
    column_N = torch.arange(1, num + 1, device=index_B.device) * _signed(GOLDEN)
    sample_B = _mix(index_B.long() + _signed(key(seed, epoch, stream)))
    bits_BN = _mix(sample_B[:, None] + column_N)
    return ((bits_BN >> 40) & 0xFFFFFF).float() / (1 << 24)


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Point the global generators (dropout) at this batch; ranks draw different numbers."""
    value = key(seed, epoch, batch, rank)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


def _mix(bits: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer to int64; torch shifts keep the sign, so the sign bits are masked away."""
    bits = (bits ^ ((bits >> 30) & (BITS_64 >> 30))) * _signed(MIX_1)
    bits = (bits ^ ((bits >> 27) & (BITS_64 >> 27))) * _signed(MIX_2)
    return bits ^ ((bits >> 31) & (BITS_64 >> 31))


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
