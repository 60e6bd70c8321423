"""The folded tables of models and dictionaries: each is a selection of a study's rows.

Values are means over trainings and dictionary seeds with their range; nulls stand in columns beside them. What is said
of a table stands in `templates/words.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from crosscoder.measure.fidelity import lost_share
from crosscoder.measure.splice import ALL_LAYERS
from crosscoder.report.answer import ARMS, STATES, beside_nulls, known_of, main_range
from crosscoder.report.table import (
    NOTHING,
    WORDS,
    Head,
    Line,
    Table,
    Value,
    format_number,
    format_range,
    heading,
    lines_of,
    named,
    state_heads,
    state_term,
    word_heads,
    words,
)
from crosscoder.results.file import Results
from crosscoder.results.table import SITE_NAME, SITES, LongTable, Place

FULL = 0.05
"""Dead share up to which a dictionary is full, so that counts are its size."""
LAYERS = ("causal_layers", "additivity", "conjunctive_share", "best_layer_effect", "mean_rho_model", "mean_rho")
LAYERS += ("twin_share", "label_pairs", "label_gain", "label_gain_any")
STABILITY = ("dead_share", "matched_share", "self_cosine", "stable_share", "stable_load_share", "stable_energy_share")
STABILITY += ("rest_rank", "rest_shared", "rest_chance")
COUNTS = ("distinct", "merged", "chapman", "per_neuron_layer", "per_neuron_joint")
"""Of dictionaries that are not full."""
MODELS = ("n_layers", "d_model", "parameters_non_embedding", "depth_over_width", "training_tokens", "rate_share")
MODELS += ("held_out_loss", "bigram_loss", "trigram_loss", "lookup_share", "untrained_loss")


def subject_mark(results: Results, subject: str | None) -> str:
    """The style class that gives a subject its colour, in the order of `subject_color`."""
    return f"dot s{results.subjects.index(str(subject)) % 4}"


def null_table(results: Results) -> Table:
    """`LAYERS` of main crosscoders over several layers, a line each, the trained subject beside its nulls."""
    lines, seen = [], set[str]()
    for name in results.subjects:
        for site in SITES:
            where = {"subject": name, "site": site}
            labels = results.rows.values("layers", **where)
            for key in LAYERS if labels and len(labels[0]) > 1 else ():
                found = beside_nulls(results, key, **where)
                if "trained" in found:
                    seen |= found.keys()
                    lines.append((key, found, f"{name}, {SITE_NAME[site]}"))
    states = [state for state in STATES if state in seen]
    heads = [*word_heads(""), *state_heads(states)]
    rows = [line for key, found, group in lines for line in lines_of([(key, [found.get(s) for s in states])], group)]
    with_text = len(results.rows.select("causal_layers_left")) > 0
    note = f"{WORDS['notes']['ranges']} {WORDS['notes']['with_text'] if with_text else ''}".strip()
    return Table(heads, rows, note, wide=False, terms=("scale",))


def found_table(results: Results) -> Table:
    """What is found again in other dictionaries, a column a dictionary; counts only where it is not full."""
    columns: dict[str, dict[str, Any]] = {}
    for at in results.rows.cells("alive", role="main", state=("trained", "untrained")):
        where = {"subject": at.subject, "site": at.site, "arm": at.arm, "state": at.state}
        if len(results.rows.select("matched_share", role="main", **where)):
            state = "" if at.state == "trained" else f", {WORDS['states'][str(at.state)]}"
            columns[f"{at.subject}, {SITE_NAME[str(at.site)]}, {ARMS[str(at.arm)].name}{state}"] = where
    lines, full = [], False
    for key in (*STABILITY, *COUNTS):
        found = [main_range(results, key, **where) for where in columns.values()]
        if key in COUNTS:
            dead = [main_range(results, "dead_share", **where) for where in columns.values()]
            fills = [one is None or one.low <= FULL for one in dead]
            full = full or any(fills)
            found = [None if fill else one for one, fill in zip(found, fills, strict=True)]
        lines += lines_of([(key, found)])
    note = f"{WORDS['notes']['ranges']} {WORDS['notes']['full'] if full else ''}".strip()
    return Table([*word_heads(""), *map(Head, columns)], lines, note)


def load_table(results: Results) -> Table:
    """Load, fidelity and k of every dictionary: a line for each arm, site and state, a column for each k."""
    lines, most = [], 0
    for (name, site, state, arm, n), cells in _sweeps(results):
        shown = [_at_k(k, group) for k, group in sorted(cells.items())]
        most = max(most, len(shown))
        said = f"{name}, {WORDS['states'][state]}"
        lead = words(said, f"{ARMS[arm].name}, n {format_number(n)}", definition=state_term(state))
        lines.append((lead, shown, SITE_NAME[site]))
    heads = [*word_heads(""), *[heading("entropy_load", "load")] * most]
    filled = [Line([lead, *shown, *[Value("")] * (most - len(shown))], group) for lead, shown, group in lines]
    sites = tuple(site for site in SITES if any(group == SITE_NAME[site] for *_, group in lines))
    terms = ("fidelity", *sites, "crosscoder", "bank", "explained_variance", "spliced_loss")
    return Table(heads, filled, WORDS["notes"]["loads"], terms=terms)


def _sweeps(results: Results) -> Iterable[tuple[tuple[str, str, str, str, int], dict[int, list[LongTable]]]]:
    """The dictionaries of each subject, site, state, arm and size, by k: one table a training."""
    cells = results.rows.cells("entropy_load")

    def key(at: Place) -> tuple[Any, ...]:
        site, subject = SITES.index(at.site or SITES[0]), results.subjects.index(str(at.subject))
        return site, subject, STATES.index(at.state or "trained"), list(ARMS).index(str(at.arm)), at.n_features or 0

    for _, group in groupby(sorted(cells, key=key), key=key):
        places = list(group)
        by_k: dict[int, list[LongTable]] = {}
        for at in places:
            by_k.setdefault(at.k or 0, []).append(cells[at])
        one = places[0]
        yield (str(one.subject), str(one.site), str(one.state), str(one.arm), one.n_features or 0), by_k


def _at_k(k: int, trainings: list[LongTable]) -> Value:
    """Load, k, variance unexplained, and the share of ablation's harm where it was spliced."""

    def mean(values: Iterable[float]) -> float | None:
        known = list(values)
        return math.fsum(known) / len(known) if known else None

    load = mean(value for cell in trainings for value in cell.values("entropy_load"))
    explained = mean(value for cell in trainings for value in cell.values("explained_variance", layer=None))
    lost = mean(value for cell in trainings for value in _lost(cell))
    said = f"k {k}" + ("" if explained is None else f", {1 - explained:.3f}")
    return Value(format_number(load), said + ("" if lost is None else f"/{lost:.3f}"))


def _lost(cell: LongTable) -> list[float]:
    """The share of ablation's harm that splicing every layer does, of each seed that was spliced."""
    shares = []
    for seed in cell.select("clean_loss").seeds():
        one = cell.select(seed=seed)
        keys = {"spliced_loss": ALL_LAYERS, "ablated_loss": ALL_LAYERS, "clean_loss": None}
        losses = {key: next(iter(one.values(key, layer=layer)), None) for key, layer in keys.items()}
        share = "" if None in losses.values() else lost_share(**losses)  # ty: ignore[invalid-argument-type]
        shares += [] if isinstance(share, str) else [share]
    return shares


def room_table(results: Results) -> Table:
    """Rooms of every shape's writes, in both units, beside the untrained model's."""
    states = [state for state in ("trained", "untrained") if results.rows.values("room", state=state)]
    lines = []
    for name in results.subjects:
        for units in ("model", "scaled"):
            found = [results.rows.known_range("room", subject=name, state=s, estimator=units) for s in states]
            if any(found):
                said = {"model": "the model's units", "scaled": "layers at their scales"}[units]
                shape = f"{name}, {results.of(name, 'n_layers')}×{results.of(name, 'd_model')}"
                lines.append(Line([named("room", shape), words(said), *map(format_range, found)]))
    heads = [*word_heads("model", "units"), *state_heads(states)]
    return Table(heads, lines, WORDS["notes"]["ranges"], wide=False)


def law_table(results: Results) -> Table:
    """How room grows with width and depth, in both units."""
    units = [one for one in ("model", "scaled") if len(results.rows.select("room_beta", estimator=one))]
    keys = ("room_beta", "room_delta", "room_excess_depth", "room_misfit")
    lines = lines_of((key, [results.rows.one(key, estimator=one) for one in units]) for key in keys)
    return Table(word_heads("", *({"model": "model's units", "scaled": "scaled"}[one] for one in units)), lines)


def model_table(results: Results) -> Table:
    """All shapes, a line each: sizes, training, losses beside those of tables of the text."""
    keys = [key for key in MODELS if any(known_of(results, name, key) is not None for name in results.subjects)]
    lines = []
    for name in results.subjects:
        runs = len(results.rows.select("held_out_loss", subject=name, role=None))
        lead = words(name, f"{runs} trainings" if runs > 1 else "", mark=subject_mark(results, name))
        lines.append(Line([lead, *(format_range(known_of(results, name, key)) for key in keys)]))
    return Table([*word_heads("model"), *map(heading, keys)], lines, WORDS["notes"]["ranges"])


RUN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("trainings of A and of B", ("subjects", "seeds")),
    ("further shapes, for room and loss", ("subjects", "grid")),
    ("trainings of each further shape", ("subjects", "grid_seeds")),
    ("dictionaries of each training", ("seeds",)),
    ("dictionaries of the first training", ("stability_seeds",)),
    ("nulls", ("nulls",)),
    ("nulls that per-layer SAEs have too", ("null_banks",)),
    ("trainings with nulls and larger dictionaries", ("null_trainings",)),
    ("sizes of larger dictionaries, times n", ("size_factors",)),
    ("trainings read on the residual stream", ("residual_trainings",)),
    ("features ablated layer by layer", ("causal_features",)),
    ("tokens that dictionaries train on", ("tokens_train",)),
    ("steps of a dictionary", ("dictionaries", "steps")),
    ("tokens held out", ("tokens_held_out",)),
    ("held-out blocks that are spliced", ("splice_blocks",)),
    ("planted pairs", ("calibration_worlds",)),
    ("text", ("text",)),
    ("layers read", ("layers",)),
)
"""Settings of a study in words; one that is nothing was cut."""


def run_table(results: Results) -> Table:
    """How much of each part was run; what is nothing was cut."""
    lines = []
    for said, path in RUN:
        value: Any = results.provenance.config
        for step in path:
            value = value.get(step) if isinstance(value, dict) else None
        if value is None or isinstance(value, dict):
            continue
        how = len(value) if path[-1] in ("seeds", "stability_seeds", "grid") and isinstance(value, list) else value
        text = ", ".join(WORDS["states"].get(str(one), str(one)) for one in how) if isinstance(how, list) else how
        lines.append(Line([words(said), words("none: cut") if not text else Value(format_number(text), style="word")]))
    return Table(word_heads("part", "in this run"), lines, wide=False)


def provenance_table(results: Results) -> Table:
    shown = results.provenance
    lines: dict[str, Any] = {name: getattr(shown, name) for name in ("schema", "preset", "started")}
    lines |= {"git commit": shown.git_commit or NOTHING, "command": " ".join(shown.command), "Python": shown.python}
    lines |= {"tokens fingerprint": shown.tokens_fingerprint}
    lines["seconds"] = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in shown.seconds.items())
    rows = [Line([words(name), Value(format_number(value), style="mono")]) for name, value in lines.items()]
    return Table(word_heads("", ""), rows, wide=False)


TABLES = {
    "loads": load_table,
    "layers": null_table,
    "found": found_table,
    "rooms": room_table,
    "law": law_table,
    "models": model_table,
    "run": run_table,
    "provenance": provenance_table,
}
