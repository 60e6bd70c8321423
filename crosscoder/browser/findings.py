"""All that is known of a dictionary's features: gathered from a text, a model and other dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from crosscoder.browser.source import require_same_reads
from crosscoder.data.sources import SiteSource
from crosscoder.data.subject import hash_weights
from crosscoder.data.tokens import TokenBlocks
from crosscoder.dictionary import Dictionary
from crosscoder.foundation.console import say
from crosscoder.foundation.origin import MismatchError
from crosscoder.measure import profile
from crosscoder.measure.examples import Activity, Wanted, read_features
from crosscoder.measure.layer_reading import layer_precision
from crosscoder.measure.logits import LogitEffects, Readout, find_readout, logit_effects
from crosscoder.measure.neighbours import Neighbours, are_found, nearest_features
from crosscoder.measure.rows import FeatureRows

READOUT_TOKENS = 8192
"""Tokens, evenly spread over the text, that the final norm and its scale are found on."""


@dataclass(frozen=True)
class Findings:
    """What is known of the features of one dictionary on one text.

    sites: block numbers of its layers. effects: of the features `effect_n`; None, with the reason in `no_effects`.
    nearest: by the name of a dictionary, its own is "". found_F: in how many of `n_alike` others of the same form each
    feature is found; None where there is none.
    """

    dictionary: Dictionary
    activity: Activity
    tokens: TokenBlocks
    sites: tuple[int, ...]
    precision_FS3: np.ndarray | None = None
    readout: Readout | None = None
    effects: LogitEffects | None = None
    effect_n: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    no_effects: str = ""
    nearest: Mapping[str, Neighbours] = field(default_factory=dict)
    found_F: np.ndarray | None = None
    n_alike: int = 0

    def __len__(self) -> int:
        return len(self.activity.fired_F)

    @property
    def layer_names(self) -> list[str]:
        """What each layer of the dictionary is called: its block, of MLPs also which end of it."""
        if self.dictionary.reads is None or self.dictionary.reads.site != "mlp":
            return [str(site) for site in self.sites]
        half = len(self.sites) // 2
        return [f"{site} {'in' if i < half else 'out'}" for i, site in enumerate(self.sites)]

    @cached_property
    def decoder_FKD(self) -> np.ndarray:
        """Decoder rows in the scale of the dictionary's inputs."""
        return self.activity.rows.decoder_FKD.float().cpu().numpy()

    @cached_property
    def norm_FL(self) -> np.ndarray:
        """Norms of what features write, by layer, in that scale."""
        return self.activity.rows.norm_FL()

    @cached_property
    def profile_FL(self) -> np.ndarray:
        return profile.shares(np.square(self.norm_FL.astype(np.float64)))

    @cached_property
    def use_FL(self) -> np.ndarray:
        return self.activity.use_FL

    @cached_property
    def direction_FL(self) -> np.ndarray | None:
        """Cosine of each layer's row with the strongest layer's; None for a bank, or one layer."""
        if self.activity.rows.is_bank or len(self.sites) < 2:
            return None
        return profile.strongest_layer_cosine(self.decoder_FKD, self.profile_FL)

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The number that each feature has in each column of `words.COLUMNS`; nan where it has none."""
        activity, n = self.activity, len(self)
        fired = activity.fired_F > 0
        drift_F = np.full(n, np.nan)
        if self.direction_FL is not None:
            drift_F = profile.adjacent_cosine(self.decoder_FKD, self.profile_FL)
        return {
            "rate": activity.rate_F,
            "largest": np.where(fired, activity.largest_F, np.nan),
            "mean": np.divide(activity.sum_F, activity.fired_F, out=np.full(n, np.nan), where=fired),
            "spread": profile.participation_ratio(self.profile_FL),
            "use": np.where(fired, profile.participation_ratio(profile.shares(np.abs(self.use_FL))), np.nan),
            "density": activity.density_F,
            "stability": np.full(n, np.nan) if self.found_F is None else self.found_F / self.n_alike,
            "drift": drift_F,
        }


def find_features(
    dictionary: Dictionary,
    source: SiteSource,
    tokens: TokenBlocks,
    *,
    model: nn.Module | None = None,
    blocks_path: str | None = None,
    others: Mapping[str, Dictionary] | None = None,
    wanted: Wanted | None = None,
    nearest: int = 5,
    n_text: int | None = None,
    quiet: bool = False,
) -> Findings:
    """What is known of every feature after one pass over the held-out tokens of `source`, `tokens`' activations at the
    dictionary's scale.

    model: that the dictionary reads, for logit effects. others: dictionaries over the same layers, by name: nearest
    features are sought in each, and features are stable that are found in those of the same form. n_text: tokens of the
    vocabulary that are text.
    """
    require_same_reads(dictionary.reads, source.reads, given="the activations")
    for name, other in (others or {}).items():
        require_same_reads(dictionary.reads, other.reads, given=name)
    read = source.held_out_activations
    batches = source.marked_on(dictionary.encoder.device)
    activity = read_features(
        dictionary, batches, context=read.context, n_tokens=read.n_tokens, wanted=wanted, quiet=quiet
    )
    rows, known = activity.rows, dict[str, Any]()
    if model is not None:
        known = _effects(dictionary, model, activity, tokens, blocks_path, n_text, quiet=quiet)
    theirs = {
        name: FeatureRows.of(other).scaled(dictionary.input_scale / other.input_scale)
        for name, other in (others or {}).items()
    }
    found: dict[str, Neighbours] = {}
    if nearest:
        found[""] = nearest_features(rows, most=nearest, quiet=quiet)
        found |= {name: nearest_features(rows, other, most=nearest, quiet=quiet) for name, other in theirs.items()}
    alike = [one for one in theirs.values() if one.decoder_FKD.shape[1:] == rows.decoder_FKD.shape[1:]]
    return Findings(
        dictionary,
        activity,
        tokens,
        source.sites,
        precision_FS3=layer_precision(activity, quiet=quiet),
        nearest=found,
        found_F=sum(are_found(rows, one).astype(np.int64) for one in alike) if alike else None,  # ty: ignore[invalid-argument-type]
        n_alike=len(alike),
        **(
            {"no_effects": "No model was given, so the effect on the next token is not known."}
            if model is None
            else known
        ),
    )


def _effects(
    dictionary: Dictionary,
    model: nn.Module,
    activity: Activity,
    tokens: TokenBlocks,
    blocks_path: str | None,
    n_text: int | None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Logit effects of the features that are active at all, or why there are none."""
    try:
        readout = find_readout_of(dictionary, model, tokens, blocks_path=blocks_path)
    except MismatchError:
        raise
    except ValueError as error:
        say(f"no logit effects: {error}")
        return {"no_effects": f"The effect on the next token is not known: {error}."}
    chosen = np.flatnonzero(activity.fired_F)
    effects = logit_effects(dictionary, readout, chosen, n_tokens=n_text, quiet=quiet)
    return {"readout": readout, "effects": effects, "effect_n": chosen}


def find_readout_of(
    dictionary: Dictionary, model: nn.Module, tokens: TokenBlocks, *, blocks_path: str | None = None
) -> Readout:
    """`find_readout` of the model that a dictionary reads, on some of the tokens."""
    reads = dictionary.reads
    known = "" if reads is None else reads.model.weights  # empty for a dictionary that others published
    if reads is not None and known and (weights := hash_weights(model)) != known:
        raise MismatchError(
            f"the dictionary reads {reads.model.name} ({reads.model.weights[:8]}), the model given has the weights "
            f"{weights[:8]}: its logits say nothing of these features; give that model with --subject"
        )
    n_blocks = min(len(tokens), max(1, READOUT_TOKENS // tokens.sequence_length))
    spread = torch.linspace(0, len(tokens) - 1, n_blocks).round().long()
    ids_BS, keep_outliers = tokens[spread], reads is not None and reads.keep_outliers
    kept_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    kept_BS[:, : min(1 if reads is None else reads.skip_positions, tokens.sequence_length - 1)] = False
    if tokens.origin is not None and not keep_outliers:
        kept_BS &= ~torch.isin(ids_BS, torch.tensor(tokens.origin.special_ids, dtype=ids_BS.dtype))
    return find_readout(model, ids_BS, blocks_path=blocks_path, kept_BS=kept_BS, keep_outliers=keep_outliers)
