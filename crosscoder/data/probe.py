"""What a model's blocks and MLPs are, asked of the model itself with a few random tokens before any work is done.

Two forward passes: the blocks are watched (`blocks.watch_blocks`), then later tokens are changed to see which positions
mind. A third, of single blocks, asks what their MLPs are given and return. No random state and no mode is changed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crosscoder.data.blocks import Blocks, block_lists, input_device, is_linked, run_model, text_config, watch_blocks
from crosscoder.data.hooks import ModuleEnd, ModuleRun, reading
from crosscoder.data.mlps import find_mlps

N_TOKENS = 8
PREDICTIONS = "the predictions"
"""Logits are mostly the same for all tokens, so that in half precision a small change of them hides."""
ROUNDING = 1e-5, 8.0
"""Relative change of a hidden state that is rounding: at most the first, or the second times the dtype's epsilon."""


@dataclass(frozen=True)
class Probed:
    """What a model said of itself.

    path, blocks: the blocks and where they are; width: of the hidden states that the first is given.
    causal: whether no site and no prediction changes with a later token.
    notes: what a reader of its numbers must know, a line each.
    mlps: the MLP of each block, None where it has none that can be read; mlp: the convention of those that can, and
        why the others cannot.
    """

    path: str
    blocks: Blocks
    width: int
    causal: bool
    notes: tuple[str, ...] = ()
    mlps: tuple[nn.Module | None, ...] = ()
    mlp: str = "not asked"
    problems: tuple[str, ...] = field(default=(), repr=False)

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)


def probe_model(
    model: nn.Module,
    *,
    blocks_path: str | None = None,
    mlp_path: str | None = None,
    mlps: bool = True,
) -> Probed:
    """The model's blocks, whether it is causal and, with `mlps`, its MLPs; `*_path` name them instead.

    Raises:
        ValueError: the model does not run on token ids alone, not one list of modules is of blocks, or a block's
            positions are not those of the ids.
    """
    with _evaluating(model), torch.no_grad():
        ids_BS, changed_BS = _tokens(model)
        path, runs, output = watch_blocks(model, ids_BS, blocks_path)
        blocks = tuple(run.module for run in runs)
        sites, others, other = _sites(runs), *_run(model, blocks, changed_BS)
        names = ["the embedding", *(f"block {number}" for number in range(1, len(sites)))]
        logits, other_logits = _logits(output, ids_BS), _logits(other, ids_BS)
        if logits is not None and other_logits is not None:
            sites, others, names = [*sites, logits], [*others, other_logits], [*names, PREDICTIONS]
        future, notes = _order(names, sites, others, ids_BS != changed_BS, path)
        notes += _remarks(model, block_lists(model)[path], runs, logits)
        found = find_mlps(runs, mlp_path) if mlps else None
    return Probed(
        path=path,
        blocks=blocks,
        width=sites[0].shape[-1],
        causal=not future,
        notes=(*future, *notes),
        **({} if found is None else found._asdict()),
    )


def meaningless_loss(model: nn.Module, probed: Probed) -> str | None:
    """Why the model's next-token loss says nothing of it; None where it does say something."""
    missing = getattr(model, "missing_weights", ())
    if missing:
        return f"{len(missing)} weights were not in the checkpoint and are random: {', '.join(missing[:3])}"
    return None if probed.causal else next(note for note in probed.notes if note.startswith("not causal"))


def _tokens(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The same random ids in four rows, and those with the ids of row r changed: none, the last, the later half, all
    but the first. No id has a meaning of its own, such as padding.
    """
    config = text_config(model)
    table = getattr(model, "get_input_embeddings", lambda: None)()
    table = table or next((one for one in model.modules() if isinstance(one, nn.Embedding)), None)
    vocabulary = getattr(table, "num_embeddings", None) or getattr(config, "vocab_size", None) or 2
    longest = getattr(config, "max_position_embeddings", None)
    n_tokens = min(N_TOKENS, longest) if isinstance(longest, int) and longest > 0 else N_TOKENS
    if n_tokens in (4, getattr(table, "embedding_dim", None), getattr(config, "hidden_size", None)):
        n_tokens -= 1  # so that no two sides of a hidden state [batch, position, width] are alike
    if n_tokens < 2:
        raise ValueError(f"the probe needs at least 2 tokens, got {n_tokens}; the model reads at most {longest}")
    special = {value for key, value in _settings(model) if key.endswith(("token_id", "token_index"))}
    plain = [one for one in range(min(vocabulary, 50_000)) if one not in special] or [0]
    order = torch.tensor(plain)[torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))]
    drawn = order[torch.arange(2 * n_tokens) % len(order)]
    first, second = drawn.split(n_tokens)
    ids_BS = first.repeat(4, 1)
    changed_BS = ids_BS.clone()
    for row, start in enumerate((n_tokens, n_tokens - 1, n_tokens // 2, 1)):
        changed_BS[row, start:] = second[start:]
    device = input_device(model)
    return ids_BS.to(device), changed_BS.to(device)


def _settings(model: nn.Module) -> Generator[tuple[str, Any]]:
    for config in {id(one): one for one in (getattr(model, "config", None), text_config(model)) if one}.values():
        yield from vars(config).items()


def _run(model: nn.Module, blocks: Blocks, ids_BS: Tensor) -> tuple[list[Tensor], Any]:
    """The sites of one more pass, from the embedding to the last block, and what the model returned."""
    sites: list[Tensor] = []
    ends = [ModuleEnd(blocks[0], "input"), *(ModuleEnd(block, "output") for block in blocks)]
    with reading(ends, lambda _, hidden: sites.append(hidden.detach().clone())):
        output = run_model(model, ids_BS)
    return sites, output


def _sites(runs: Sequence[ModuleRun]) -> list[Tensor]:
    return [hidden for hidden in (runs[0].given, *(run.returned for run in runs)) if hidden is not None]


def _logits(output: Any, ids_BS: Tensor) -> Tensor | None:
    logits = getattr(output, "logits", None)
    whole = isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == ids_BS.shape
    return logits if whole else None


def _order(
    names: Sequence[str], sites: Sequence[Tensor], others: Sequence[Tensor], changed_BS: Tensor, path: str
) -> tuple[list[str], list[str]]:
    """How the model sees the future, and other remarks on what changed with the tokens. Row 0 was not changed."""
    future, mixed = "", ""
    starts = [int(row.int().argmax()) for row in changed_BS.cpu()]
    for name, site, other in zip(names, sites, others, strict=True):
        moved_BS = _moved(site, other)
        if not mixed and bool(moved_BS[0].any()):
            mixed = f"rows of a batch change one another at {name}"
        late = []
        for start, changed, moved in zip(starts[1:], changed_BS.cpu()[1:], moved_BS[1:], strict=True):
            first = int(moved.int().argmax()) if bool(moved.any()) else len(moved)
            if changed.any() and first < start and not future:
                future = f"not causal: token {start + 1} changes {name} at token {first + 1}"
            late.append(bool(changed.any()) and first > start)
        # Were nothing to change at all, there is nothing to be seen, as in a model of zeros.
        if all(late) and bool(moved_BS.any()) and name != PREDICTIONS:
            raise ValueError(f"{name} of {path} is not of the ids given: its positions change only with earlier tokens")
    return [future] if future else [], [mixed] if mixed else []


def _moved(site_BSD: Tensor, other_BSD: Tensor) -> Tensor:
    """Which hidden states changed by more than rounding, `[B, S]`; what is not finite is taken as unchanged.

    Experts multiply the tokens of all rows together, so the unchanged row 0 shows how much rounding there is.
    """
    least, times = ROUNDING
    tolerance = max(least, times * torch.finfo(site_BSD.dtype).eps)
    left, right = site_BSD.double().cpu(), other_BSD.double().cpu()
    return (left - right).norm(dim=-1) > tolerance * left.norm(dim=-1)


def _remarks(model: nn.Module, items: Blocks, runs: Sequence[ModuleRun], logits: Tensor | None) -> list[str]:
    notes = []
    kinds = Counter(type(run.module).__name__ for run in runs)
    if len(kinds) > 1:
        notes.append("mixed blocks: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    for number, (one, after) in enumerate(itertools.pairwise(runs), start=1):
        if (
            one.returned is not None
            and after.given is not None
            and not torch.equal(one.returned, after.given.to(one.returned))
        ):
            how = "a scaled form of" if is_linked(one, after) else "something else than"
            notes.append(f"block {number + 1} is given {how} what block {number} returns")
            break
    ran = {id(run.module) for run in runs}
    if idle := [str(number) for number, item in enumerate(items, start=1) if id(item) not in ran]:
        notes.append(f"of {len(items)} layers, {', '.join(idle)} do not run on text alone: the others are the blocks")
    depth = getattr(text_config(model), "num_hidden_layers", None)
    if isinstance(depth, int) and depth != len(runs) and not idle:
        notes.append(f"the configuration says {depth} layers, {len(runs)} blocks are read")
    widths = {hidden.shape[-1] for hidden in _sites(runs)}
    if len(widths) > 1:
        notes.append(f"sites of several widths: {', '.join(map(str, sorted(widths)))}")
    if logits is None:
        notes.append("no prediction of every next token")
    return notes


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode, and random states that are as they were afterwards."""
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
