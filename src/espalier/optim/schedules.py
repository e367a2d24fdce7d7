"""Learning-rate schedules as functions of the step: each returns the factor on the base learning rate.

`step` counts optimizer steps that are done, so the first update uses the factor at 0 and the last one the factor at
`total_steps - 1`; at `total_steps` a schedule has arrived. Lengths are shares of the run, so they fit any run.
A warm-up of w steps rises linearly, (step + 1) / (w + 1), so the first update already moves and the factor at w is 1
(Goyal et al. 2017, section 2.2, arxiv.org/abs/1706.02677).
"""

import math

from espalier.config.ranges import Share


def constant(step: int, total_steps: int) -> float:
    """Return 1 at every step."""
    return 1.0


def step_decay(step: int, total_steps: int, *, milestones: list[Share], gamma: Share) -> float:
    """Return `gamma` to the power of the number of milestones passed; a milestone is a share of the run."""
    return gamma ** sum(step >= round(milestone * total_steps) for milestone in milestones)


def cosine(step: int, total_steps: int, *, final: Share) -> float:
    """Return half a cosine from 1 to `final` (Loshchilov and Hutter 2017, equation 5, arxiv.org/abs/1608.03983)."""
    return _anneal(1.0, final, _progress(step, total_steps))


def warmup_cosine(step: int, total_steps: int, *, warmup: Share, final: Share) -> float:
    """Rise linearly to 1 over `warmup`, then return half a cosine from 1 to `final`."""
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return cosine(step - warmup_steps, total_steps - warmup_steps, final=final)


def one_cycle(step: int, total_steps: int, *, warmup: Share, start: Share, final: Share) -> float:
    """Rise by half a cosine from `start` to 1, then fall by another to `final`.

    Smith and Topin 2018, arxiv.org/abs/1708.07120. Only the learning rate cycles; momentum stays as configured.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return _anneal(start, 1.0, step / warmup_steps)
    return cosine(step - warmup_steps, total_steps - warmup_steps, final=final)


def warmup_stable_decay(step: int, total_steps: int, *, warmup: Share, decay: Share, final: Share) -> float:
    """Rise linearly to 1, stay there, then fall to `final` over the last `decay` of the run as 1 - sqrt(progress).

    The constant part leaves the length of a run open until its decay begins (Hu et al. 2024, arxiv.org/abs/2404.06395);
    the square root did better than a line (Haegele et al. 2024, arxiv.org/abs/2405.18392).

    Raises:
        ValueError: warm-up and decay together are longer than the run.
    """
    if warmup + decay > 1:
        raise ValueError(f"scheduler.warmup={warmup} and scheduler.decay={decay} must sum to at most 1; shorten one")
    warmup_steps, decay_steps = round(warmup * total_steps), round(decay * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = _progress(step - (total_steps - decay_steps), decay_steps)
    return final + (1 - final) * (1 - math.sqrt(progress))


def _progress(step: int, num_steps: int) -> float:
    """Return the share of `num_steps` that is done, from 0 to 1; with `num_steps` 0, 1 from step 0 on."""
    return min(max(step / num_steps, 0.0), 1.0) if num_steps else float(step >= 0)


def _anneal(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
