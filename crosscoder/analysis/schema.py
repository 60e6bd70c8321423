"""What a study's `results.json` may hold: `validate_results` refuses anything else by its path.

The keys, their units and their meaning are documented in `docs/results.md`. A specification is a function of
`(value, path)` that raises; larger ones are built from smaller ones below.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any, NoReturn

SCHEMA = "crosscoder.results/1"
SITES = ("residual", "write")
ARMS = ("crosscoder", "layerwise")
STATES = ("trained", "untrained")
ROLES = ("main", "size", "k")
GROUPS = ("subject", "per-layer", "cross-layer", "control")
KINDS = ("aspect_ratio", "subject_study")
MAX_HEATMAP_ROWS = 200
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")  # becomes an anchor and a label: no spaces, no markup
_MAX_DEPTH = 32
_LARGEST = 1e30  # beyond this, infinite or nonsense; NaN fails the comparison too

Spec = Callable[[Any, str], None]


def _fail(path: str, expected: str, seen: Any) -> NoReturn:
    shown = repr(seen)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    raise ValueError(f"{path}: expected {expected}, got {shown}")


def text(value: Any, path: str) -> None:
    """A string that UTF-8 can hold."""
    if not isinstance(value, str):
        _fail(path, "a string", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        _fail(path, "a string that UTF-8 can hold", value)


def number(value: Any, path: str) -> None:
    """A finite number; True and False are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        _fail(path, "a number", value)
    if not abs(value) < _LARGEST:
        _fail(path, "a finite number (write null where a quantity is undefined)", value)


def share(value: Any, path: str) -> None:
    """A number from 0 to 1."""
    number(value, path)
    if not -1e-9 <= value <= 1 + 1e-9:
        _fail(path, "a share between 0 and 1", value)


def count(value: Any, path: str) -> None:
    """A whole number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LARGEST:
        _fail(path, "a whole number of 0 or more", value)


def boolean(value: Any, path: str) -> None:
    """True or False."""
    if not isinstance(value, bool):
        _fail(path, "true or false", value)


def plain(value: Any, path: str, depth: int = 0) -> None:
    """Any JSON value without NaN, Infinity or absurd nesting."""
    if depth > _MAX_DEPTH:
        _fail(path, f"at most {_MAX_DEPTH} levels", value)
    if isinstance(value, dict):
        for key, item in value.items():
            text(key, f"{path} (key)")
            plain(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            plain(item, f"{path}[{i}]", depth + 1)
    elif isinstance(value, str):
        text(value, path)
    elif value is not None and not isinstance(value, bool):
        number(value, path)


def optional(spec: Spec) -> Spec:
    """`spec`, or null."""

    def check(value: Any, path: str) -> None:
        if value is not None:
            spec(value, path)

    return check


def either(first: Spec, second: Spec, expected: str) -> Spec:
    """`first` or `second`."""

    def check(value: Any, path: str) -> None:
        for spec in (first, second):
            try:
                spec(value, path)
            except ValueError:
                continue
            return
        _fail(path, expected, value)

    return check


def one_of(*options: str) -> Spec:
    """One of these strings."""

    def check(value: Any, path: str) -> None:
        if value not in options:
            _fail(path, f"one of {list(options)}", value)

    return check


def list_of(spec: Spec, *, least: int = 0, exactly: int | None = None) -> Spec:
    """A list whose items meet `spec`."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, list | tuple):
            _fail(path, "a list", value)
        if exactly is not None and len(value) != exactly:
            _fail(path, f"a list of {exactly}", value)
        if len(value) < least:
            _fail(path, f"a list of at least {least}", value)
        for i, item in enumerate(value):
            spec(item, f"{path}[{i}]")

    return check


def keyed_by_name(spec: Spec, *, least: int = 0) -> Spec:
    """A table with free keys (letters, digits, '_', '.', '-'), each holding `spec`."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            _fail(path, "a table", value)
        if len(value) < least:
            _fail(path, f"a table with at least {least} entries", value)
        for key, item in value.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                _fail(path, "keys of letters, digits, '_', '.', '-' that start with a letter", key)
            spec(item, f"{path}.{key}")

    return check


def table(fields: dict[str, Spec], *, may_lack: tuple[str, ...] = (), open_ended: bool = False) -> Spec:
    """A table with exactly these keys, less some of `may_lack`; `open_ended` lets others hold any plain value."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            _fail(path, f"a table with {list(fields)}", value)
        missing = [key for key in fields if key not in value and key not in may_lack]
        if missing:
            raise ValueError(f"{path}: expected the key {missing[0]!r}, got only {sorted(map(str, value))}")
        for key, item in value.items():
            if key in fields:
                fields[key](item, f"{path}.{key}")
            elif open_ended:
                plain(item, f"{path}.{key}")
            else:
                raise ValueError(f"{path}: got the unknown key {key!r}, expected only {list(fields)}")

    return check


def seed_range(value: Any, path: str) -> None:
    """`{"mean", "low", "high"}` over dictionary seeds."""
    table({"mean": number, "low": number, "high": number})(value, path)
    if value["low"] > value["high"]:
        _fail(path, "low <= high", value)


def _histogram(value: Any, path: str) -> None:
    table({"edges": list_of(share, least=2), "counts": list_of(number)})(value, path)
    edges = value["edges"]
    if len(value["counts"]) != len(edges) - 1:
        _fail(f"{path}.counts", f"{len(edges) - 1} counts for {len(edges)} edges", value["counts"])
    if any(b <= a for a, b in itertools.pairwise(edges)):
        _fail(f"{path}.edges", "increasing edges", edges)


def _heatmap(cell: dict[str, Any], path: str) -> None:
    rows, n_layers = cell["heatmap"], len(cell["layers"])
    if len(rows) > MAX_HEATMAP_ROWS:
        _fail(f"{path}.heatmap", f"at most {MAX_HEATMAP_ROWS} features", f"{len(rows)} features")
    for i, row in enumerate(rows):
        if len(row) != n_layers:
            _fail(f"{path}.heatmap[{i}]", f"{n_layers} shares, one a label in layers", row)
        if abs(sum(row) - 1) > 0.01:
            _fail(f"{path}.heatmap[{i}]", "shares that sum to 1", sum(row))


def _spread_cell(value: Any, path: str) -> None:
    _SPREAD_FIELDS(value, path)
    _heatmap(value, path)


_maybe = optional(number)
_summary = keyed_by_name(optional(seed_range))
_PARAMETERS = table({"non_embedding": count, "embedding": count, "norms": count})
_CURVE_POINT = table({"step": count, "tokens": count, "held_out_loss": number})
_SUBJECT = table(
    {
        "name": text,
        "n_layers": count,
        "d_model": count,
        "parameters": _PARAMETERS,
        "neurons_per_layer": count,
        "total_neurons": count,
        "held_out_loss": _maybe,
        "held_out_loss_unit": text,
        "tokens": optional(count),
        "epochs": _maybe,
        "curve": list_of(_CURVE_POINT),
        "untrained_loss": _maybe,
        "description": text,
    }
)
_MATCHED_ITEM = table(
    {
        "quantity": text,
        "values": keyed_by_name(optional(either(number, text, "a finite number or a string"))),
        "matched": optional(boolean),
        "note": text,
    }
)
_TABLE_ROW = table(
    {
        "quantity": text,
        "values": keyed_by_name(optional(seed_range)),
        "ratio": optional(seed_range),
        "definition": optional(text),
        "group": one_of(*GROUPS),
    }
)
_COUNT_SEED = table(
    {
        "seed": count,
        "dictionary_size": count,
        "alive": count,
        "alive_per_layer": optional(list_of(count)),
        "dead_share": share,
        "ultra_dense": count,
        "distinct": optional(count),
        "merged": optional(count),
        "merged_low": optional(count),
        "merged_high": optional(count),
        "features_per_layer": number,
        "per_neuron_layer": number,
        "per_neuron_joint": _maybe,
        "entropy_load": number,
        "effective_dimension": _maybe,
    }
)
PAIR_FIELDS = ("chapman", "q_adjacent", "q_same", "survival", "lifespan", "corrected")
_PAIR = table({"matched": number, "matched_share": share} | dict.fromkeys(PAIR_FIELDS, _maybe))
_WHERE: dict[str, Spec] = {
    "subject": text,
    "state": one_of(*STATES),
    "site": one_of(*SITES),
    "n_features": count,
    "k": count,
}
_ARM: dict[str, Spec] = {"arm": one_of(*ARMS), "role": one_of(*ROLES)}
_COUNT_CELL = table(
    {
        **_WHERE,
        **_ARM,
        "tokens_train": count,
        "tokens_held_out": count,
        "p_min": share,
        "per_seed": list_of(_COUNT_SEED, least=1),
        "pair": optional(_PAIR),
        "summary": _summary,
    }
)
_SPREAD_SEED = table(
    {
        "seed": count,
        "mean_rho": _maybe,
        "mean_rho_share": optional(share),
        "mean_lifespan": _maybe,
        "single_layer_share": share,
        "mean_adjacent_cosine": _maybe,
        "rho_histogram": _histogram,
        "lifespan_counts": list_of(count),
    }
)
_SPREAD_FIELDS = table(
    {
        **_WHERE,
        "role": _ARM["role"],
        "per_seed": list_of(_SPREAD_SEED, least=1),
        "heatmap": list_of(list_of(share)),
        "layers": list_of(either(text, count, "a layer's label")),
        "summary": _summary,
    },
    may_lack=("role",),
)
_SPLICE_SITE = table({"site": text, "loss": number, "ablated_loss": number, "loss_recovered": _maybe, "kl": number})
_SPLICE = table(
    {
        "tokens": count,
        "ablation": one_of("mean", "zero"),
        "clean_loss": number,
        "sites": list_of(_SPLICE_SITE),
    }
)
_QUALITY_SEED = table(
    {
        "seed": count,
        "explained_variance": number,
        "explained_variance_per_layer": list_of(number),
        "l0_token": number,
        "l0_token_layer": number,
        "dead_share": share,
        "threshold": optional(list_of(number)),
        "splice": optional(_SPLICE),
    }
)
_QUALITY_CELL = table({**_WHERE, **_ARM, "per_seed": list_of(_QUALITY_SEED, least=1), "summary": _summary})
_PROVENANCE = table(
    {
        "schema": one_of(SCHEMA),
        "kind": one_of(*KINDS),
        "preset": text,
        "seconds": keyed_by_name(number),
        "tokens_fingerprint": text,
        "text": text,
        "command": list_of(text),
        "config": plain,
        "device": plain,
        "git_commit": optional(text),
        "python": text,
        "started": text,
        "versions": plain,
    },
    open_ended=True,
)
_RESULTS = table(
    {
        "subjects": keyed_by_name(_SUBJECT, least=1),
        "matched": table({"items": list_of(_MATCHED_ITEM)}),
        "counts": table(
            {"answer": list_of(text, exactly=2), "table": list_of(_TABLE_ROW), "cells": list_of(_COUNT_CELL)}
        ),
        "spread": table({"cells": list_of(_spread_cell)}),
        "quality": table({"cells": list_of(_QUALITY_CELL)}),
        "definitions": keyed_by_name(text),
        "provenance": _PROVENANCE,
    }
)


def validate_results(results: Any) -> None:
    """None if `results` is what the report and its readers expect.

    Raises:
        ValueError: a key is missing or unknown, a value has the wrong type or is not finite, or a row
            cites a definition or subject that does not exist. The path, what was seen and what was
            expected are named.
    """
    _RESULTS(results, "results")
    subjects, definitions = results["subjects"], results["definitions"]
    for name in ("counts", "spread", "quality"):
        for i, cell in enumerate(results[name]["cells"]):
            if cell["subject"] not in subjects:
                _fail(f"results.{name}.cells[{i}].subject", f"one of {list(subjects)}", cell["subject"])
    for i, row in enumerate(results["counts"]["table"]):
        if row["definition"] is not None and row["definition"] not in definitions:
            path = f"results.counts.table[{i}].definition"
            _fail(path, f"null or one of {sorted(definitions)}", row["definition"])
    rows = [("counts.table", row) for row in results["counts"]["table"]]
    rows += [("matched.items", row) for row in results["matched"]["items"]]
    for where, row in rows:
        for key in row["values"]:
            if key not in subjects:
                _fail(f"results.{where} ({row['quantity']}).values", f"only {list(subjects)}", key)
