"""The folded tables of the verdict: gates, legs, statistics beside their nulls, agreement, shares, calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crosscoder.report.answer import NULLS
from crosscoder.report.table import (
    WORDS,
    Line,
    Table,
    Value,
    asks,
    brief,
    format_range,
    heading,
    named,
    prose,
    sign,
    state_heads,
    word_heads,
    words,
)
from crosscoder.results.file import Results
from crosscoder.results.quantities import NOTES, QUANTITIES
from crosscoder.results.table import Estimate, LongTable, Row
from crosscoder.results.verdict import Asked
from crosscoder.verdict.rows import KEYS
from crosscoder.verdict.rule import UNITS

EQUALLY: dict[str, str] = {currency: f"at {words}" for currency, words in UNITS.items()}
MOST_REASONS = 3
READ = {name: key for name, key in KEYS.items() if name != "room_scaled"} | {"alpha": "load_alpha"}
AGREEMENT = ("u", "u_null", "u_ceiling", "universality", "matched_between", "median_log_rate", "rate_dispersion")
OTHERS = ("kappa", "conjunctive_excess", "conjunctive_or_twin_excess", "removal_share", "headroom")
SHARES = ("load", "persistence", "left_layers", "geometry", "width", "left_joint")
CALIBRATION = ("calibration_mcc", "calibration_q_error", "calibration_g_error", "calibration_room_error")
CALIBRATION += ("calibration_fvu",)
SIGNS = {"met": "✓", "missed": "✗", "open": "?", "not measured": "–"}


def gate_table(results: Results) -> Table:
    """Every gate of the verdict with what was asked and measured."""
    lines, reasons = [], []
    for gate in results.verdict.gates if results.verdict else ():
        says, key = WORDS["gates"].get(gate.name, (gate.name, None))
        measured = gate.measured
        if gate.met == "not measured":
            reasons.append(brief(measured.removeprefix("not measured: ")))
            measured = "–"
        asked = prose(asks(gate.requirement))
        lines.append(Line([words(says, definition=key), sign(gate.met), prose(measured), asked]))
    return Table(word_heads("gate", "", "measured", "asked"), lines, _why(reasons), wide=False)


def label_table(results: Results) -> Table:
    """What each label asks for and how each of its legs stands."""
    if results.verdict is None:
        return Table([], [])
    lines = [Line([words(label), prose(_legs(legs))]) for label, legs in results.verdict.legs.items()]
    given = label_term(results.verdict.label)
    return Table(word_heads("label", "legs"), lines, wide=False, terms=("in_band", *([given] if given else [])))


def label_term(label: str) -> str | None:
    key = label.replace("premise fails: ", "premise-").replace(" ", "-").split(":")[0]
    return key if key in NOTES else None


def _legs(legs: Sequence[Asked]) -> str:
    """All legs of a label in one line; those of two currencies that stand alike are said once."""
    said: dict[tuple[str, str], list[str]] = {}
    for leg in legs:
        asked = asks(leg.requirement).removeprefix(leg.name.split("/")[0]).strip()
        said.setdefault((asked, leg.met), []).append(leg.name)
    return "; ".join(f"{SIGNS[met]} {', '.join(names)} {asked}" for (asked, met), names in said.items())


def statistic_table(results: Results) -> Table:
    """What is read at common fidelity, a line each, trained beside every null, with what is left without the null."""
    rows = LongTable(tuple(row for key in READ.values() for row in results.rows.select(key)))
    states = [state for state in NULLS if len(rows.select(state=state))]
    lines, reasons = [], []
    for currency, said in EQUALLY.items():
        for name, key in READ.items():
            real = rows.select(key, estimator=currency, state=("trained", None))
            if not len(real):
                continue
            reasons += [brief(row.missing) for row in real if row.missing]
            nulls = {
                state: next(iter(rows.select(key, estimator=currency, state=state).values(key)), None)
                for state in states
            }
            value = next(iter(real)).value
            if value is None and not any(nulls.values()):
                continue
            cells = [format_range(value)]
            for state, null in nulls.items():
                less = results.rows.one("null_excess", state=state, estimator=f"{name}-{currency}")
                mean, alone = (null.value, "") if isinstance(null, Estimate) else (null, WORDS["alone"])
                cells.append(format_range(mean, alone * (mean is not None) if less is None else f"less: {less:.2f}"))
            lines.append(Line([named(key), *cells], said))
    heads = [*word_heads(""), *state_heads(["trained", *states])]
    return Table(heads, lines, _why(reasons), terms=("fidelity", "interval", *(("null_excess",) * bool(states))))


def _why(reasons: Sequence[str]) -> str:
    """The first different reasons why numbers are missing."""
    different = list(dict.fromkeys(reasons))
    if not different:
        return ""
    said, left = different[:MOST_REASONS], len(different) - MOST_REASONS
    said += [WORDS["notes"]["more_reasons"].format(n=left)] * (left > 0)
    return WORDS["notes"]["why"].format(reasons="; ".join(said))


def _values(keys: Sequence[str]) -> Callable[[Results], Table]:
    """A table of statistics of the pair, a line each, those that were asked for."""

    def table(results: Results) -> Table:
        rows = [row for key in keys for row in results.rows.select(key, state=None, role=None, subject=None)]
        reasons = [brief(row.missing) for row in rows if row.missing]
        lines = [_line(row, several=len(results.rows.select(row.key)) > 1) for row in rows if results.verdict]
        return Table(word_heads("", "value"), lines, _why(reasons), wide=False, terms=("interval",))

    return table


def _line(row: Row, *, several: bool) -> Line:
    said = QUANTITIES[row.key].words + (f" ({row.at.site})" if several else "")
    return Line([named(row.key, said), format_range(row.value)])


def share_table(results: Results) -> Table:
    """Shares of ln 2, in both currencies."""
    lines = []
    for kind in SHARES:
        found = [results.rows.one("share_of_ln2", kind=kind, estimator=one) for one in EQUALLY]
        if any(value is not None for value in found):
            said = {"left_layers": "left in layers", "left_joint": "left in all layers together"}.get(kind, kind)
            lines.append(Line([named("share_of_ln2", said), *map(format_range, found)]))
    return Table(word_heads("share of ln 2", *EQUALLY.values()), lines, wide=False, terms=("interval",))


def calibration_table(results: Results) -> Table:
    """What the study's dictionaries find in planted worlds of its own sizes, a line a pair."""
    lines, reasons = [], []
    for at, rows in results.rows.select(role="calibration").groups("seed").items():
        if any(len(rows.select(key)) for key in CALIBRATION):
            cells: list[Value] = [format_range(rows.one(key)) for key in CALIBRATION]
            lines.append(Line([words(f"pair {at.seed}", definition="calibration"), *cells]))
            reasons += [brief(row.missing) for row in rows if row.missing]
    return Table([*word_heads(""), *map(heading, CALIBRATION)], lines, _why(reasons))


VERDICT_TABLES: dict[str, Callable[[Results], Table]] = {
    "gates": gate_table,
    "labels": label_table,
    "statistics": statistic_table,
    "others": _values(OTHERS),
    "same": _values(AGREEMENT),
    "shares": share_table,
    "calibration": calibration_table,
}
