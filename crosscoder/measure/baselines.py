"""What a subject has to beat: n-gram tables counted on the text that it saw, and its own writes as a table of tokens.

A subject that does not predict better than a trigram, or that loses little when every write becomes a function of the
current token, has features of tokens: they say nothing of how features share a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosscoder.data.blocks import input_device, run_model
from crosscoder.data.hooks import replacing
from crosscoder.data.order import batch_indices
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.origin import MismatchError
from crosscoder.foundation.signals import safe_point, safe_points
from crosscoder.measure.splice import LOGIT_BYTES, SMALLEST_HARM, recording_sites

ORDERS = {1: "unigram", 2: "bigram", 3: "trigram"}
DISCOUNT = 0.5
"""Where counts of one and of two do not both occur, so that they cannot say it."""
TABLE_BYTES = 2**30
"""Of the mean writes of all tokens, as float64."""


def seen_blocks(n_blocks: int, *, batch: int, seed: int, steps: int) -> np.ndarray:
    """The training blocks that a subject has read after `steps` steps, each once, as `train_subject` orders them."""
    chosen = [batch_indices(n_blocks, batch=batch, seed=seed, index=index).numpy() for index in range(steps)]
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *chosen]))


class _Level:
    """Counts of n-grams of one order, numbered in base V, and the interpolation with a lower order."""

    def __init__(self, key_G: np.ndarray, count_G: np.ndarray, vocab_size: int) -> None:
        self.key_G, self.count_G, self.vocab_size = key_G, count_G, vocab_size
        self.context_H, starts_H = np.unique(key_G // vocab_size, return_index=True)
        self.total_H = np.add.reduceat(count_G, starts_H)
        self.types_H = np.diff(np.append(starts_H, len(key_G)))
        once, twice = int((count_G == 1).sum()), int((count_G == 2).sum())
        self.discount = once / (once + 2 * twice) if once and twice else DISCOUNT

    def probability(self, key_T: np.ndarray, lower_T: np.ndarray | float) -> np.ndarray:
        """Of the last token of each n-gram after those before it; that of the lower order after what never came."""
        count_T = _looked_up(self.key_G, self.count_G, key_T)
        context_T = key_T // self.vocab_size
        total_T = _looked_up(self.context_H, self.total_H, context_T)
        kept_T = np.maximum(count_T - self.discount, 0.0)
        spread_T = self.discount * _looked_up(self.context_H, self.types_H, context_T) * lower_T
        return np.where(total_T > 0, (kept_T + spread_T) / np.maximum(total_T, 1), lower_T)


def _looked_up(key_G: np.ndarray, value_G: np.ndarray, key_T: np.ndarray) -> np.ndarray:
    """The value of each key, 0 for one that is not there."""
    at_T = np.minimum(np.searchsorted(key_G, key_T), len(key_G) - 1)
    return np.where(key_G[at_T] == key_T, value_G[at_T], 0)


class KneserNey:
    """Interpolated Kneser-Ney models of all `ORDERS`, of the predictions within blocks.

    Kneser and Ney (1995) in the interpolated form of Chen and Goodman (1999), one discount an order,
    `n1 / (n1 + 2 n2)` of its counts of one and two: the order asked for has counts of n-grams, lower ones count the
    tokens that precede an n-gram, and below unigrams is 1 / V. The first token of a block is never predicted, nor
    counted as one, and no n-gram crosses from a block to the next: the subject cannot see across either.
    """

    def __init__(self, ids_BS: np.ndarray, *, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        if vocab_size ** max(ORDERS) >= 2**63:
            raise ValueError(f"{ORDERS[max(ORDERS)]}s of {vocab_size} tokens have no 64-bit numbers")
        self._counted, self._continued = {}, {}
        for order in safe_points(ORDERS):
            key_G, count_G = np.unique(self._keys(ids_BS, order), return_counts=True)
            self._counted[order] = _Level(key_G, count_G, vocab_size)
            if order > 1:
                ends = np.unique(key_G % vocab_size ** (order - 1), return_counts=True)
                self._continued[order - 1] = _Level(*ends, vocab_size)

    def nats(self, ids_BS: np.ndarray, order: int) -> np.ndarray:
        """-ln of the probability of every token but each block's first, `[B, S - 1]`.

        The first tokens have fewer before them than the order asks, and are predicted by the model of that lower order.
        """
        return -np.log(self._probability(np.asarray(ids_BS, dtype=np.int64), order))

    def _probability(self, ids_BS: np.ndarray, order: int) -> np.ndarray:
        first = max(1, order - 1)  # the first position that the whole context comes before
        n_positions = ids_BS.shape[1] - first
        if n_positions < 1:
            return self._probability(ids_BS, order - 1)
        lower: np.ndarray | float = 1 / self.vocab_size
        for below in range(1, order):
            keys = self._keys(ids_BS, below)[:, -n_positions:]
            lower = self._continued[below].probability(keys, lower)
        found = self._counted[order].probability(self._keys(ids_BS, order), lower)
        if first == 1:
            return found
        return np.concatenate([self._probability(ids_BS[:, :first], order - 1), found], axis=1)

    def _keys(self, ids_BS: np.ndarray, order: int) -> np.ndarray:
        """The numbers of the n-grams that end at each predicted position, `[B, S - max(1, order - 1)]`."""
        ids, first = np.asarray(ids_BS, dtype=np.int64), max(1, order - 1)
        keys = np.zeros((len(ids), ids.shape[1] - first), dtype=np.int64)
        for back in reversed(range(order)):
            keys = keys * self.vocab_size + ids[:, first - back : ids.shape[1] - back]
        return keys


def ngram_losses(train: TokenBlocks, held_out: TokenBlocks, *, seen: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Loss in nats a token of each held-out block, `[B]`, of the tables of `ORDERS`, by name: what `block_losses` are
    of the subject.

    seen: which of `train` the subject has read (`seen_blocks`); None: all. Compare with the subject's loss on the same
    held-out blocks.
    """
    _require_comparable(train, held_out)
    model = KneserNey(
        train[slice(None) if seen is None else torch.as_tensor(seen)].numpy(), vocab_size=train.vocab_size
    )
    parts = [held_out[start : start + 1024].numpy() for start in range(0, len(held_out), 1024)]
    return {name: np.concatenate([model.nats(part, order).mean(1) for part in parts]) for order, name in ORDERS.items()}


def _require_comparable(train: TokenBlocks, held_out: TokenBlocks) -> None:
    made = [(blocks.vocab_size, blocks.tokenizer_hash) for blocks in (train, held_out)]
    if made[0] != made[1]:
        raise MismatchError(f"training and held-out tokens are of different tokenizers, {made}; prepare them together")
    if (shortest := min(train.sequence_length, held_out.sequence_length)) < max(ORDERS):
        raise ValueError(f"blocks of {shortest} tokens hold no {ORDERS[max(ORDERS)]}; expected {max(ORDERS)} or more")


@dataclass(frozen=True)
class TokenLookup:
    """What is left of a subject whose blocks write a function of the current token.

    Losses of held-out blocks in nats a token, `[B]`: as it is; with every block's write replaced by its mean for the
    current token; and by its mean over all tokens.
    """

    clean_B: np.ndarray
    lookup_B: np.ndarray
    ablated_B: np.ndarray

    @property
    def share_kept(self) -> float | str:
        """`(ablated - lookup) / (ablated - clean)`, how much of what the writes bring a table of tokens brings too, or
        why there is none."""
        clean, lookup, ablated = (float(one.mean()) for one in (self.clean_B, self.lookup_B, self.ablated_B))
        if ablated - clean <= SMALLEST_HARM:
            return f"ablation costs {ablated - clean:.2g} nats a token"
        return (ablated - lookup) / (ablated - clean)


@torch.no_grad()
def token_lookup(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    train: TokenBlocks,
    held_out: TokenBlocks,
    *,
    seen: np.ndarray | None = None,
) -> TokenLookup:
    """The subject with every block's write replaced by its mean for the current token, all blocks at once.

    Means are over the tokens of `train` (of its blocks `seen`), losses over those of `held_out`. As in
    `splice.splice_losses`, a write is what a block returns less what the one before returned, and losses count every
    prediction but the first of a block; first tokens are in no mean. With all writes replaced a prediction
    depends on its own token alone, so what the first positions are given changes nothing.
    """
    _require_comparable(train, held_out)
    ids = train[slice(None) if seen is None else torch.as_tensor(seen)]
    rows = _rows_at_once(model, train)
    mean_VLD, overall_LD = _token_means(model, blocks, ids.split(rows), train.vocab_size)
    losses: list[list[np.ndarray]] = [[], [], []]
    for ids_BS in held_out[:].split(rows):
        safe_point()
        losses[0].append(_block_losses(run_model(model, ids_BS.to(input_device(model))).logits, ids_BS))
        for found, new_BSLD in zip(losses[1:], (mean_VLD[ids_BS], overall_LD.expand(*ids_BS.shape, -1, -1))):
            found.append(_block_losses(_with_writes(model, blocks, ids_BS, new_BSLD), ids_BS))
    return TokenLookup(*map(np.concatenate, losses))


def _rows_at_once(model: nn.Module, blocks: TokenBlocks) -> int:
    ids_BS = blocks[:1][:, :1].to(input_device(model))
    return max(1, LOGIT_BYTES // (4 * blocks.sequence_length * run_model(model, ids_BS).logits.shape[-1]))


def _writes(model: nn.Module, blocks: Sequence[nn.Module], ids_BS: Tensor) -> Tensor:
    """What each block writes, `[B, S, L, D]`, on the CPU."""
    safe_point()
    with recording_sites(blocks, range(1, len(blocks) + 1), "write", torch.device("cpu")) as read:
        run_model(model, ids_BS.to(input_device(model)))
    return read()


def _token_means(
    model: nn.Module, blocks: Sequence[nn.Module], parts: Sequence[Tensor], vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Mean write of each token, `[V, L, D]` (of all tokens for one that never came), and that of all."""
    n_layers, d_model = _writes(model, blocks, parts[0][:1, :2]).shape[2:]
    if 8 * vocab_size * n_layers * d_model > TABLE_BYTES:
        raise ValueError(
            f"mean writes of {vocab_size:,} tokens, {n_layers} layers and {d_model} dimensions are more than the "
            f"{TABLE_BYTES / 2**30:.0f} GiB that may be held; token lookup is for small subjects"
        )
    sum_VLD = torch.zeros(vocab_size, n_layers, d_model, dtype=torch.float64)
    count_V = torch.zeros(vocab_size, dtype=torch.int64)
    for ids_BS in parts:
        token_T = ids_BS[:, 1:].flatten()
        write_TLD = _writes(model, blocks, ids_BS)[:, 1:].flatten(0, 1)
        sum_VLD.index_add_(0, token_T, write_TLD.double())
        count_V += token_T.bincount(minlength=vocab_size)
    overall_LD, known_V = sum_VLD.sum(0) / count_V.sum(), count_V > 0
    mean_VLD = sum_VLD / count_V.clamp(min=1)[:, None, None]
    return torch.where(known_V[:, None, None], mean_VLD, overall_LD), overall_LD


def _with_writes(model: nn.Module, blocks: Sequence[nn.Module], ids_BS: Tensor, new_BSLD: Tensor) -> Tensor:
    """The logits where every block adds `new_BSLD` to what it is given."""

    def put(number: int, given: Tensor, returned: Tensor) -> Tensor:
        return (given + new_BSLD[:, :, number].to(given.device, given.dtype)).to(returned.dtype)

    with replacing(blocks, put):
        return run_model(model, ids_BS.to(input_device(model))).logits


def _block_losses(logits: Tensor, ids_BS: Tensor) -> np.ndarray:
    """Mean loss of each block, `[B]`."""
    target_BS = ids_BS[:, 2:].to(logits.device)
    loss_T = F.cross_entropy(logits[:, 1:-1].float().flatten(0, 1), target_BS.flatten(), reduction="none")
    return loss_T.view(target_BS.shape).double().mean(1).cpu().numpy()
