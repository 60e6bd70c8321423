"""The features of a dictionary that write most, each with what a reader wants to know of it first."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from crosscoder.data.tokens import PreparedTokens
from crosscoder.measure.causal import CausalLayers
from crosscoder.measure.counting import LINK
from crosscoder.measure.labels import decode
from crosscoder.measure.matching import activation_correlation
from crosscoder.measure.profile import layer_profile, participation_ratio
from crosscoder.measure.reading import Reading

MOST, AMONG = 10, 500  # features that are described, of so many that write most
PEAKS = 20  # tokens on which a feature is most active
SAID = 3  # of their ids, the most frequent
SHOWN, BEFORE, BEHIND = 3, 12, 6  # examples of different blocks, and tokens around their peaks
PEAK, NEXT = "⟦⟧", " ¶ "
"""Around the token of an example, and between examples."""


def describe_strongest(reading: Reading, scale_L: np.ndarray, tokens: PreparedTokens) -> dict[str, Any]:
    """What is known of the features with the most energy E[f^2] |W|^2, the largest first; of features that are active
    together (`distinct_strongest`) of the largest alone.

    `top_features` has a row a feature: number, share of all energy, firing rate, rho, strongest layer (from 0), that
    layer's share. `top_feature_tokens` has a text a feature: the tokens on which it is most active;
    `top_feature_examples` the text around some of them.

    scale_L: the dictionary's `input_scale`; rho and shares are of rows in the subject's own units. tokens: the blocks
    that `Reading.token_T` numbers.
    """
    total, id_T = float(reading.energy_F.sum()), tokens.held_out[:].numpy().reshape(-1)[reading.token_T]
    profile_FL = layer_profile(reading.decoder_FLD / np.asarray(scale_L)[:, None])
    rho_F, rows, said, examples = participation_ratio(profile_FL), list[list[float]](), list[str](), list[str]()
    for one in distinct_strongest(reading):
        layer = int(profile_FL[one].argmax())
        energy = reading.energy_F[one] / total if total else 0.0
        found = (reading.index_F[one], energy, reading.probability_F[one], rho_F[one], layer, profile_FL[one, layer])
        rows.append([float(value) for value in found])
        said.append(", ".join(repr(decode(tokens.tokenizer, [one])) for one in peak_ids(reading, one, id_T)))
        examples.append(NEXT.join(peak_texts(reading, one, tokens)))
    return {"top_features": rows, "top_feature_tokens": said, "top_feature_examples": examples}


def distinct_strongest(reading: Reading) -> list[int]:
    """Places of the features that write most, but for those whose activations correlate by `LINK` with a chosen one's:
    a dictionary that is not trained to the end has many of one thing. Fewer than `MOST` where `AMONG` have no more."""
    order = np.argsort(-reading.energy_F, kind="stable")[:AMONG]
    code = reading.code[:, order].astype(np.float64)
    alike_KK = activation_correlation(code, code).whole() >= LINK
    chosen: list[int] = []
    for place in range(len(order)):
        if len(chosen) < MOST and not alike_KK[place, chosen].any():
            chosen.append(place)
    return order[chosen].tolist()


def peak_ids(reading: Reading, feature: int, id_T: np.ndarray) -> list[int]:
    """The most frequent ids among the tokens on which a feature (its place in the reading) is most active."""
    counted = Counter(id_T[_by_activation(reading, feature)[:PEAKS]].tolist())
    return [int(one) for one, _ in counted.most_common(SAID)]


def peak_texts(reading: Reading, feature: int, tokens: PreparedTokens) -> list[str]:
    """The text around the tokens on which a feature is most active, of different blocks."""
    blocks, found = tokens.held_out[:].numpy(), dict[int, str]()
    assert reading.token_T is not None
    for number in reading.token_T[_by_activation(reading, feature)].tolist():
        block, at = divmod(number, blocks.shape[1])
        if block not in found:
            ids, (opens, closes) = blocks[block], PEAK
            parts = ids[max(0, at - BEFORE) : at], ids[at : at + 1], ids[at + 1 : at + 1 + BEHIND]
            before, peak, behind = (decode(tokens.tokenizer, part.tolist()) if len(part) else "" for part in parts)
            found[block] = f"{before}{opens}{peak}{closes}{behind}"
        if len(found) == SHOWN:
            break
    return list(found.values())


def _by_activation(reading: Reading, feature: int) -> np.ndarray:
    """Which tokens of a reading a feature is active on, the strongest first."""
    start, end = reading.code.indptr[feature : feature + 2]
    return reading.code.indices[start:end][np.argsort(-reading.code.data[start:end], kind="stable")]


def describe_effects(effects: CausalLayers) -> dict[str, Any]:
    """`causal_by_feature`: number and causal layers of each feature that has an effect."""
    each = zip(effects.feature_n.tolist(), effects.layers_n.tolist(), strict=True)
    return {"causal_by_feature": [[float(one), layers] for one, layers in each if layers > 0]}
