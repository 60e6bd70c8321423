"""What a language model predicts of a text: its loss, with a BOS before each block and without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.signals import safe_points

BATCH = 4
MUCH_BETTER = 0.95
"""A loss below this much of another is worth a warning."""


@torch.no_grad()
def causal_loss(model: Any, ids_BS: Tensor) -> float:
    """Mean next-token cross-entropy of any causal model on blocks of equal length, in nats per token."""
    total = 0.0
    for part in ids_BS.split(BATCH):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())) * len(part)
    return total / len(ids_BS)


@torch.no_grad()
def loss_of_policies(model: Any, blocks: TokenBlocks, *, bos: int | None, n_blocks: int = 16) -> dict[bool, float]:
    """Loss on the text of some of the blocks, in nats per token: with `bos` before it (True) and without (False).

    The text and the tokens counted are the same for both: each is predicted from at least one token of text, and no
    special token is counted. Without a `bos`, or where the blocks have no such token, there is nothing to compare.
    """
    origin = blocks.origin
    device = next(model.parameters()).device
    chosen = blocks[:: max(1, len(blocks) // n_blocks)][:n_blocks].to(device)
    text_BS = chosen[:, 1:] if origin is not None and origin.bos is not None else chosen[:, :-1]  # room for the BOS
    special = torch.tensor(origin.special_ids if origin is not None else (), device=device, dtype=torch.int64)
    counted_BS = ~torch.isin(text_BS[:, 1:], special)
    totals = dict.fromkeys((False,) if bos is None else (True, False), 0.0)
    for rows, counted in safe_points(zip(text_BS.split(BATCH), counted_BS.split(BATCH), strict=True)):
        for with_bos in totals:
            given = F.pad(rows, (1, 0), value=bos or 0) if with_bos else rows
            logits = model(given, use_cache=False).logits[:, -rows.shape[1] : -1]
            loss = F.cross_entropy(logits[counted].float(), rows[:, 1:][counted], reduction="sum")
            totals[with_bos] += float(loss)
    n_counted = int(counted_BS.sum())
    return {with_bos: total / n_counted for with_bos, total in totals.items()} if n_counted else {}


def describe_policies(losses: dict[bool, float], *, with_bos: bool) -> str:
    """What `loss_of_policies` found, of blocks that begin with a BOS or not; a second line warns if that is worse."""
    names, flags = {True: "with BOS", False: "without BOS"}, {True: "--bos", False: "--no-bos"}
    if with_bos not in losses:
        return "no token of text is predicted from another, so there is no loss"
    said = f"held-out loss of the model: {losses[with_bos]:.3f} nats/token {names[with_bos]}"
    if len(losses) == 1:
        return said
    used, other = losses[with_bos], losses[not with_bos]
    said += f", {other:.3f} {names[not with_bos]}"
    if not other < MUCH_BETTER * used:
        return said
    return (
        f"{said}\nwarning: the model reads this text much better {names[not with_bos]} than {names[with_bos]}; "
        f"prepare it again with {flags[not with_bos]}"
    )
