"""Numbers that a run must not go on with, or keep: NaN and infinity among parameters and the optimiser's moments."""

from __future__ import annotations

import math

import torch

from crosscoder.training.state import TrainState


class NonFiniteError(FloatingPointError):
    """A batch, a loss or a gradient holds NaN or infinity, and the parameters were not changed by it; or they hold one
    themselves."""


def require_finite(state: TrainState, *, mend: str = "start from a sound dictionary or checkpoint") -> None:
    """Refuse a state whose parameters or moments hold NaN or infinity: a choice of features may hide them for ever.

    Raises:
        NonFiniteError: names the tensor, and ends with the mend.
    """
    for name, parameter in state.dictionary.named_parameters():
        moments = state.optimizer.state.get(parameter, {})
        tensors = {name: parameter, **{f"{key} of {name}": moment for key, moment in moments.items()}}
        for what, tensor in tensors.items():
            if not all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(tensor.detach())).tolist()):
                raise NonFiniteError(f"step {state.step}{state.called}: {what} holds NaN or infinity; {mend}")


def require_sound(state: TrainState) -> None:
    """As `require_finite`, of a state that training has made, before it is kept."""
    require_finite(
        state,
        mend="a step took it there, and this state is not kept; a lower learning_rate is the usual mend, from the last "
        "checkpoint or a new start",
    )
