"""A decision in words that a reader who has not seen the code understands, and what would decide it if it is none."""

from __future__ import annotations

import math
from collections.abc import Mapping

from crosscoder.measure.fidelity import TARGETS
from crosscoder.measure.statistics import exponentiate
from crosscoder.measure.welch import FEWEST_DOCUMENTS
from crosscoder.results.table import COMPARED, Estimate, LongTable
from crosscoder.results.verdict import Asked, Verdict
from crosscoder.verdict.legs import Shapes
from crosscoder.verdict.rule import (
    CURRENCIES,
    GATES,
    LABELS,
    N_TRAININGS,
    NULLS,
    PREMISES,
    UNITS,
    VERSION,
    Checked,
    Decision,
    Evidence,
    kind_of_r,
)

MEANING = {
    "premise fails: load": "the argument does not start: at equal fidelity the two models' features do not carry equal "
    "loads, so that B does not have to pack the same load into half the neurons",
    "premise fails: features": "the argument does not start: the two models do not learn the same features",
    "H0": "each layer is superposed on its own: loads are equal, and B packs about twice as much on a neuron",
    "H1a": "features persist over layers: loads are equal, and A repeats in its many layers what B says in few",
    "H1b": "features are spread across layers: each layer stays crowded, and only all layers together have room",
    "H2: over": "neither: A repeats more across its layers than the difference in depth asks for",
    "H2: partial": "neither: part of the difference in crowding is made up for, and not all",
    "H2: denser": "neither: B packs more than twice as much on a neuron",
    "pilot": "there is no answer yet: a pilot, with fewer trainings than the rule asks for",
    "undecided": "there is no answer yet: what was measured is compatible with several",
    "not testable": "there is no answer: a requirement without which the numbers say nothing is not met",
}
"""What each label says of the question."""


def tell(decision: Decision, evidence: Evidence, table: LongTable, shapes: Shapes) -> Verdict:
    """The verdict as results keep it.

    table: rows of the subjects, for what is said beside the verdict.
    """
    loads = [f"{ratio(evidence.values.get(f'q/{one}'))} at {words}" for one, words in UNITS.items()]
    sentence = f"{decision.label[:1].upper()}{decision.label[1:]}: {MEANING[decision.label]}. "
    sentence += f"B's load over A's is {' and '.join(loads)}"
    if decision.explained:
        sentence += f"; {' and '.join(decision.explained)}"
    return Verdict(
        version=VERSION,
        label=decision.label,
        sentence=sentence + ".",
        explained=decision.explained,
        reasons=decision.reasons,
        decides=() if decision.is_conclusive else tuple(what_decides(decision, evidence)),
        notes=tuple(notes(evidence, table, shapes)),
        gates=tuple(asked(gate) for gate in decision.gates),
        legs={label: tuple(asked(leg) for leg in legs) for label, legs in decision.legs.items()},
        rule=constants(),
    )


def ratio(found: Estimate | str | None) -> str:
    """A ratio with its interval, given as a log."""
    return format(exponentiate(found), ".2f") if isinstance(found, Estimate) else "not measured"


def asked(one: Checked) -> Asked:
    """A leg or gate as results keep it."""
    return Asked(one.name, one.asked, one.said, one.met)


def what_decides(decision: Decision, evidence: Evidence) -> list[str]:
    """What would have to be run, or would have to come out otherwise."""
    said = [
        f"{n} trainings of {name} instead of {evidence.n_trainings.get(name, 0)}"
        for name, n in N_TRAININGS.items()
        if evidence.n_trainings.get(name, 0) < n
    ]
    universal = [gate for gate in decision.gates if GATES.get(gate.name, (None, None))[1] is None]
    said += [f"{gate.name}: {gate.said}, where {gate.asked} is asked" for gate in universal if gate.met != "met"]
    missing = [leg for leg in decision.legs["premise fails: load"] if leg.met == "not measured"]
    return said + [f"{leg.name}: {leg.said}" for leg in missing]


def notes(evidence: Evidence, table: LongTable, shapes: Shapes) -> list[str]:
    """What is to be read beside the verdict, whatever it is."""
    said = []
    for one in CURRENCIES:
        r = evidence.values.get(f"r/{one}")
        if isinstance(r, Estimate):
            kind = kind_of_r(r)
            where = f"the range of {kind}" if kind else "no label's range wholly"
            said.append(
                f"features a neuron and layer, B over A, by banks alone: {ratio(r)} at {UNITS[one]}, in {where}; "
                "complete superposition in each layer at equal loads says 2"
            )
    deep = {name: shapes[name][0] / shapes[name][1] ** 0.44 for name in COMPARED}
    said += [
        f"{name} is deep for its width: L / W^.44 is {value:.2f}, above 1" for name, value in deep.items() if value > 1
    ]
    for name in COMPARED:
        where = {"subject": name, "state": "trained", "arm": "crosscoder", "role": "main", "site": "write"}
        dead = table.values("dead_share", **where)
        if dead and max(dead) <= 0.05:
            said.append(
                f"{name}'s dictionaries use all their features, so that their number says nothing of the model's"
            )
    return [*said, *_text_variance(table)]


CARRIES = {
    "held_out_loss_left": "losses",
    "explained_variance_left": f"loads at {UNITS['fvu']}",
    "spliced_loss_left": f"loads at {UNITS['loss']}",
    "causal_layers_left": "causal layers and conjunctive shares",
    "raw_density_rest_left": "what removing twins moves",
    "lookup_share_left": "token lookup",
}
"""What has the text's own variance, by the quantity that says so."""


def _text_variance(table: LongTable) -> list[str]:
    """Which intervals carry the variance of the text's documents beside that over trainings."""
    n_documents = table.one("n_documents")
    if n_documents is None:
        return []
    if n_documents < FEWEST_DOCUMENTS:
        return [
            f"the held-out text has {n_documents} documents; for its own part of the variance {FEWEST_DOCUMENTS} of "
            "them have to be read: intervals are over trainings alone"
        ]
    where = {"subject": COMPARED, "state": (None, "trained")}
    carry = [words for key, words in CARRIES.items() if len(table.select(key, **where))]
    return [
        f"{', '.join([*carry, 'U, rates of matched features'])}, and what is computed from them, carry the variance of "
        f"the text's {n_documents} documents beside that over trainings; twins are of directions, which no text moves, "
        "and rooms are of the text that dictionaries train on"
    ]


def constants() -> dict[str, object]:
    """The rule's own numbers, as results keep them."""

    def bounds(low: float, high: float) -> list[float | None]:
        return [None if math.isinf(end) else end for end in (low, high)]

    legs: Mapping[str, object] = {
        label: {leg.statistic: [*bounds(leg.low, leg.high), "outside" if leg.outside else "inside"] for leg in each}
        for label, each in (PREMISES | LABELS).items()
    }
    gates = {
        name: [*bounds(leg.low, leg.high), sorted(labels) if labels else "all"] for name, (leg, labels) in GATES.items()
    }
    return {
        "legs": legs,
        "gates": gates,
        "trainings": N_TRAININGS,
        "targets": {name: list(each) for name, each in TARGETS.items()},
        "nulls": {name: list(one[1]) for name, one in NULLS.items()},
    }
