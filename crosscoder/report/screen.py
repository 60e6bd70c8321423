"""The first screen: the question, the answer or why there is none, three numbers beside their nulls, ten features."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crosscoder.measure.statistics import exponentiate
from crosscoder.measure.strongest import NEXT, PEAK
from crosscoder.report.answer import FOR_ONE, NULLS, answer, beside_nulls, joint_site
from crosscoder.report.table import (
    NOTHING,
    WORDS,
    Head,
    Line,
    Phrase,
    Table,
    Value,
    asks,
    brief,
    linked,
    shown,
    state_phrase,
    words,
)
from crosscoder.report.verdict_tables import EQUALLY
from crosscoder.results.file import Results
from crosscoder.results.quantities import QUANTITIES
from crosscoder.results.table import COMPARED, Estimate
from crosscoder.results.verdict import Asked, Verdict
from crosscoder.verdict.legs import SITE
from crosscoder.verdict.rows import KEYS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SAID = 4
"""Requirements that are named on the first screen; the others are counted."""
_PAGE = re.compile(r"[A-Za-z0-9_-]+/index\.html")
_STATISTIC = re.compile(rf"\b({'|'.join(KEYS)})/({'|'.join(EQUALLY)})")


@dataclass(frozen=True)
class Number:
    """One of the three numbers: its title, what was measured where, what the argument says, and its nulls."""

    title: Phrase
    values: list[tuple[str, Phrase]]
    argument: str
    nulls: list[tuple[str, Phrase]]

    @property
    def phrases(self) -> Iterator[Phrase]:
        """All that may link to definitions."""
        yield self.title
        yield from (phrase for _, phrase in (*self.values, *self.nulls))


@dataclass(frozen=True)
class Screen:
    """What the first screen shows; empty parts are not there."""

    question: Phrase
    answer: list[str]
    numbers: list[Number]
    why: list[Phrase] = field(default_factory=list)
    decides: list[Phrase] = field(default_factory=list)
    features: Table = field(default_factory=lambda: Table([], []))
    more: str = ""
    """How many requirements are not named."""

    def cited(self) -> set[str]:
        """Keys of the definitions that it links to."""
        phrases = [self.question, *self.why, *self.decides, *(phrase for one in self.numbers for phrase in one.phrases)]
        return {key for phrase in phrases for _, key in phrase if key} | self.features.cited()


@dataclass(frozen=True)
class Parts:
    """A page in parts: its first screen, tables with their titles by name, the tables of each folded section, and what
    draws its pictures.

    first: pictures of the first screen, of which the first that there is is shown. shown_in: the section of others.
    names: what the page is about, for its last line. title: of the page; empty: that of the kind of results. source:
    whether it answers the question that the package is for.
    """

    screen: Screen
    tables: dict[str, Table]
    titles: dict[str, str]
    sections: dict[str, tuple[str, ...]]
    pictures: Mapping[str, Callable[[Results], Figure | None]]
    first: tuple[str, ...]
    shown_in: dict[str, str]
    names: list[str]
    title: str = ""
    source: bool = False


def first_screen(results: Results) -> Screen:
    verdict = results.verdict
    decides, left = ([], 0) if verdict is None else _decides(verdict)
    return Screen(
        question=_question(results),
        answer=answer(results),
        why=[] if verdict is None else _reasons(verdict),
        decides=decides,
        numbers=_of_pair(results) if verdict is not None else _of_one(results),
        features=Table([], []) if verdict is not None else feature_table(results),
        more=WORDS["more"].format(n=left) if left else "",
    )


def _question(results: Results) -> Phrase:
    text = WORDS["question"][results.provenance.kind]
    if results.verdict is None:
        name = results.subjects[0]
        layers = next(iter(results.rows.values("layers", subject=name)), [])
        sizes = {key: results.of(name, key) for key in ("n_layers", "d_model")}
        return linked(text, layers=len(layers) or "All", name=results.of(name, "name") or name, **sizes)
    (deep, narrow), (shallow, wide) = ([results.of(name, key) for key in ("n_layers", "d_model")] for name in COMPARED)
    ratio = f"{deep * narrow / (shallow * wide):.3g}"
    depths = {"deep": _layers(deep), "shallow": _layers(shallow)}
    return linked(text, narrow=narrow, wide=wide, ratio=ratio, **depths)


def _layers(n: int) -> str:
    return f"{n} layer{'' if n == 1 else 's'}"


def _reasons(verdict: Verdict) -> list[Phrase]:
    """Why it is that answer, gates and statistics in words."""
    gates = {gate.name: gate for gate in verdict.gates}
    return [_in_words(one, gates) for one in verdict.reasons[:MOST_SAID]]


def _decides(verdict: Verdict) -> tuple[list[Phrase], int]:
    """What would have to be run or to come out otherwise, in words, and how much more is not named."""
    gates = {gate.name: gate for gate in verdict.gates}
    said = [_in_words(one, gates) for one in verdict.decides]
    return said[:MOST_SAID], len(said[MOST_SAID:])


def _in_words(text: str, gates: dict[str, Asked]) -> Phrase:
    """A reason of the verdict: a gate as what it asks for, the names of statistics as their words."""
    if text.split(": ")[0] in gates:
        return _requirement(gates[text.split(": ")[0]])
    pieces = _STATISTIC.split(re.sub(r", asked \S+ ", "; asked: ", brief(text)))
    phrase = [(pieces[0], None)]
    for name, currency, after in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        phrase += [(QUANTITIES[KEYS[name]].words, KEYS[name]), (f" {EQUALLY[currency]}{after}", None)]
    return [piece for piece in phrase if piece[0]]


def _requirement(gate: Asked) -> Phrase:
    """A gate in words, with what was measured and asked."""
    says, key = WORDS["gates"].get(gate.name, (gate.name, None))
    measured = gate.measured if gate.met != "not measured" else "nothing"
    before, after = WORDS["requirement"].split("{says}")
    return [(before, None), (says, key), (after.format(measured=measured, asked=asks(gate.requirement)), None)]


def _of_pair(results: Results) -> list[Number]:
    """Loads, features a neuron and layer, and layers that features act on; crowding where those are not known."""
    acts = _causal(results)
    last = [acts] if acts else [_ratio(results, "room_log_ratio")]
    return [_ratio(results, "load_log_ratio"), _ratio(results, "bank_log_ratio"), *last]


def _ratio(results: Results, key: str) -> Number:
    """A log ratio as a ratio, in both currencies, with its nulls."""

    def read(states: Any) -> list[tuple[str, str]]:
        rows = results.rows.select(key, site=SITE, state=states)
        return [
            (str(row.at.estimator), shown(exponentiate(row.value), ".2f") + said_alone(row.value))
            for row in rows
            if isinstance(row.value, (Estimate, float))
        ]

    real = [(value, linked(WORDS["currencies"][currency])) for currency, value in read(("trained", None))]
    found = {state: dict.fromkeys(value for _, value in read(state)) for state in NULLS}
    nulls = [(" and ".join(values), state_phrase(state)) for state, values in found.items() if values]
    return _number(key, real, nulls)


def said_alone(value: Estimate | float) -> str:
    """What is said of a value that is of one training."""
    return "" if isinstance(value, Estimate) else f" ({WORDS['alone']})"


def _number(
    key: str, values: list[tuple[str, Phrase]], nulls: list[tuple[str, Phrase]], argument: str = "argument"
) -> Number:
    said = WORDS["numbers"][key]
    return Number(linked(said["title"]), values, said[argument], nulls)


def _causal(results: Results) -> Number | None:
    """Layers that features of A and of B act on."""
    found = {name: beside_nulls(results, "causal_layers", subject=name, site=SITE) for name in COMPARED}
    values: list[tuple[str, Phrase]] = []
    for name, by_state in found.items():
        if "trained" in by_state:
            of = f"of {name}'s {_layers(results.of(name, 'n_layers'))}"
            values.append((shown(by_state["trained"], ".2f"), [(of, None)]))
    nulls = []
    for state in NULLS:
        if known := [f"{shown(one[state], '.2f')} in {name}" for name, one in found.items() if state in one]:
            nulls += [(" and ".join(known), state_phrase(state))]
    kappa = results.rows.select("kappa", site=SITE).values("kappa")
    if kappa:
        values.append((shown(kappa[0], ".2f"), linked("[growth with depth](kappa), 90 % interval: 0 none, 1 in step")))
    with_text = len(results.rows.select("causal_layers_left", subject=COMPARED)) > 0
    argument = "argument_with_text" if with_text else "argument"
    return _number("causal_layers", values, nulls, argument) if values else None


def _of_one(results: Results) -> list[Number]:
    """Three of what was measured of one model's crosscoder."""
    site, numbers = joint_site(results), []
    for key in FOR_ONE:
        found = beside_nulls(results, key, site=site)
        if "trained" not in found:
            continue
        values = [(shown(found.pop("trained"), ".3g"), linked("trained"))]
        nulls = [(shown(one, ".3g"), state_phrase(state)) for state, one in found.items()]
        numbers.append(_number(key, values, nulls))
    return numbers[:3]


def feature_table(results: Results) -> Table:
    """The ten features of one crosscoder that write most, each with what is known of it."""
    columns = ("", "share of energy", "active on", "layers written to", "strongest layer", "layers it acts on")
    heads = [Head(one, "top_features" if one else None) for one in columns]
    heads.append(Head("tokens where it is strongest", "top_feature_tokens", word=True))
    where: dict[str, Any] = {"subject": results.subjects[0], "training_seed": 0, "site": joint_site(results)}
    cell = results.rows.select(state="trained", arm="crosscoder", role="main", **where)
    known = next(iter(cell.values("top_features")), [])
    tokens = next(iter(cell.values("top_feature_tokens")), [""] * len(known))
    acts = {round(one[0]): one[1] for one in next(iter(cell.values("causal_by_feature")), [])}
    labels = next(iter(cell.values("layers")), [])
    examples = next(iter(cell.values("top_feature_examples")), [""] * len(known))
    page = next((one for one in cell.values("features_page") if _PAGE.fullmatch(str(one))), None)
    lines = []
    for (index, energy, rate, rho, strongest, share), seen, texts in zip(known, tokens, examples, strict=False):
        place = round(strongest)
        layer = labels[place] if 0 <= place < len(labels) else str(place + 1)
        effect = acts.get(round(index))
        lines.append(
            Line(
                [
                    Value(f"{round(index)}", style="word", href=f"{page}#feature={round(index)}" if page else None),
                    Value(f"{energy:.1%}"),
                    Value(f"{rate:.1%}"),
                    Value(f"{rho:.1f}"),
                    Value(f"{layer}", f"{share:.0%}"),
                    Value(NOTHING if effect is None else f"{effect:.1f}"),
                    words(seen),
                ],
                below=[_marked(one) for one in texts.split(NEXT) if one],
            )
        )
    note = "" if page is None else WORDS["all_features"].format(page=page)
    return Table(heads, lines, wide=False, note=note, href=page)


def _marked(example: str) -> list[tuple[str, bool]]:
    """The pieces of an example, of which the second is that of its token."""
    before, opened, rest = example.partition(PEAK[0])
    peak, closed, behind = rest.partition(PEAK[1])
    return [(before, False), (peak, True), (behind, False)] if opened and closed else [(example, False)]
