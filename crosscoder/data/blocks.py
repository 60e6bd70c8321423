"""Which modules are a model's blocks: found by watching it read a few tokens, never by the name of its family.

Blocks are a list whose modules run in order, once each, and each take and return hidden states [batch, position, width]
of the token ids given, the next one taking what the last one returned (at most scaled).
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosscoder.data.hooks import ModuleRun, recording

Blocks = tuple[nn.Module, ...]
RunsOf = dict[int, list[tuple[int, ModuleRun]]]
LINKED = 0.99
"""Cosine at least, between what a block returns and what the next one is given."""
LOOPED = "times in a pass"
SHOWN = 6


def block_lists(model: nn.Module) -> dict[str, Blocks]:
    """Every list of modules that the model holds, by its dotted path: children named 0, 1, 2 and on."""
    found = {}
    for path, module in model.named_modules():
        items = {name: item for name, item in module._modules.items() if item is not None}
        if items and list(items) == [str(number) for number in range(len(items))]:
            found[path] = tuple(items.values())
    return found


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes token ids; weights that are kept elsewhere until they are used have no device yet."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    moved_to = getattr(getattr(table, "_hf_hook", None), "execution_device", None)
    if moved_to is not None:
        return torch.device(moved_to)
    held = [] if table is None else [*table.parameters(), *table.buffers()]
    devices = (one.device for one in (*held, *model.parameters(), *model.buffers()) if one.device.type != "meta")
    return next(devices, torch.device("cpu"))


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text tower; None for a model without a configuration."""
    config = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def run_model(model: nn.Module, ids_BS: Tensor) -> Any:
    """What the model returns for token ids alone, without keeping a cache."""
    taken = inspect.signature(model.forward).parameters
    rest = hasattr(model, "config") and any(one.kind is one.VAR_KEYWORD for one in taken.values())
    return model(ids_BS, use_cache=False) if rest or "use_cache" in taken else model(ids_BS)


@torch.no_grad()
def watch_blocks(model: nn.Module, ids_BS: Tensor, blocks_path: str | None) -> tuple[str, list[ModuleRun], Any]:
    """The path of the model's blocks, their runs on `ids_BS` in order, and what the model returned."""
    lists = block_lists(model)
    if blocks_path is not None and blocks_path not in lists:
        listed = ", ".join(f"{path} ({len(items)})" for path, items in lists.items()) or "none"
        raise ValueError(f"--blocks-path: {blocks_path!r} is not a list of modules; this model has: {listed}")
    with recording(itertools.chain.from_iterable(lists.values())) as runs:
        try:
            output = run_model(model, ids_BS)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__} {(str(error).strip().splitlines() or [''])[0]}"
            raise ValueError(f"{type(model).__name__} does not run on token ids alone: {reason}") from error
    runs_of: RunsOf = {}
    for place, run in enumerate(runs):
        runs_of.setdefault(id(run.module), []).append((place, run))
    if blocks_path is not None:
        against = _objection(lists[blocks_path], runs_of, ids_BS)
        if against:
            raise ValueError(f"--blocks-path: the modules of {blocks_path} cannot be read as blocks: {against}")
        path = blocks_path
    else:
        path = _choose(model, lists, runs_of, ids_BS)
    return path, [runs_of[id(item)][0][1] for item in lists[path] if id(item) in runs_of], output


def is_linked(one: ModuleRun, after: ModuleRun) -> bool:
    """Whether a run is given what another returned, up to a factor; what is not finite is let through."""
    left, right = (hidden.float().cpu().flatten() for hidden in (one.returned, after.given) if hidden is not None)
    return left.shape == right.shape and (
        torch.equal(left, right) or not F.cosine_similarity(left, right, dim=0) < LINKED
    )


def _choose(model: nn.Module, lists: dict[str, Blocks], runs_of: RunsOf, ids_BS: Tensor) -> str:
    """The one list that nothing speaks against, and that lies in no list that is the model's stack."""
    ran = [path for path, items in lists.items() if _has_matrices(items) and any(id(one) in runs_of for one in items)]
    against = {path: _objection(lists[path], runs_of, ids_BS, linked=True) for path in ran}
    depth = getattr(text_config(model), "num_hidden_layers", None)
    outer = [path for path in ran if not any(_within(path, other) for other in ran)]
    # A list as long as the model is deep, or that runs again and again, is the model's stack even if it cannot be read.
    stacks = [path for path in ran if against[path] and (len(lists[path]) == depth or LOOPED in against[path])]
    fits = [path for path in ran if not against[path] and not any(_within(path, other) for other in stacks)]
    fits = [path for path in fits if not any(_within(path, other) for other in fits)]
    if len(fits) > 1:
        fits = [path for path in fits if len(lists[path]) == depth] or fits
    rivals = [path for path in stacks if path in outer]
    if len(fits) == 1 and not rivals:
        return fits[0]
    shown = [*fits, *rivals] or outer
    said = "; ".join(f"{path} ({len(lists[path])}): {against[path] or 'fits'}" for path in shown[:SHOWN])
    raise ValueError(
        f"{type(model).__name__} has {len(fits) if len(fits) > 1 else 'no certain'} lists of blocks, expected one; "
        f"name it with --blocks-path. Candidates: {said or 'none'}"
    )


def _objection(items: Blocks, runs_of: RunsOf, ids_BS: Tensor, *, linked: bool = False) -> str:
    """What speaks against reading `items` as blocks, or nothing; `linked`: each must take what the last returned."""
    run_kinds = {type(item) for item in items if id(item) in runs_of}
    for number, item in enumerate(items, start=1):
        times = len(runs_of.get(id(item), ()))
        if not times and run_kinds and type(item) not in run_kinds:
            continue  # blocks for something else than text, such as images
        if times != 1:
            return f"block {number} runs {times} {LOOPED}" if times else f"block {number} was not run"
    places, runs = zip(*(runs_of[id(item)][0] for item in items if id(item) in runs_of), strict=True)
    if list(places) != sorted(places):
        return "they do not run in order"
    wanted = f"expected [{ids_BS.shape[0]}, {ids_BS.shape[1]}, width] for ids {list(ids_BS.shape)}"
    for number, run in enumerate(runs, start=1):
        for verb, hidden in (("is given", run.given), ("returns", run.returned)):
            if hidden is None or hidden.ndim != 3 or hidden.shape[:2] != ids_BS.shape:
                what = "no hidden states" if hidden is None else str(list(hidden.shape))
                return f"block {number} {verb} {what}, {wanted}"
    for number, (one, after) in enumerate(itertools.pairwise(runs), start=1):
        if linked and not is_linked(one, after):
            return f"block {number + 1} is not given what block {number} returns"
    return ""


def _has_matrices(items: Blocks) -> bool:
    return all(any(one.ndim >= 2 for one in (*item.parameters(), *item.buffers())) for item in items)


def _within(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))
