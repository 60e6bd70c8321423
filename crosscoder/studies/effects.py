"""What features of a dictionary do to the predictions of its model, measured, named and kept."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosscoder.browser.findings import find_readout_of
from crosscoder.data.blocks import input_device
from crosscoder.data.residuals import ResidualHarvester, find_blocks
from crosscoder.data.stream import ActivationStream
from crosscoder.data.tokenizer import count_ids
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.dictionary import Dictionary
from crosscoder.dictionary.scale import at_usual_scale, is_raw
from crosscoder.foundation.console import say
from crosscoder.foundation.origin import MismatchError, require_same
from crosscoder.foundation.provenance import describe_run
from crosscoder.measure.effects import CONTROLS, MEASURES, N_DRAWS, N_ROWS, STEERED, By, Effect, measure_effects
from crosscoder.measure.labels import decode
from crosscoder.measure.logits import Readout
from crosscoder.results.file import Provenance, Results
from crosscoder.results.table import LongTable, Place, Row, Site, rows_at
from triton_kernels import cpu_form

if TYPE_CHECKING:
    from torch import nn

SCALE_TOKENS = 8192
"""Of the text, from which the usual norms of raw activations are taken."""
BEYOND = {"kl": (0, "kl_active"), "promoted": (0, "promoted"), "steered": (-1, "promoted")}
"""What a feature should do, by key: at which of its places, and the measure."""


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
    ids_RS = held_out[chosen]
    found = measure_effects(
        dictionary,
        model,
        blocks,
        ids_RS.to(input_device(model)),
        held_out.documents[chosen.numpy()],
        features,
        layers=where.layers,
        kind=where.kind,
        readout=_readout(dictionary, model, held_out, where),
        n_text=count_ids(tokens.tokenizer),
        by=by,
        n_rows=n_rows,
        n_draws=n_draws,
        each_layer=each_layer,
        seed=seed,
    )
    rows = [row for feature, effect in found.items() for row in _rows(feature, effect, tokens)]
    text = held_out.origin.text.source if held_out.origin is not None and held_out.origin.text is not None else ""
    overall = {
        "effect_draws": n_draws,
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
    return Results(LongTable((*rows_at(Place(), overall), *_shares(found.values()), *rows)), None, provenance)


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


def _readout(dictionary: Dictionary, model: nn.Module, tokens: TokenBlocks, where: Where) -> Readout | None:
    """The model's readout; where it has none of a form that is known, that is said."""
    try:
        return find_readout_of(dictionary, model, tokens, blocks_path=where.blocks_path)
    except MismatchError:
        raise
    except ValueError as error:
        say(f"no promoted tokens: {error}")
        return None


def _shares(found: Collection[Effect | str]) -> Iterator[Row]:
    """Shares of features beyond each control."""
    for control in CONTROLS:
        for key, (place, measure) in BEYOND.items():
            each = [one.beyond(place, measure, control) for one in found if isinstance(one, Effect)]
            known = [one for one in each if one is not None]
            yield from rows_at(Place(kind=control), {f"beyond_{key}_share": float(np.mean(known)) if known else None})


def _rows(feature: int, effect: Effect | str, tokens: PreparedTokens) -> list[Row]:
    if isinstance(effect, str):
        return [Row(Place(feature=feature, layer="all"), "effect_kl_active", None, effect)]

    def texts(ids: Sequence[int]) -> list[str]:
        return [repr(decode(tokens.tokenizer, [one])) for one in ids]

    up, down = effect.changed()
    rows = rows_at(
        Place(feature=feature, layer="all"),
        {
            "effect_rate": effect.rate,
            "effect_energy": effect.energy,
            "effect_tokens": int(effect.moved_EP[:, 0].sum()),
            "effect_rows": effect.n_measured,
            "effect_documents": len(effect.tokens_E),
            "effect_up": texts(up),
            "effect_down": texts(down),
            "promoted_tokens": texts(effect.promoted_m),
            "steered_by": effect.usual,
        },
    )
    for place, layer in enumerate(effect.places):
        is_steered = layer == STEERED
        at = Place(feature=feature, layer="all" if is_steered else layer)
        if is_steered and not effect.moved_EP[:, place].sum():
            continue
        names = {one: f"effect_{one}" for one in MEASURES}
        if is_steered:
            names = {"kl_active": "steered_kl", "promoted": "steered_promoted"}
        if not effect.promoted_m:
            names.pop("promoted")
        rows += rows_at(at, {key: effect.interval(place, one) for one, key in names.items()})
        for control in CONTROLS:
            values: dict[str, Any] = {
                key if is_steered else key.replace("effect", "control"): effect.control(place, one, control)
                for one, key in names.items()
            }
            for key, (which, one) in BEYOND.items():
                if (which == -1) == is_steered and one in names:
                    values[f"beyond_{key}"] = effect.beyond(place, one, control)
            rows += rows_at(replace(at, kind=control), values)
    return rows
