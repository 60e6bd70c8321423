"""Another number of steps than a run began with: what becomes of its learning rate.

The rule: from where it goes on, the run has the schedule of the new number of steps. If the rate had left that schedule
by then (it had begun to fall), it rises again over the warm-up, from near 0 to where the new schedule stands. If it had
not, nothing else happens, and the run is to the bit the one that had the new number from the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crosscoder.foundation.console import say
from crosscoder.training.state import TrainState

OF_STEPS = ("steps", "training.steps")
"""Settings that name the number of steps."""


def linear_rise(step: int, *, warmup: int) -> float:
    """From `1 / (warmup + 1)` at step 0 to 1 at step `warmup`, and 1 from there on."""
    return min(1.0, (step + 1) / (warmup + 1))


def learning_rate_factor(
    step: int, *, n_steps: int | None, warmup: int, decay_fraction: float, rise_from: int = 0
) -> float:
    """What the peak rate is multiplied by at `step` (counted from 0): linear rise, flat, linear fall.

    The rise takes `warmup` steps, the fall the last `decay_fraction` of `n_steps`; where both overlap the smaller
    wins, so a warm-up longer than the run is harmless. Without a known end the rate stays flat.

    rise_from: the step at which the rise begins.
    """
    fall = 1.0
    if n_steps is not None and decay_fraction > 0:
        fall = (n_steps - step) / (decay_fraction * n_steps + 1)
    return min(linear_rise(step - rise_from, warmup=warmup), fall)


@dataclass(frozen=True)
class Stretch:
    """A run of `before` steps that goes on as one of `after`."""

    before: int | None
    after: int | None
    warmup: int
    decay_fraction: float

    @classmethod
    def of(cls, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Stretch:
        """From the training settings of a checkpoint, and those that are asked for."""
        return cls(saved["steps"], now["steps"], now["warmup_steps"], now["decay_fraction"])

    def begin(self, state: TrainState) -> None:
        """Let the rate rise again from the state's step on, where the rule says so."""
        if self.before == self.after or state.step == self.after:
            return
        given: dict[str, Any] = {"warmup": self.warmup, "decay_fraction": self.decay_fraction}
        factors = {
            learning_rate_factor(state.step - 1, n_steps=n_steps, rise_from=state.rise_from, **given)
            for n_steps in (self.before, self.after)
        }
        said = f"{self.before:,} steps become {self.after:,}, of which {state.step:,} are done"
        if len(factors) == 1 or state.step == 0:
            say(f"{said}; the learning rate has not begun to fall, and goes on")
            return
        state.rise_from = state.step
        say(f"{said}; the learning rate rises again over {self.warmup:,} steps, and falls at the new end")
