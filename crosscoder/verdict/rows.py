"""What the rule looks at as rows of a study's results."""

from __future__ import annotations

from crosscoder.results.table import Estimate, Place, Row, finite
from crosscoder.verdict.evidence import Statistics
from crosscoder.verdict.legs import SITE
from crosscoder.verdict.rule import Evidence

KEYS = {
    "q": "load_log_ratio",
    "g": "sharing",
    "r": "bank_log_ratio",
    "room": "room_log_ratio",
    "room_scaled": "room_log_ratio_scaled",
    "dimension": "dimension_log_ratio",
}
"""The quantity of each statistic that is read at common fidelity."""


def statistic_rows(found: Statistics) -> list[Row]:
    """Statistics as rows: at a null, the null's own, a plain number where it is of one training; and `null_excess`, the
    trained subjects' less the null's."""
    rows = []
    for (state, currency), by_name in found.items():
        for name, one in by_name.items():
            at = Place(state=state, site=SITE, estimator=currency)
            value = None if state == "trained" else one.of_one
            rows.append(_row(at, KEYS[name], one.estimate) if value is None else Row(at, KEYS[name], value))
            if state != "trained":
                excess = found["trained", currency][name].less(one)
                beside = Place(state=state, site=SITE, estimator=f"{name}-{currency}")
                rows.append(_row(beside, "null_excess", excess.estimate))
    return rows


def evidence_rows(evidence: Evidence) -> list[Row]:
    """The values of the rule that are no row yet."""
    keys = {
        "kappa": "kappa",
        "conjunctive excess": "conjunctive_excess",
        "conjunctive or twin excess": "conjunctive_or_twin_excess",
        "removal share": "removal_share",
        "headroom of B": "headroom",
    }
    at = Place(site=SITE)
    return [_row(at, key, evidence.values.get(name) or "not measured") for name, key in keys.items()]


def _row(at: Place, key: str, value: Estimate | str) -> Row:
    if isinstance(value, str):
        return Row(at, key, None, value)
    kept = finite(value)
    return Row(at, key, kept, None if kept is not None else "not finite")
