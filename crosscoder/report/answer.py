"""What a study says in two sentences, and what is known of its subjects and their main dictionaries.

All arithmetic here is on finished numbers; ranges are over training and dictionary seeds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from crosscoder.report.table import WORDS, linked, shown
from crosscoder.results.file import Results
from crosscoder.results.table import COMPARED, SITES, Estimate, State
from crosscoder.verdict import evidence, legs
from crosscoder.verdict.legs import SITE

NULLS: tuple[State, ...] = ("gaussian", "frozen_encoder", "frozen_decoder", "soft_decoder", "untrained", "shuffled")
"""In the order in which they are shown."""
STATES: tuple[State, ...] = ("trained", *NULLS)
FOR_ONE = ("causal_layers", "conjunctive_share", "label_gain", "mean_rho_model", "mean_rho", "twin_share")
FOR_ONE += ("matched_share", "explained_variance")
"""What is said of one model, first what says most; three of those that were measured are on the first screen."""


class Arm(NamedTuple):
    """How the dictionaries of one arm are called and drawn."""

    name: str
    marker: str
    line: str
    filled: bool

    def face(self, color: str) -> str:
        return color if self.filled else "white"


ARMS = {
    "crosscoder": Arm("crosscoder", "o", "-", filled=True),
    "layerwise": Arm("per-layer SAEs", "s", "--", filled=False),
}


def main_range(results: Results, key: str, **where: Any) -> Estimate | None:
    """Mean and range of a quantity of main crosscoders, over the training and dictionary seeds that have one."""
    return results.rows.known_range(key, **{"arm": "crosscoder", "role": "main", "layer": None, **where})


def known_of(results: Results, name: str, key: str) -> Any:
    """What is known of a subject: mean and range where its trainings differ, None where one lacks it."""
    values: list[Any] = [row.value for row in results.rows.select(key, subject=name, role=None)]
    if len(set(values)) <= 1 or None in values:
        return None if None in values else next(iter(values), None)
    return Estimate.over([float(value) for value in values])


def joint_site(results: Results) -> str:
    """The site on which a model's crosscoders are shown first: block writes, where there are any."""
    where: dict[str, Any] = {"state": "trained", "arm": "crosscoder", "role": "main"}
    return next((site for site in SITES if results.rows.cells("explained_variance", site=site, **where)), SITES[0])


def beside_nulls(results: Results, key: str, **where: Any) -> dict[State, Estimate]:
    """A quantity of the trained subject and of every null that has one: mean and range, or its interval over trainings
    where the text's part in that is known."""
    found: dict[State, Estimate] = {}
    for state in STATES:
        if (one := main_range(results, key, state=state, **where)) is not None:
            found[state] = _with_text(results, key, state, **where) or one
    return found


def _with_text(results: Results, key: str, state: State, *, site: str, subject: str | None = None) -> Estimate | None:
    if subject is None or site != SITE or not results.rows.select(f"{key}_left", subject=subject, state=state):
        return None
    found = evidence.over_trainings(legs.main_values(results.rows, subject, key, state))
    return found if isinstance(found, Estimate) else None


def answer(results: Results) -> list[str]:
    """The answer: the verdict and how good the models are, or for one model what its first number says."""
    if results.verdict is None:
        return _answer_for_one(results)
    models = _beside_tables(results)
    return [results.verdict.sentence, models] if models else [results.verdict.sentence]


def _beside_tables(results: Results) -> str:
    """How the compared models' losses stand to n-gram tables of the text that they read."""
    keys = ("held_out_loss", "bigram_loss", "trigram_loss")
    found = {key: [_mean(known_of(results, name, key)) for name in COMPARED] for key in keys}
    losses = [one for one in found["held_out_loss"] if one is not None]
    if len(losses) < len(COMPARED):
        return ""
    said = "Held-out losses are " + " and ".join(f"{loss:.2f} ({name})" for name, loss in zip(COMPARED, losses))
    said += " nats a token"
    trigrams, bigrams = ([one for one in found[f"{n}gram_loss"] if one is not None] for n in ("tri", "bi"))
    if len(trigrams) < len(losses) or len(bigrams) < len(losses):
        return f"{said}."
    better = sum(loss < table for loss, table in zip(losses, trigrams, strict=True))
    worth = "both are better" if better == len(losses) else "neither is better" if better == 0 else "one is better"
    tables = " and ".join(f"{min(one):.2f} to {max(one):.2f}" for one in (bigrams, trigrams))
    beside = f"bigram and trigram tables of the text that they read have {tables}"
    return f"{said}; {beside}: {worth} than a trigram table, by the mean."


def _mean(value: Any) -> float | None:
    return value.value if isinstance(value, Estimate) else value


def _answer_for_one(results: Results) -> list[str]:
    site = joint_site(results)
    for key in FOR_ONE:
        found = beside_nulls(results, key, site=site)
        if "trained" in found:
            return [WORDS["answer_for_one"], _against(key, found)]
    return [WORDS["answer_for_one"]]


def _against(key: str, found: dict[State, Estimate]) -> str:
    """One sentence on a number and the nulls that surround it."""
    real, nulls = found["trained"], [one for state, one in found.items() if state != "trained"]
    title = "".join(text for text, _ in linked(WORDS["numbers"][key]["title"]))
    said = f"{title}: {shown(real, '.3g')}"
    if not nulls:
        return f"{said}; no null was measured."
    low, high = min(one.low for one in nulls), max(one.high for one in nulls)
    ends = f"{low:.3g} to {high:.3g}" if low < high else f"{low:.3g}"
    if real.low <= high and low <= real.high:
        return f"{said}, which lies among its nulls ({ends}), so that nothing has to be explained."
    return f"{said}, {'above' if real.low > high else 'below'} every null ({ends})."
