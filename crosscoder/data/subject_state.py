"""What a subject's training goes on from: weights, moments and the checkpoints so far, committed whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosscoder.foundation.artifact import DamagedArtifactError, committed_directory, read_json, verify_directory
from crosscoder.foundation.artifact import write_json as _write_json
from crosscoder.foundation.console import say

SCHEMA = "crosscoder.subject_state/1"
FOLDER = "unfinished"
FILES = ("state.safetensors", "state.json")


def save_state(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], record: Any) -> None:
    """Replace what a run goes on from; `record` is plain values."""
    from safetensors.torch import save_file

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():
                tensors[f"{number}/{key}/{names[id(parameter)]}"] = torch.as_tensor(value)
    with committed_directory(folder / FOLDER, schema=SCHEMA) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary / FILES[0])
        _write_json(temporary / FILES[1], record)


def read_record(folder: Path) -> Any:
    """The plain values of what a run goes on from; None where there is nothing, or it is damaged, which is said."""
    try:
        verify_directory(folder / FOLDER, schema=SCHEMA, required=FILES)
    except FileNotFoundError:
        return None
    except DamagedArtifactError as error:
        say(f"beginning again, for what was kept is damaged: {error}")
        return None
    return read_json(folder / FOLDER / FILES[1])


def load_state(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Fill model and optimisers with what `save_state` wrote."""
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    for name, value in load_file(folder / FOLDER / FILES[0]).items():
        kind, _, rest = name.partition("/")
        if kind == "weight":
            with torch.no_grad():
                parameters[rest].copy_(value)
            continue
        key, _, of = rest.partition("/")
        device = "cpu" if value.ndim == 0 and not _is_fused(optimizers[int(kind)]) else parameters[of].device
        optimizers[int(kind)].state[parameters[of]][key] = value.to(device)


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its counts of steps lie beside the weights."""
    return bool(optimizer.defaults.get("fused"))


def require_same_run(folder: Path, old: Any, new: Any) -> None:
    """Refuse to go on with a run of other settings; those of Muon say nothing where there is none."""
    unused = "muon_" if old.get("optimizer") == new.get("optimizer") == "adamw" else ()
    known = [key for key in new if not key.startswith(unused)]
    differing = [
        f"{key}: there {old.get(key)!r}, now {new.get(key)!r}" for key in known if old.get(key) != new.get(key)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a subject's training of other settings ({'; '.join(differing)}); restore them, or choose "
            "another folder"
        )
