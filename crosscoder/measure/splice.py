"""How much worse the subject predicts when reconstructions replace its own activations.

Sites of kind `residual` are block outputs x_l; sites of kind `write` are what block l adds, x_l - x_(l-1). A site is
spliced by replacing its activations with the reconstruction of those of the clean run. The first positions, which the
dictionaries never saw, keep their clean values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosscoder.data.hooks import ModuleEnd, reading, replacing
from crosscoder.dictionary import Dictionary

SMALLEST_HARM = 1e-4  # nats a token that an ablation must cost before its recovery means anything


class Spliced(NamedTuple):
    """What splicing does to the subject, by the names of quantities: cross-entropy in nats a token, and KL."""

    clean: dict[str, Any]
    """Of the subject as it is on the spliced tokens."""
    sites: dict[str, dict[str, Any]]
    """With one layer's site replaced, by layer, or `all`."""


def _record(model: nn.Module, blocks: Sequence[nn.Module], ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Clean logits, and the residual stream entering the first block and leaving every block, `[B, S, n + 1, D]`."""
    stream: list[Tensor] = []
    ends = [ModuleEnd(blocks[0], "input"), *(ModuleEnd(block, "output") for block in blocks)]
    with reading(ends, lambda _, hidden: stream.append(hidden)):
        logits = model(ids_BS, use_cache=False).logits
    return logits, torch.stack(stream, dim=2)


def _loss_and_kl(logits: Tensor, clean: Tensor, ids_BS: Tensor, skip: int) -> np.ndarray:
    """Cross-entropy of logits, and KL of the clean ones from them, summed over tokens from position `skip` on."""
    log_q = logits[:, skip:-1].float().log_softmax(-1).flatten(0, 1)
    log_p = clean[:, skip:-1].float().log_softmax(-1).flatten(0, 1)
    loss = F.nll_loss(log_q, ids_BS[:, skip + 1 :].flatten(), reduction="sum")
    return np.array([loss.item(), F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()])


@torch.no_grad()
def splice_losses(
    dictionary: Dictionary,
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ids: Sequence[Tensor],
    *,
    layers: Sequence[int],
    kind: Literal["residual", "write"],
    ablation: Literal["mean", "zero"] = "mean",
    skip_positions: int = 1,
) -> Spliced:
    """Clean loss, and loss, KL and loss recovered with each of `layers` (and all of them) replaced.

    layers: block numbers from 1, one for each layer of the dictionary, in its order.
    ids: batches of token ids `[B, S]`; the dictionary's `input_scale` maps raw activations to its inputs.

    Raises:
        ValueError: `layers` does not name one block for each layer of the dictionary.
    """
    if len(layers) != dictionary.config.n_layers:
        raise ValueError(f"{len(layers)} layers named for a dictionary of {dictionary.config.n_layers}")
    dictionary.eval()
    mean_LD = _mean_site(model, blocks, ids, layers, kind, skip_positions) if ablation == "mean" else None
    choices = {str(layer): [i] for i, layer in enumerate(layers)}
    if len(layers) > 1:
        choices["all"] = list(range(len(layers)))
    clean_loss, n_tokens = 0.0, 0
    spliced, ablated = ({name: np.zeros(2) for name in choices} for _ in range(2))
    for ids_BS in ids:
        clean, stream = _record(model, blocks, ids_BS)
        x_BSLD = _sites(stream, layers, kind)
        scale_L1 = dictionary.input_scale[:, None]
        recon_BSLD = dictionary(x_BSLD.float() * scale_L1).recon / scale_L1
        gone_BSLD = torch.zeros_like(recon_BSLD) if mean_LD is None else mean_LD.expand_as(recon_BSLD)
        clean_loss += _loss_and_kl(clean, clean, ids_BS, skip_positions)[0]
        n_tokens += ids_BS[:, skip_positions + 1 :].numel()
        for name, chosen in choices.items():
            for sums, source in ((spliced[name], recon_BSLD), (ablated[name], gone_BSLD)):

                def put(number: int, given: Tensor, returned: Tensor, source=source, chosen=chosen) -> Tensor:
                    new = source[:, :, chosen[number]].to(returned.dtype)
                    new = new + given if kind == "write" else new
                    return torch.cat([returned[:, :skip_positions], new[:, skip_positions:]], dim=1)

                with replacing([blocks[layers[i] - 1] for i in chosen], put):
                    logits = model(ids_BS, use_cache=False).logits
                sums += _loss_and_kl(logits, clean, ids_BS, skip_positions)
    clean_loss, sites = float(clean_loss / n_tokens), {}
    for name in choices:
        (loss, kl), (gone, _) = (spliced[name] / n_tokens).tolist(), (ablated[name] / n_tokens).tolist()
        # Where removing the site does not hurt there is no loss to recover.
        recovered = (gone - loss) / (gone - clean_loss) if gone - clean_loss > SMALLEST_HARM else None
        sites[name] = {"spliced_loss": loss, "ablated_loss": gone, "loss_recovered": recovered, "kl": kl}
    return Spliced({"splice_tokens": n_tokens, "spliced_ablation": ablation, "clean_loss": clean_loss}, sites)


def _sites(stream_BSND: Tensor, layers: Sequence[int], kind: str) -> Tensor:
    """What the dictionary reads at `layers`, `[B, S, L, D]`, of the residual stream before and after every block."""
    chosen = stream_BSND[:, :, list(layers)]
    if kind == "write":
        chosen = chosen - stream_BSND[:, :, [layer - 1 for layer in layers]]
    return chosen


def _mean_site(
    model: nn.Module, blocks: Sequence[nn.Module], ids: Sequence[Tensor], layers: Sequence[int], kind: str, skip: int
) -> Tensor:
    total, count = None, 0
    for ids_BS in ids:
        x_TLD = _sites(_record(model, blocks, ids_BS)[1], layers, kind)[:, skip:].flatten(0, 1)
        total = x_TLD.sum(0) if total is None else total + x_TLD.sum(0)
        count += x_TLD.shape[0]
    assert total is not None
    return total / count
