"""What of the subjects and of their dictionaries was made equal, and what was not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosscoder.report.answer import GROUP_OF_ARM, SITE_NAME, WORDS, main_range, total_neurons
from crosscoder.results.file import Results

TOLERANCE = {"dictionary_size": 0.0, "explained_variance": 0.05, "l0_token": 0.05}
PARAMETERS = 1.02  # largest ratio of parameters that are called equal, since widths are whole numbers


@dataclass(frozen=True)
class Matched:
    """One thing that was made equal between subjects, or was not; None: neither matched nor tested."""

    quantity: str
    values: dict[str, Any]
    matched: bool | None
    note: str


def matched_items(results: Results) -> list[Matched]:
    """Everything that is compared or stated, the models first."""
    if results.provenance.kind == "aspect_ratio":
        return [*_of_subjects(results), *_of_dictionaries(results)]
    name = results.subjects[0]
    labels = results.rows.values("layers", subject=name, site="residual")
    layers = f"layers [{', '.join(map(str, labels[0]))}]" if labels else "all layers"
    return [_item("layers", {name: layers}, True), *_of_dictionaries(results)]


def _item(words: str, values: dict[str, Any], matched: bool | None, *, where: str = "", **numbers: str) -> Matched:
    said = WORDS["matched"][words]
    return Matched(where + said["quantity"], values, matched, said["note"].format(**numbers))


def _of_subjects(results: Results) -> list[Matched]:
    rows, names = results.rows, results.subjects

    def plainly(key: str) -> dict[str, Any]:
        return {name: results.of(name, key) for name in names}

    losses = {name: rows.seed_range("held_out_loss", subject=name) for name in names}
    parameters, tokens = plainly("parameters_non_embedding"), {name: mean_tokens(results, name) for name in names}
    gap, chosen, total = (rows.one(key) for key in ("loss_gap", "chosen_loss_gap", "text_tokens"))
    limit = None if results.verdict is None else results.verdict.rule.get("loss_gap")
    return [
        _item("parameters", parameters, max(parameters.values()) <= PARAMETERS * min(parameters.values())),
        _item(
            "loss",
            {name: loss and loss.value for name, loss in losses.items()},
            None if gap is None or limit is None else gap <= limit,
            gap=_percent(gap),
            chosen=_percent(chosen),
            limit=_percent(limit, 0),
        ),
        _item("tokens", tokens, len(set(tokens.values())) == 1),
        _item(
            "text",
            dict.fromkeys(names, f"{results.provenance.text}, vocabulary {rows.one('vocabulary')}"),
            True,
            total="unknown" if total is None else f"{total:,}",
        ),
        _item("embedding", plainly("parameters_embedding"), False),
        _item("norms", plainly("parameters_norms"), False),
        _item("neurons", {name: total_neurons(results, name) for name in names}, False),
        _item("seeds", {name: len(rows.select("held_out_loss", subject=name)) for name in names}, True),
    ]


def mean_tokens(results: Results, name: str) -> int | None:
    """Training tokens of a subject, the mean over its training seeds."""
    found = results.rows.seed_range("training_tokens", subject=name)
    return None if found is None else round(found.value)


def _percent(value: float | None, digits: int = 2) -> str:
    return "not measured" if value is None else f"{value:.{digits}%}"


def _of_dictionaries(results: Results) -> list[Matched]:
    """From what they turned out to be."""
    items = []
    for site in SITE_NAME:
        for arm in GROUP_OF_ARM:
            where = {"state": "trained", "site": site, "arm": arm}
            if not results.rows.cells("alive", role="main", **where):
                continue
            for key, tolerance in TOLERANCE.items():
                found = {name: main_range(results, key, subject=name, **where) for name in results.subjects}
                means = {name: value.value for name, value in found.items() if value}
                matched = _within(list(means.values()), tolerance) if len(means) > 1 else None
                items.append(_item(key, means, matched, where=f"{arm}, {site}: "))
    return items


def _within(values: Sequence[float], tolerance: float) -> bool:
    low, high = min(values), max(values)
    return math.isclose(low, high) or (high - low) <= tolerance * abs(high)
