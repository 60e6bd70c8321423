"""What single features of a dictionary mean, for a notebook: examples, effects on the next token, layers.

    examples = top_examples(dictionary, model, tokens, [12, 40])
    print(examples[12][0])  # 8.31  the people of the [United] States of America

The whole dictionary as files and as a page: `crosscoder features`, `docs/features.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from torch import nn

from crosscoder.browser.findings import Findings, find_readout_of
from crosscoder.browser.records import Records
from crosscoder.browser.source import source_of
from crosscoder.browser.tokens import TokenTexts, visible
from crosscoder.data.sources import SiteSource
from crosscoder.data.tokenizer import count_ids
from crosscoder.data.tokens import PreparedTokens
from crosscoder.dictionary import Dictionary
from crosscoder.measure import logits
from crosscoder.measure.examples import Activity, Wanted, read_features
from crosscoder.measure.profile import shares
from crosscoder.measure.rows import FeatureRows

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Example:
    """A token on which a feature is active, in its context. Activations are nan where the dictionary does not read."""

    activation: float
    tokens: list[str]
    activations: list[float]
    peak: int
    """The place of the token among `tokens`."""
    block: int
    position: int

    def __str__(self) -> str:
        marked = [f"[{one}]" if i == self.peak else one for i, one in enumerate(map(visible, self.tokens))]
        return f"{self.activation:.3g}  {''.join(marked)}"


class Effect(NamedTuple):
    """Tokens that one row promotes and suppresses, each with the logits that an activation of 1 adds."""

    row: str
    """A site of the model, or "sum"."""
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


class LayerProfile(NamedTuple):
    """How features lie over the layers, `[n, L]`: shares of the squared decoder norm and, where a text was read, of
    what moves them."""

    written_nL: np.ndarray
    read_nL: np.ndarray | None


def top_examples(
    dictionary: Dictionary,
    model: nn.Module,
    tokens: PreparedTokens,
    features: Sequence[int],
    *,
    most: int = 10,
    before: int = 16,
    after: int = 7,
    split: Split = "held_out",
    max_tokens: int | None = 50_000,
    quiet: bool = True,
) -> dict[int, list[Example]]:
    """The strongest examples of features, of different blocks of text, the strongest first.

    features: their numbers, of a bank `layer * F + feature`. max_tokens: how many to read at least, in whole blocks
    evenly spread over the split; None: all.

    Raises:
        MismatchError: the dictionary reads another model, other tokens, or a null.
        ValueError: there is no such feature, or the dictionary keeps no record of what it reads.
    """
    _require_features(dictionary, features)
    wanted = Wanted(strongest=most, sampled=0, before=before, after=after)
    source, blocks = _source(dictionary, model, tokens, split, max_tokens), getattr(tokens, split)
    activity, texts = _read(dictionary, source, wanted, quiet=quiet), TokenTexts(tokens.tokenizer)
    records = Records(Findings(dictionary, activity, blocks, source.sites))
    return {
        feature: [
            Example(one.activation, texts.of(one.ids), one.activations.tolist(), one.peak, one.block, one.position)
            for one in records.strongest(feature)
        ]
        for feature in features
    }


def logit_effects(
    dictionary: Dictionary,
    model: nn.Module,
    tokens: PreparedTokens,
    features: Sequence[int],
    *,
    most: int = 10,
    split: Split = "held_out",
) -> dict[int, list[Effect]]:
    """The tokens that features promote and suppress: by each layer's decoder row, then by their sum.

    The direct effect through the final norm and the head, as `measure.logits` says; the mean token is that of the
    tokens. A feature of a bank has one row.

    Raises:
        MismatchError: the dictionary reads another model.
        ValueError: there is no such feature, or the model's final norm is of no form that is known.
    """
    _require_features(dictionary, features)
    readout = find_readout_of(dictionary, model, getattr(tokens, split))
    n_text, texts = count_ids(tokens.tokenizer), TokenTexts(tokens.tokenizer)
    effects = logits.logit_effects(dictionary, readout, list(features), most=most, n_tokens=n_text)
    sites = range(1, dictionary.config.n_layers + 1) if dictionary.reads is None else dictionary.reads.sites
    layer_FK, found = FeatureRows.of(dictionary).layer_FK, dict[int, list[Effect]]()
    for place, feature in enumerate(features):
        names = [*(str(sites[layer]) for layer in layer_FK[feature].tolist()), "sum"]
        each = [[one[place, row] for one in effects] for row in range(effects[0].shape[1])]
        found[feature] = [
            Effect(name, *(list(zip(texts.of(ids), values.tolist())) for ids, values in ((up, gain), (down, loss))))
            for name, (up, gain, down, loss) in zip(names, each, strict=False)
        ]
    return found


def layer_profile(
    dictionary: Dictionary,
    features: Sequence[int],
    *,
    model: nn.Module | None = None,
    tokens: PreparedTokens | None = None,
    split: Split = "held_out",
    max_tokens: int | None = 50_000,
) -> LayerProfile:
    """How features lie over the layers: by decoder norm and, with a model and tokens, by use.

    written: each layer's share of the squared norm of the decoder's rows, in the scale of the dictionary's inputs, at
    which all layers have equal norm. read: a layer's mean part of the pre-activation, `<encoder_l, x_l - center_l>`,
    over tokens on which the feature is active, over the sum of all layers' magnitudes; from -1 to 1, 0 for a feature
    that is never active.
    """
    _require_features(dictionary, features)
    chosen, rows = list(features), FeatureRows.of(dictionary)
    written_nL = shares(np.square(rows.norm_FL()[chosen].astype(np.float64)))
    if model is None or tokens is None:
        return LayerProfile(written_nL, None)
    source = _source(dictionary, model, tokens, split, max_tokens)
    return LayerProfile(written_nL, _read(dictionary, source, Wanted(strongest=0, sampled=0)).use_FL[chosen])


def _source(
    dictionary: Dictionary, model: nn.Module, tokens: PreparedTokens, split: Split, max_tokens: int | None
) -> SiteSource:
    return source_of(dictionary, model, getattr(tokens, split), max_tokens=max_tokens)


def _read(dictionary: Dictionary, source: SiteSource, wanted: Wanted, *, quiet: bool = True) -> Activity:
    read = source.held_out_activations
    known = {"context": read.context, "n_tokens": read.n_tokens, "wanted": wanted, "quiet": quiet}
    return read_features(dictionary, source.marked_on(dictionary.encoder.device), **known)


def _require_features(dictionary: Dictionary, features: Sequence[int]) -> None:
    n_features = len(FeatureRows.of(dictionary))
    wrong = [one for one in features if not 0 <= one < n_features]
    if wrong or not list(features):
        raise ValueError(f"features {wrong or 'none'}; expected numbers from 0 to {n_features - 1}")
