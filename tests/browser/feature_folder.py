"""A folder of features made from nothing but a few tensors: of any size, with tokens as hostile as can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from crosscoder import Crosscoder, TopK
from crosscoder.browser.findings import Findings
from crosscoder.browser.folder import write_features
from crosscoder.data.tokens import TokenBlocks
from crosscoder.measure.examples import Activity, Sample, Wanted, hashed
from crosscoder.measure.logits import LogitEffects
from crosscoder.measure.neighbours import Neighbours
from crosscoder.measure.rows import FeatureRows

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\u202egnirts\u202c",
    "\x1b[31mred\x07",
    "\u2028\u2029",
    '"]);alert(3);//',
    "</p>&lt;b&gt;",
    "\n\t\r",
    "\u200b\ufeff",
    "{{7*7}}${7*7}",
    "javascript:alert(4)",
    "\U000e0041",
)
SITES = {"residual": (1, 2), "write": (0, 1, 2)}
"""What is harvested for dictionaries of two blocks."""
PLAIN = (" president", " Presidents", " the", " river", " people", "ing", " 42", " law")


class Words:
    """A tokenizer whose tokens are given texts."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.texts = ("a", *texts)

    def __call__(self, _: str, **__: object) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(self.texts[one] for one in ids)

    def convert_ids_to_tokens(self, one: int) -> str:
        return self.texts[one]


def made(folder: Path, n_features: int = 300, texts: tuple[str, ...] = HOSTILE + PLAIN, layers: int = 4) -> Path:
    """The path of `index.html` of a folder whose features fire on tokens of one text each, and on their neighbours.

    Feature f has its peaks on token `1 + f % len(texts)`, promotes the next one and suppresses the one before; the last
    of every eight never fires.
    """
    random, n_tokens, wanted, context = np.random.default_rng(0), len(texts), Wanted(), 32
    n_blocks = max(80, n_tokens // 3)
    ids = torch.from_numpy(random.permutation(np.arange(n_blocks * context) % n_tokens + 1).reshape(-1, context))
    tokens = TokenBlocks(ids, vocab_size=n_tokens + 1)
    dictionary = Crosscoder(n_layers=layers, d_model=2, n_features=n_features, sparsity=TopK(k=2)).eval()
    activity = Activity(FeatureRows.of(dictionary), context, wanted, n_tokens=n_blocks * context, n_blocks=n_blocks)
    number_V = [np.flatnonzero(ids.flatten().numpy() == one + 1) for one in range(n_tokens)]
    for feature in range(n_features):
        if feature % 8 == 7:
            continue
        _fill(activity, feature, number_V[feature % n_tokens], random)
    activity.sample = Sample(torch.zeros(0, layers, 2), None)  # ty: ignore[invalid-argument-type]
    alive = np.flatnonzero(activity.fired_F)
    own = (alive % n_tokens)[:, None, None] + np.zeros((1, layers + 1, 1), dtype=np.int64)
    promoted = 1 + (own + 1 + np.arange(min(10, n_tokens))) % n_tokens
    suppressed = 1 + (own - 1 - np.arange(min(10, n_tokens))) % n_tokens
    value = np.broadcast_to(np.linspace(1, 0.1, promoted.shape[2]), promoted.shape)
    other = (np.arange(n_features)[:, None] + 1 + np.arange(5)) % n_features
    near = Neighbours(other, np.full_like(other, -1), np.broadcast_to(np.linspace(0.9, 0.3, 5), other.shape))
    findings = Findings(
        dictionary,
        activity,
        tokens,
        tuple(range(5, 5 + layers)),
        precision_FS3=random.random((n_features, layers + 1, 3)),
        effects=LogitEffects(promoted, value, suppressed, -value),
        effect_n=alive,
        nearest={"": near, "seed <b>1</b>": near},
        found_F=random.integers(0, 4, n_features),
        n_alike=3,
    )
    return write_features(findings, Words(texts), folder, quiet=True)  # ty: ignore[invalid-argument-type]


def _fill(activity: Activity, feature: int, number_T: np.ndarray, random: np.random.Generator) -> None:
    wanted, width = activity.wanted, activity.wanted.width
    value_T = (1 + random.random(len(number_T)) * (1 + feature % 5)).astype(np.float32)
    activity.fired_F[feature], activity.largest_F[feature] = len(number_T), value_T.max()
    activity.sum_F[feature] = value_T.sum()
    activity.bins_FH[feature, 40:44] = [len(number_T) - 6, 3, 2, 1]
    activity.in_blocks_F[feature] = 40 * activity.context
    activity.parts_FK[feature] = random.standard_normal(activity.parts_FK.shape[1]) + 1
    for kept, key_T in (
        (activity.strongest, value_T),
        (activity.layered, value_T),
        (activity.sampled, hashed(number_T, np.full_like(number_T, feature), 0)),
    ):
        best = np.argsort(-key_T, kind="stable")[: kept.size]
        kept.key_Fk[feature, : len(best)], kept.token_Fk[feature, : len(best)] = key_T[best], number_T[best]
        kept.value_Fk[feature, : len(best)] = value_T[best]
        shown = np.zeros((len(best), width), np.float32)
        shown[:, wanted.before] = value_T[best]
        shown[:, wanted.before + 1] = value_T[best] / 2
        shown[:, wanted.before - 2] = np.nan
        if "window" in kept.more:
            kept.more["window"][feature, : len(best)] = shown
        else:
            kept.more["parts"][feature, : len(best)] = shown[:, :, None] * random.standard_normal(
                activity.parts_FK.shape[1]
            )
