"""Which dictionaries take their steps together, in one memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crosscoder.dictionary.stack import fits
from crosscoder.training.gradients import is_direct
from crosscoder.training.state import StackState, State, TrainState


def side_by_side(states: Sequence[TrainState]) -> list[State]:
    """The states in as few as can take their steps: those that fit one another in one, largest first."""

    def may_stack(state: TrainState) -> bool:
        one = state.dictionary
        return is_direct(one) and one.encoder.dtype == torch.float32 and one.shard is None

    alone = [state for state in states if not may_stack(state)]
    left = [state for state in states if may_stack(state)]
    left.sort(key=lambda state: -state.dictionary.config.n_features)
    stacks: list[list[TrainState]] = []
    for state in left:
        alike = (stack for stack in stacks if stack[0].rise_from == state.rise_from)
        own = (stack for stack in alike if fits(state.dictionary, stack[0].dictionary))
        if (stack := next(own, None)) is not None:
            stack.append(state)
        else:
            stacks.append([state])
    return [*alone, *(StackState(stack) if len(stack) > 1 else stack[0] for stack in stacks)]
