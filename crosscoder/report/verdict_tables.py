"""The tables of the verdict: gates, statistics, every estimator, universality, joint crosscoders, calibration."""

from __future__ import annotations

import re
from collections.abc import Callable

from crosscoder.report.answer import SITE_NAME
from crosscoder.report.table import (
    Head,
    Line,
    Table,
    Value,
    format_number,
    format_range,
    heading,
    named,
    number,
    sign,
    words,
)
from crosscoder.results.file import Results
from crosscoder.results.quantities import ESTIMATORS, PRIMARY_ESTIMATOR, QUANTITIES, TERMS
from crosscoder.results.table import SITES, Estimate, Row

NO_VERDICT = "A single model has no pair to compare, so there is no verdict."
RATIO_WORDS = {"trained": "R, density of B over A (primary estimator)", "untrained": "R of the untrained pair"}
STATISTICS = ("trained_difference", "alpha", "gamma", "gamma_excess", "delta", "universality", "cross_layer")
STATISTICS += ("count_gain", "removal_shift", "equal_variance", "chapman", "chao2", "stable_features", "F_inf")
STATISTICS += ("exclusive_share", "identity_residual", "headroom")
AGREEMENT = ("u", "u_null", "u_ceiling", "u_floor", "universality")
MATCHED_RATES = ("share_forward_7", "share_backward_7", "rate_median_ratio", "rate_pairs")
JOINT = ("alive", "explained_variance_first", "explained_variance_second", "exclusive_first", "exclusive_second")
JOINT += ("hidden_first", "hidden_second")
CALIBRATION = ("mcc", "count_true", "count", "count_error", "rho_error", "d_eff_error", "explained_variance")
CALIBRATION += ("dead_share",)


def gate_table(results: Results) -> Table:
    """Every condition of a verdict with what was measured; one that failed stands with ✗."""
    heads = [Head("gate", word=True), Head("measured"), Head("required", word=True), Head("passed")]
    lines = []
    for gate in results.verdict.gates if results.verdict else ():
        measured = Value("not measured" if gate.value is None else format_number(gate.value))
        requirement = Value(gate.requirement, style="word prose")
        lines.append(Line([words(gate.name), measured, requirement, sign(gate.passed)]))
    return Table(heads, lines, NO_VERDICT, wide=False, terms=("not-testable",))


def condition_table(results: Results) -> Table:
    """What each hypothesis asks for, beside what was measured."""
    heads = [Head("statistic", word=True), Head("required", word=True, definition="in_band"), Head("measured")]
    heads.append(Head("met", definition="consistent_with_0"))
    lines = []
    for row in results.verdict.conditions if results.verdict else ():
        cells = [words(row.statistic), Value(row.requirement, style="word prose"), Value(row.measured)]
        lines.append(Line([*cells, sign(row.met, "?")], group=row.hypothesis))
    return Table(heads, lines, NO_VERDICT, wide=False, terms=tuple(TERMS["labels"]))


def statistic_table(results: Results) -> Table:
    """Every statistic of the rule with its 90 % interval, or why it is missing."""
    heads = [Head("statistic", word=True), Head("value", definition="interval"), Head("note", word=True)]
    lines = []
    for site in SITES if results.verdict else ():
        for state, said in RATIO_WORDS.items():
            found = results.rows.select("ratio", site=site, state=state, estimator=PRIMARY_ESTIMATOR)
            lines += [_statistic(row, said) for row in found]
        for key in STATISTICS:
            found = results.rows.select(key, site=site, state=None, k=None)
            lines += [_statistic(row, QUANTITIES[key].words) for row in found]
    return Table(heads, lines, NO_VERDICT, wide=False)


def _statistic(row: Row, said: str) -> Line:
    said = said if row.at.subject is None else f"{row.at.subject}: {said}"
    note = row.missing or ("" if row.value is not None else "not measured")
    cells = [named(row.key, said), format_range(row.value), Value(note, style="word prose")]
    return Line(cells, group=SITE_NAME[str(row.at.site)])


def estimator_table(results: Results) -> Table:
    """R by every estimator, trained and untrained; the one that decides is marked."""
    heads = [Head("estimator", word=True), Head("R, trained", definition="ratio"), Head("R, untrained")]
    heads.append(Head("note", word=True))
    lines = []
    for site in SITES if results.verdict else ():
        for estimator in ESTIMATORS:
            found = results.rows.select("ratio", site=site, estimator=estimator)
            trained, untrained = (next(iter(found.select(state=s)), None) for s in ("trained", "untrained"))
            if trained is None and untrained is None:
                continue
            decides = " (decides)" if (site, estimator) == (SITES[0], PRIMARY_ESTIMATOR) else ""
            cells = [words(estimator.replace("_", ", ") + decides, definition=estimator)]
            cells += [format_range(row and row.value) for row in (trained, untrained)]
            cells.append(Value("" if trained is None else trained.missing or "", style="word prose"))
            lines.append(Line(cells, group=SITE_NAME[site]))
    return Table(heads, lines, NO_VERDICT, wide=False)


def agreement_table(results: Results) -> Table:
    """How alike the features of A and B are, beside chance, another training of one shape, and no training."""
    sites = [site for site in SITE_NAME if len(results.rows.select("u", site=site))]
    heads = [Head("quantity", word=True), *(Head(SITE_NAME[site], definition=site) for site in sites)]

    def line(key: str, said: str | None = None) -> Line:
        return Line([named(key, said), *(format_range(results.rows.one(key, site=site)) for site in sites)])

    lines = [line(key, "U" if key == "universality" else None) for key in AGREEMENT]
    floors = [
        scaled_floor(*(results.rows.one(f"u_{name}", site=site) for name in ("floor", "null", "ceiling")))
        for site in sites
    ]
    if any(floor is not None for floor in floors):
        lines.append(Line([named("u_floor", "the floor on U's scale"), *(number(floor) for floor in floors)]))
    lines += [line(key) for key in MATCHED_RATES]
    return Table(heads, lines if sites else [], NO_VERDICT, wide=False)


def scaled_floor(floor: float | None, null: float | None, ceiling: Estimate | None) -> float | None:
    """The untrained pair's u as U; above 1 where it is more alike than two trainings of one shape."""
    if floor is None or null is None or ceiling is None or ceiling.value <= null:
        return None
    return (floor - null) / (ceiling.value - null)


def joint_table(results: Results) -> Table:
    """Crosscoders over two subjects: what is one's alone, beside two trainings of one shape and untrained subjects."""
    heads = [Head("first and second", word=True, definition="joint_dictionary"), Head("state", word=True)]
    heads += [heading(key, {"alive": "features"}.get(key)) for key in JOINT]
    lines = []
    found = results.rows.select(arm="joint", role="main")
    for at, rows in found.groups("subject", "training_seed", "other", "state", "site", "k").items():
        second = re.sub(r"(\d+)$", r" seed \1", str(at.other))
        cells = [words(f"{at.subject} seed {at.training_seed}, {second}"), words(str(at.state))]
        lines.append(Line([*cells, *(format_range(rows.seed_range(key, of_known=True)) for key in JOINT)]))
    return Table(heads, lines, "No crosscoder over two subjects was trained (--joint).")


def calibration_table(results: Results) -> Table:
    """What the study's dictionaries find in planted worlds of its own sizes."""
    heads = [Head("world", word=True), *(heading(key) for key in CALIBRATION)]
    lines = []
    for at, rows in results.rows.select(role="calibration", kind=None).groups("subject", "seed").items():
        world = words(f"sizes of {at.subject}", f"world {at.seed}", definition="calibration")
        lines.append(Line([world, *(number(rows.one(key)) for key in CALIBRATION)]))
    return Table(heads, lines, "The study tried its instruments on no planted world.")


VERDICT_TABLES: dict[str, Callable[[Results], Table]] = {
    "gates": gate_table,
    "conditions": condition_table,
    "statistics": statistic_table,
    "estimators": estimator_table,
    "agreement": agreement_table,
    "joint": joint_table,
    "calibration": calibration_table,
}
