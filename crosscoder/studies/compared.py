"""Dictionaries of one model compared on one text: each is read once, every two are matched, and all of it is kept."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.data.sites import choose_sites
from crosscoder.data.sources import Activations, SiteSource
from crosscoder.dictionary import Dictionary, load_dictionary
from crosscoder.dictionary.scale import at_usual_scale
from crosscoder.foundation.artifact import replace_file
from crosscoder.foundation.console import Progress, say
from crosscoder.foundation.provenance import describe_run
from crosscoder.measure.between import NULL_DRAWS, Between, compare_sides
from crosscoder.measure.sides import Side, Uses, describe_side, make_side
from crosscoder.results.file import Provenance, Results
from crosscoder.results.table import LongTable, Place, Row, rows_at
from crosscoder.studies.cells import evaluate_dictionary
from triton_kernels import cpu_form

FEATURES = "features.parquet"
MOST = 26  # dictionaries; they are called by letters


@dataclass(frozen=True)
class Compared:
    """The sides in the order given, every two of them, and in how many others each feature is found, `[F]` a side."""

    sides: tuple[Side, ...]
    pairs: tuple[Between, ...]
    found_in: tuple[np.ndarray, ...]


def compare_dictionaries(
    paths: Sequence[str],
    held_out: Activations,
    *,
    raw_inputs: bool = False,
    device: str = "cpu",
    null_draws: int = NULL_DRAWS,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Results, Compared]:
    """Dictionaries read on the held-out activations of their model, and every two of them compared.

    They are called A, B, C in the order given. One dictionary is in memory at a time; of each stay its alive features'
    decoder rows and activity. A dictionary of other layers than another is read at its own.

    raw_inputs: those that keep no scale of their inputs read activations as the model gives them.
    """
    if not 2 <= len(paths) <= MOST:
        raise ValueError(f"{len(paths)} dictionaries are given; expected two or more, at most {MOST}")
    plain = json.loads(json.dumps(dict(settings or {}), default=str))
    started, seconds, sides, rows = time.perf_counter(), dict[str, float](), [], []
    for i, path in enumerate(paths):
        name = chr(ord("A") + i)
        side, found = _read_side(name, path, held_out, raw_inputs=raw_inputs, device=device)
        sides.append(side)
        rows += [Row(Place(dictionary=name), "dictionary_path", str(path)), *found]
    seconds["reading"] = round(time.perf_counter() - started, 1)
    if len({side.kind for side in sides}) > 1:
        say("note: the dictionaries read sites of several kinds, so that what they write is compared within kinds only")
    text = held_out.token_T.numpy(), held_out.document_T.numpy()
    pairs = []
    for first, second in combinations(sides, 2):
        pairs.append(compare_sides(first, second, *text, null_draws=null_draws, seed=seed))
        rows += pairs[-1].rows()
    seconds["comparing"] = round(time.perf_counter() - started - seconds["reading"], 1)
    compared = Compared(tuple(sides), tuple(pairs), _count_found(sides, pairs))
    rows += _stability_rows(compared)
    run = describe_run(plain, device={"cpu_kernels": cpu_form()})
    origin = held_out.harvested
    of_text = origin.tokens.text if origin is not None else None
    provenance = Provenance(
        **run,
        kind="dictionaries",
        preset="",
        seconds=seconds,
        tokens_fingerprint=held_out.fingerprint,
        text=of_text.source if of_text is not None else "",
    )
    return Results(LongTable(tuple(rows)), None, provenance), compared


def _read_side(name: str, path: str, held_out: Activations, *, raw_inputs: bool, device: str) -> tuple[Side, list[Row]]:
    dictionary: Dictionary = load_dictionary(path).to(device)
    keeps_scale = dictionary.reads is not None or bool((dictionary.input_scale != 1).any())
    dictionary.require_input_scale("comparison", raw_inputs=raw_inputs and not keeps_scale)
    if dictionary.reads is None:
        say(f"warning: {name} keeps no record of what it reads, so nobody checks that it belongs to these activations")
    own, kind = choose_sites(held_out, dictionary.reads, owner=f"{name} ({path})")
    at_usual_scale(dictionary, lambda: own.site_scale(kind))
    source, uses = SiteSource(own, own, kind, scale_L=dictionary.input_scale), Uses(dictionary)
    with Progress(f"reading {name}", own.n_tokens, unit="token") as progress:

        def watch(batch: Any, code: Any) -> None:
            uses(batch, code)
            progress.advance(len(batch.token_B))

        reading = evaluate_dictionary(dictionary, source, device=device, watch=watch, owner=f"{name} ({path})")
    side = make_side(name, dictionary, reading, uses, source.sites)
    say(f"{name}: {len(reading):,} of {reading.size:,} features are alive; counting those that are distinct")
    return side, describe_side(side, dictionary)


def _count_found(sides: Sequence[Side], pairs: Sequence[Between]) -> tuple[np.ndarray, ...]:
    found = {side.name: np.zeros(len(side.reading), dtype=np.int64) for side in sides}
    for pair in pairs:
        for side, index_m in zip((pair.first, pair.second), pair.pairs_m2.T, strict=True):
            found[side.name][index_m] += 1
    return tuple(found.values())


def _stability_rows(compared: Compared) -> list[Row]:
    n_others, rows = len(compared.sides) - 1, list[Row]()
    for side, found_F in zip(compared.sides, compared.found_in, strict=True):
        counts = np.bincount(found_F, minlength=n_others + 1)
        values = {"found_in": counts.tolist(), "found_everywhere": float(counts[-1] / counts.sum())}
        rows += rows_at(Place(dictionary=side.name), values)
    return rows


def write_features(compared: Compared, folder: Path) -> None:
    """Write the features as Parquet: a line for each alive feature of a dictionary and each other dictionary.

    `feature`, `match` and `written_match` are numbers in the dictionaries; layers are blocks; nulls are undefined.
    """
    import pyarrow as pa
    from pyarrow import parquet

    parts = []
    for pair in compared.pairs:
        for side, other, found in (
            (pair.first, pair.second, pair.forward),
            (pair.second, pair.first, pair.backward),
        ):
            reading, own = side.reading, next(i for i, one in enumerate(compared.sides) if one is side)
            sites, other_sites, n = np.array(side.sites), np.array(other.sites), len(side.reading)
            written_F = found.written_match_F
            columns = {
                "dictionary": np.full(n, side.name),
                "feature": reading.index_F,
                "layer": sites[side.strongest_F],
                "rate": reading.probability_F,
                "energy_share": reading.energy_F / reading.energy_F.sum(),
                **{f"spread_{key.removesuffix('_F')}": value for key, value in vars(side.spreads).items()},
                "found_in": compared.found_in[own],
                "other": np.full(n, other.name),
                "match": other.reading.index_F[found.match_F],
                "match_layer": other_sites[other.strongest_F[found.match_F]],
                "correlation": found.best_F,
                "null_percentile": found.percentile_F,
                "one_to_one": found.partner_F >= 0,
                "match_cosine": found.match_cosine_F,
                "written_match": pa.array(other.reading.index_F[written_F], mask=written_F < 0),
                "written_cosine": found.written_F,
            }
            table = pa.table({key: pa.array(value, from_pandas=True) for key, value in columns.items()})
            parts.append(table)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    parquet.write_table(pa.concat_tables(parts), buffer)
    replace_file(folder / FEATURES, buffer.getvalue())
