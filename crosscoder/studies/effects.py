"""What features of a dictionary do to the predictions of its model, measured, named and kept."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosscoder.data.blocks import input_device
from crosscoder.data.residuals import ResidualHarvester, find_blocks
from crosscoder.data.stream import ActivationStream
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.dictionary import Dictionary
from crosscoder.dictionary.scale import at_usual_scale, is_raw
from crosscoder.foundation.origin import require_same
from crosscoder.foundation.provenance import describe_run
from crosscoder.measure.effects import MEASURES, N_DRAWS, N_ROWS, By, Effect, measure_effects
from crosscoder.measure.labels import decode
from crosscoder.results.file import Provenance, Results
from crosscoder.results.table import LongTable, Place, Row, Site, rows_at
from triton_kernels import cpu_form

if TYPE_CHECKING:
    from torch import nn

SCALE_TOKENS = 8192
"""Of the text, from which the usual norms of raw activations are taken."""


@dataclass(frozen=True)
class Where:
    """The sites at which features are taken off: block numbers from 1 and their kind, and where the blocks are."""

    layers: tuple[int, ...]
    kind: Site
    blocks_path: str | None = None


def run_effects(
    dictionary: Dictionary,
    model: nn.Module,
    tokens: PreparedTokens,
    features: Sequence[int] | int,
    where: Where,
    *,
    by: By = "use",
    n_text_rows: int = 256,
    n_rows: int = N_ROWS,
    n_draws: int = N_DRAWS,
    each_layer: bool = False,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Results:
    """The effects of features on held-out text, as rows; those of a feature that is never active say so.

    n_text_rows: held-out rows, evenly spread, in which activity is looked for. Other arguments: `measure_effects`.

    Raises:
        MismatchError: model, tokens or layers are not those that the dictionary reads.
        ValueError: as `measure_effects`.
    """
    plain = json.loads(json.dumps(dict(settings or {}), default=str))
    started, blocks, held_out = time.perf_counter(), find_blocks(model, where.blocks_path), tokens.held_out
    if (reads := dictionary.reads) is not None and held_out.origin is not None:
        require_same(reads, replace(reads, tokens=held_out.origin), owner="the dictionary", given="the text")
    dictionary = _at_usual_scale(dictionary, model, held_out, where)
    chosen = torch.linspace(0, len(held_out) - 1, min(len(held_out), n_text_rows)).round().long()
    found = measure_effects(
        dictionary,
        model,
        blocks,
        held_out[chosen].to(input_device(model)),
        held_out.documents[chosen.numpy()],
        features,
        layers=where.layers,
        kind=where.kind,
        by=by,
        n_rows=n_rows,
        n_draws=n_draws,
        each_layer=each_layer,
        seed=seed,
    )
    rows = [row for feature, effect in found.items() for row in _rows(feature, effect, tokens)]
    beyond = [one.beyond(0) for one in found.values() if isinstance(one, Effect)]
    known = [one for one in beyond if one is not None]
    text = held_out.origin.text.source if held_out.origin is not None and held_out.origin.text is not None else ""
    overall = {
        "effect_draws": n_draws,
        "effect_beyond_share": float(np.mean(known)) if known else None,
        "dictionary_reads": str(reads or f"no record; taken to read {where.kind} sites {list(where.layers)}"),
        "tokens_held_out": len(chosen) * held_out.sequence_length,
    }
    provenance = Provenance(
        **describe_run(plain, device={"cpu_kernels": cpu_form()}),
        kind="effects",
        preset="",
        seconds={"effects": round(time.perf_counter() - started, 1)},
        tokens_fingerprint=held_out.fingerprint,
        text=text,
    )
    return Results(LongTable((*rows_at(Place(), overall), *rows)), None, provenance)


def _at_usual_scale(dictionary: Dictionary, model: nn.Module, tokens: TokenBlocks, where: Where) -> Dictionary:
    """`at_usual_scale`, of a copy where it changes something; the scale is that of some of the text."""
    if not is_raw(dictionary):
        return dictionary
    dictionary = copy.deepcopy(dictionary)
    if dictionary.reads is not None:
        dictionary.reads = dictionary.reads.on_tokens(tokens.origin)
    layers = (where.layers[0] - 1, *where.layers) if where.kind == "write" else where.layers
    harvester = ResidualHarvester(model, layers=layers, blocks_path=where.blocks_path)
    stream = ActivationStream(harvester, tokens, max_tokens=SCALE_TOKENS, ahead=False)
    at_usual_scale(dictionary, lambda: stream.site_scale(where.kind))
    return dictionary


def _rows(feature: int, effect: Effect | str, tokens: PreparedTokens) -> list[Row]:
    if isinstance(effect, str):
        return [Row(Place(feature=feature, layer="all"), "effect_kl_active", None, effect)]
    rows = []
    for place, layer in enumerate(effect.places):
        values: dict[str, Any] = {}
        if place == 0:
            up, down = ([repr(decode(tokens.tokenizer, [one])) for one in ids] for ids in effect.changed())
            values = {
                "effect_rate": effect.rate,
                "effect_energy": effect.energy,
                "effect_tokens": int(effect.active_E.sum()),
                "effect_rows": effect.n_measured,
                "effect_documents": len(effect.tokens_E),
                "effect_up": up,
                "effect_down": down,
            }
        for measure in MEASURES:
            values |= {f"effect_{measure}": effect.interval(place, measure)}
            values |= {f"control_{measure}": effect.control(place, measure)}
        rows += rows_at(Place(feature=feature, layer=layer), values | {"effect_beyond": effect.beyond(place)})
    return rows
