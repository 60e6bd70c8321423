"""Learning rate and penalties as pure functions of the step."""

from __future__ import annotations


def linear_rise(step: int, *, warmup: int) -> float:
    """From `1 / (warmup + 1)` at step 0 to 1 at step `warmup`, and 1 from there on."""
    return min(1.0, (step + 1) / (warmup + 1))


def learning_rate_factor(step: int, *, n_steps: int | None, warmup: int, decay_fraction: float) -> float:
    """What the peak rate is multiplied by at `step` (counted from 0): linear rise, flat, linear fall.

    The rise takes `warmup` steps, the fall the last `decay_fraction` of `n_steps`; where both overlap the smaller
    wins, so a warm-up longer than the run is harmless. Without a known end the rate stays flat.
    """
    fall = 1.0
    if n_steps is not None and decay_fraction > 0:
        fall = (n_steps - step) / (decay_fraction * n_steps + 1)
    return min(linear_rise(step, warmup=warmup), fall)
