"""The tables of the verdict: gates, statistics, every estimator, universality, joint crosscoders, calibration."""

from __future__ import annotations

import re
from collections.abc import Callable

from crosscoder.report.answer import WORDS
from crosscoder.report.table import Head, Line, Table, Value, format_range, heading, named, sign, word_heads, words
from crosscoder.report.tables import show_range
from crosscoder.results.file import Results
from crosscoder.results.quantities import ESTIMATORS, PRIMARY_ESTIMATOR, TERMS
from crosscoder.results.table import SITE_NAME, SITES, Estimate, Row

NO_VERDICT = WORDS["absent"]["verdict"]
RATIO_WORDS = {"trained": "R, density of B over A (primary estimator)", "untrained": "R of the untrained pair"}
STATISTICS = ("trained_difference", "alpha", "gamma", "gamma_excess", "delta", "universality", "cross_layer")
STATISTICS += ("count_gain", "removal_shift", "equal_variance", "chapman", "chao2", "stable_features", "F_inf")
STATISTICS += ("load_log_ratio", "sharing", "bank_log_ratio", "exclusive_share", "identity_residual", "headroom")
EQUALLY: dict[str | None, str] = {"fvu": "variance unexplained", "loss": "spliced loss"}
"""Currencies of fidelity."""
AGREEMENT = ("u", "u_null", "u_ceiling", "u_floor", "universality")
AGREEMENT += ("share_forward_7", "share_backward_7", "rate_median_ratio", "rate_pairs")
JOINT = ("alive", "explained_variance_first", "explained_variance_second", "exclusive_first", "exclusive_second")
JOINT += ("hidden_first", "hidden_second")
CALIBRATION = ("mcc", "count_true", "count", "count_error", "rho_error", "d_eff_error", "explained_variance")
CALIBRATION += ("dead_share",)


def gate_table(results: Results) -> Table:
    """Every condition of a verdict with what was measured; one that failed stands with ✗."""
    heads = [*word_heads("gate"), Head("measured"), *word_heads("required"), Head("passed")]
    lines = []
    for gate in results.verdict.gates if results.verdict else ():
        measured = format_range("not measured" if gate.value is None else gate.value)
        lines.append(Line([words(gate.name), measured, _prose(gate.requirement), sign(gate.passed)]))
    return Table(heads, lines, NO_VERDICT, wide=False, terms=("not-testable",))


def condition_table(results: Results) -> Table:
    """What each hypothesis asks for, beside what was measured."""
    heads = [*word_heads("statistic"), Head("required", word=True, definition="in_band"), Head("measured")]
    heads.append(Head("met", definition="consistent_with_0"))
    lines = []
    for row in results.verdict.conditions if results.verdict else ():
        cells = [words(row.statistic), _prose(row.requirement), Value(row.measured), sign(row.met, "?")]
        lines.append(Line(cells, group=row.hypothesis))
    return Table(heads, lines, NO_VERDICT, wide=False, terms=tuple(TERMS["labels"]))


def _prose(text: str | None) -> Value:
    return Value(text or "", style="word prose")


def statistic_table(results: Results) -> Table:
    """Every statistic of the rule with its 90 % interval, or why it is missing."""
    heads = [*word_heads("statistic"), Head("value", definition="interval"), *word_heads("note")]
    lines = []
    for site in SITES if results.verdict else ():
        for state, said in RATIO_WORDS.items():
            found = results.rows.select("ratio", site=site, state=state, estimator=PRIMARY_ESTIMATOR)
            lines += [_statistic(row, said) for row in found]
        for key in STATISTICS:
            lines += [_statistic(row) for row in results.rows.select(key, site=site, state=None, k=None)]
    return Table(heads, lines, NO_VERDICT, wide=False)


def _statistic(row: Row, said: str | None = None) -> Line:
    first = named(row.key, said)
    if row.at.estimator in EQUALLY and said is None:
        first = named(row.key, f"{first.text}, at equal {EQUALLY[row.at.estimator]}")
    if row.at.subject is not None:
        first = named(row.key, f"{row.at.subject}: {first.text}")
    note = row.missing or ("" if row.value is not None else "not measured")
    return Line([first, format_range(row.value), _prose(note)], group=SITE_NAME[str(row.at.site)])


def estimator_table(results: Results) -> Table:
    """R by every estimator, trained and untrained; the one that decides is marked."""
    heads = [*word_heads("estimator"), heading("ratio", "R, trained"), Head("R, untrained"), *word_heads("note")]
    lines = []
    for site in SITES if results.verdict else ():
        for estimator in ESTIMATORS:
            found = results.rows.select("ratio", site=site, estimator=estimator)
            trained, untrained = (next(iter(found.select(state=s)), None) for s in ("trained", "untrained"))
            if trained is None and untrained is None:
                continue
            decides = " (decides)" if (site, estimator) == (SITES[0], PRIMARY_ESTIMATOR) else ""
            cells = [words(estimator.replace("_", ", ") + decides, definition=estimator)]
            cells += [format_range(row.value if row else None) for row in (trained, untrained)]
            lines.append(Line([*cells, _prose(trained.missing if trained else None)], group=SITE_NAME[site]))
    return Table(heads, lines, NO_VERDICT, wide=False)


def agreement_table(results: Results) -> Table:
    """How alike the features of A and B are, beside chance, another training of one shape, and no training."""
    sites = [site for site in SITE_NAME if results.rows.select("u", site=site)]
    heads = [*word_heads("quantity"), *(Head(SITE_NAME[site], definition=site) for site in sites)]
    found = {key: [results.rows.one(key, site=site) for site in sites] for key in AGREEMENT}
    of = zip(*(found[f"u_{name}"] for name in ("floor", "null", "ceiling")), strict=True)
    floors = [scaled_floor(*one) for one in of]
    lines = [
        Line([named(key, "U" if key == "universality" else None), *map(format_range, values)])
        for key, values in found.items()
    ]
    if any(floor is not None for floor in floors):
        floor = Line([named("u_floor", "the floor on U's scale"), *map(format_range, floors)])
        lines.insert(AGREEMENT.index("universality") + 1, floor)
    return Table(heads, lines if sites else [], NO_VERDICT, wide=False)


def scaled_floor(floor: float | None, null: float | None, ceiling: Estimate | None) -> float | None:
    """The untrained pair's u as U; above 1 where it is more alike than two trainings of one shape."""
    if floor is None or null is None or ceiling is None or ceiling.value <= null:
        return None
    return (floor - null) / (ceiling.value - null)


def joint_table(results: Results) -> Table:
    """Crosscoders over two subjects: what is one's alone, beside two trainings of one shape and untrained subjects."""
    heads = [Head("first and second", word=True, definition="joint_dictionary"), *word_heads("state")]
    heads += [heading(key, {"alive": "features"}.get(key)) for key in JOINT]
    lines = []
    found = results.rows.select(arm="joint", role="main")
    for at, rows in found.groups("subject", "training_seed", "other", "state", "site", "k").items():
        second = re.sub(r"(\d+)$", r" seed \1", str(at.other))
        cells = [words(f"{at.subject} seed {at.training_seed}, {second}"), words(str(at.state))]
        lines.append(Line([*cells, *(show_range(rows, key) for key in JOINT)]))
    return Table(heads, lines, WORDS["absent"]["joint"])


def calibration_table(results: Results) -> Table:
    """What the study's dictionaries find in planted worlds of its own sizes."""
    heads = [*word_heads("world"), *map(heading, CALIBRATION)]
    lines = []
    for at, rows in results.rows.select(role="calibration", kind=None).groups("subject", "seed").items():
        world = words(f"sizes of {at.subject}", f"world {at.seed}", definition="calibration")
        lines.append(Line([world, *(format_range(rows.one(key)) for key in CALIBRATION)]))
    return Table(heads, lines, WORDS["absent"]["calibration"])


VERDICT_TABLES: dict[str, Callable[[Results], Table]] = {
    "gates": gate_table,
    "conditions": condition_table,
    "statistics": statistic_table,
    "estimators": estimator_table,
    "agreement": agreement_table,
    "joint": joint_table,
    "calibration": calibration_table,
}
