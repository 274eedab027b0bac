"""The learning rate as a function of the step: no state, so a resumed run needs nothing to know it."""

from __future__ import annotations

import math

from tunesmith.configs.schedule import Constant, LRScheduler, WarmupStableDecay


def lr_factor(schedule: LRScheduler, step: int, total_steps: int) -> float:
    """The rate of `step` (from 1 to `total_steps`) as a share of the peak.

    The warm-up rises linearly and reaches the peak at its last step. A decay starts from the peak at its first step and
    would reach its end one step after the run, so no step is spent at a rate of zero.
    """
    warmup = schedule.num_warmup_steps
    if schedule.warmup_ratio is not None:
        warmup = math.ceil(schedule.warmup_ratio * total_steps)
    if step <= warmup:
        return step / warmup
    if isinstance(schedule, Constant):
        return 1.0
    shape, start = schedule.type, warmup
    if isinstance(schedule, WarmupStableDecay):
        shape, start = schedule.decay_type, max(warmup, total_steps - round(schedule.decay_ratio * total_steps))
    if step <= start:
        return 1.0
    progress = min((step - 1 - start) / max(total_steps - start, 1), 1.0)
    fall = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "sqrt": 1 - math.sqrt(progress),
    }[shape]
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * fall
