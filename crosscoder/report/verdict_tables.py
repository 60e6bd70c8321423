"""The tables of the verdict: gates, statistics, every estimator, universality, joint crosscoders, calibration."""

from __future__ import annotations

from typing import Any

from crosscoder.report.figures import SITE_NAME, Results
from crosscoder.report.tables import Head, Row, Table, Value, format_number, format_range, known_definition

NO_VERDICT = "A single model has no pair to compare, so there is no verdict."
_CALIBRATION = (
    ("MCC", "mcc", "mcc"),
    ("features planted", "count_true", None),
    ("features counted", "count", "count_error"),
    ("count error", "count_error", "count_error"),
    ("ρ error", "rho_error", "rho_error"),
    ("d_eff error", "d_eff_error", "d_eff_error"),
    ("explained variance", "explained_variance", "explained_variance"),
    ("dead share", "dead_share", "dead_share"),
)
_JOINT = (
    ("features", "alive", "alive"),
    ("explained variance, first", "explained_variance_first", "explained_variance"),
    ("second", "explained_variance_second", "explained_variance"),
    ("first's alone", "exclusive_first", "exclusive_share"),
    ("second's alone", "exclusive_second", "exclusive_share"),
    ("first's, hidden from the second", "hidden_first", "hidden_share"),
    ("second's, hidden from the first", "hidden_second", "hidden_share"),
)
_AGREEMENT = (
    ("u(A, B)", "u", "u"),
    ("null", "null", "u_null"),
    ("ceiling: u of two trainings of one shape", "ceiling", "universality"),
    ("floor: u of the untrained pair", "floor", "universality_floor"),
    ("U", "normalised", "universality"),
)


def _judged(results: Results) -> dict[str, Any]:
    return results["verdict"] or {}


def _range(entry: dict[str, float] | None) -> Value:
    return format_range(None if entry is None else (entry["mean"], entry["low"], entry["high"]))


def gate_table(results: Results) -> Table:
    """Every condition of a verdict with what was measured; one that failed stands with ✗."""
    heads = [Head("gate", word=True), Head("measured"), Head("required", word=True), Head("passed")]
    rows = []
    for gate in _judged(results).get("gates", []):
        measured = "not measured" if gate["value"] is None else format_number(gate["value"])
        sign = Value("✓", mark="yes") if gate["passed"] else Value("✗", mark="no")
        requirement = Value(gate["requirement"], style="word prose")
        rows.append(Row([Value(gate["name"], style="word"), Value(measured), requirement, sign]))
    return Table(heads, rows, NO_VERDICT, wide=False)


def condition_table(results: Results) -> Table:
    """What each hypothesis asks for, beside what was measured."""
    heads = [Head("statistic", word=True), Head("required", word=True), Head("measured"), Head("met")]
    rows = []
    for row in _judged(results).get("conditions", []):
        signs = {True: Value("✓", mark="yes"), False: Value("✗", mark="no"), None: Value("?")}
        cells = [
            Value(row["statistic"], style="word"),
            Value(row["requirement"], style="word prose"),
            Value(row["measured"]),
            signs[row["met"]],
        ]
        rows.append(Row(cells, group=row["hypothesis"]))
    return Table(heads, rows, NO_VERDICT, wide=False)


def statistic_table(results: Results) -> Table:
    """Every statistic of the rule with its 90 % interval, or why it is missing."""
    heads = [Head("statistic", word=True), Head("value"), Head("note", word=True)]
    rows = []
    for row in _judged(results).get("statistics", []):
        cells = [
            Value(row["words"], style="word", definition=row["definition"]),
            _range(row["estimate"]),
            Value(row["missing"] or "", style="word prose"),
        ]
        rows.append(Row(cells, group=SITE_NAME[row["site"]]))
    return Table(heads, rows, NO_VERDICT, wide=False)


def estimator_table(results: Results) -> Table:
    """R by every estimator, trained and untrained; the one that decides is marked."""
    heads = [Head("estimator", word=True), Head("R, trained"), Head("R, untrained"), Head("note", word=True)]
    rows = []
    for row in _judged(results).get("estimators", []):
        name = row["estimator"].replace("_", ", ") + (" (decides)" if row["primary"] else "")
        cells = [
            Value(name, style="word", definition=row["definition"]),
            _range(row["trained"]),
            _range(row["untrained"]),
            Value(row["missing"] or "", style="word prose"),
        ]
        rows.append(Row(cells, group=SITE_NAME[row["site"]]))
    return Table(heads, rows, NO_VERDICT, wide=False)


def agreement_table(results: Results) -> Table:
    """How alike the features of A and B are, beside chance, another training of one shape, and no training."""
    found = _judged(results).get("universality_by_site", {})
    heads = [Head("quantity", word=True), *(Head(SITE_NAME[site]) for site in found)]
    rows = []
    for words, key, definition in _AGREEMENT:
        values = [_range(v) if isinstance(v := one[key], dict) else Value(format_number(v)) for one in found.values()]
        rows.append(Row([Value(words, style="word", definition=definition), *values]))
    if any(one["floor"] is not None and one["ceiling"] for one in found.values()):
        values = [Value(format_number(_scaled_floor(one))) for one in found.values()]
        rows.append(Row([Value("the floor on U's scale", style="word", definition="universality_floor"), *values]))
    for words, key in (("of A's features, correlation above .7", "forward_7"), ("of B's", "backward_7")):
        values = [Value(format_number(one["shares"].get(key))) for one in found.values()]
        rows.append(Row([Value(words, style="word", definition="u_share"), *values]))
    for words, key in (("firing rates of matched features, B/A, median", "median_ratio"), ("matched", "n_pairs")):
        values = [Value(format_number((one["rates"] or {}).get(key))) for one in found.values()]
        rows.append(Row([Value(words, style="word", definition="rate_ratio"), *values]))
    return Table(heads, rows if found else [], NO_VERDICT, wide=False)


def joint_table(results: Results) -> Table:
    """Crosscoders over two subjects: what is one's alone, beside two trainings of one shape and untrained subjects."""
    heads = [
        Head("first and second", word=True, definition=known_definition(results, "joint_dictionary")),
        Head("state", word=True),
        *(Head(words, definition=known_definition(results, key)) for words, _, key in _JOINT),
    ]
    rows = []
    for row in _judged(results).get("joint", []):
        name = ", ".join(f"{row[side]} seed {t}" for side, t in zip(("first", "second"), row["training_seeds"]))
        seeds = row["per_seed"]
        cells = [Value(name, style="word"), Value(row["state"], style="word")]
        for _, key, _ in _JOINT:
            known = [seed[key] for seed in seeds if seed[key] is not None]
            cells.append(format_range((sum(known) / len(known), min(known), max(known)) if known else None))
        rows.append(Row(cells))
    return Table(heads, rows, "No crosscoder over two subjects was trained (--joint).")


def _scaled_floor(found: dict[str, Any]) -> float | None:
    """The untrained pair's u as U; above 1 where it is more alike than two trainings of one shape."""
    if found["floor"] is None or not found["ceiling"] or found["ceiling"]["mean"] <= found["null"]:
        return None
    return (found["floor"] - found["null"]) / (found["ceiling"]["mean"] - found["null"])


def calibration_table(results: Results) -> Table:
    """What the study's dictionaries find in planted worlds of its own sizes."""
    found = _judged(results).get("calibration", [])
    heads = [
        Head("world", word=True),
        *(Head(words, definition=known_definition(results, key)) for words, _, key in _CALIBRATION),
    ]
    rows = [
        Row(
            [
                Value(f"sizes of {row['subject']}", f"world {row['world_seed']}", "word", definition="calibration"),
                *(Value(format_number(row.get(key))) for _, key, _ in _CALIBRATION),
            ]
        )
        for row in found
    ]
    return Table(heads, rows, "The study tried its instruments on no planted world.")


def verdict_tables(results: Results) -> dict[str, Table]:
    """All tables of the verdict by the name of their heading."""
    return {
        "gates": gate_table(results),
        "conditions": condition_table(results),
        "statistics": statistic_table(results),
        "estimators": estimator_table(results),
        "agreement": agreement_table(results),
        "joint": joint_table(results),
        "calibration": calibration_table(results),
    }
