"""What a study says in two sentences, and what is known of its subjects and their main dictionaries.

All arithmetic here is on finished numbers; ranges are over training and dictionary seeds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from crosscoder.foundation.artifact import read_json
from crosscoder.report.table import shown
from crosscoder.results.file import Results
from crosscoder.results.table import SITES, Estimate, LongTable

WORDS = read_json(Path(__file__).parent / "templates" / "words.json")


class Arm(NamedTuple):
    """How the dictionaries of one arm are called, counted and drawn."""

    name: str
    short: str
    group: str
    """Of the seed paper's table."""
    counts: tuple[str, str]
    """Its alive features, and those told apart."""
    marker: str
    line: str
    filled: bool

    def face(self, color: str) -> str:
        """What fills a mark or a bar of this colour."""
        return color if self.filled else "white"

    def bar(self, color: str) -> dict[str, Any]:
        """The style of a bar of this colour."""
        return {"facecolor": self.face(color), "edgecolor": color, "hatch": None if self.filled else "////"}


ARMS = {
    "layerwise": Arm("per-layer SAEs", "bank", "per-layer", ("alive", "merged"), "s", "--", filled=False),
    "crosscoder": Arm("crosscoder", "crosscoder", "cross-layer", ("alive", "distinct"), "o", "-", filled=True),
}


def main_range(results: Results, key: str, **where: Any) -> Estimate | None:
    """Mean and range of a quantity of the main dictionaries, over training and dictionary seeds."""
    return results.rows.seed_range(key, role="main", layer=None, **where)


def known_of(results: Results, name: str, key: str) -> Any:
    """What is known of a subject: the mean where its trainings differ, None where one lacks it; `neurons` are L * D."""
    if key == "neurons":
        return results.of(name, "n_layers") * results.of(name, "d_model")
    values: list[Any] = [row.value for row in results.rows.select(key, subject=name, role=None)]
    if len(set(values)) <= 1 or None in values:
        return None if None in values else next(iter(values), None)
    mean = math.fsum(values) / len(values)
    return round(mean) if key == "training_tokens" else mean


def answer(results: Results) -> list[str]:
    """The answer in two sentences: the verdict, and how far the ratio moves with the estimator and without training."""
    if results.verdict is None:
        return _answer_for_one(results)
    shapes, losses = [], []
    for name in results.subjects:
        shapes.append(f"{name} {results.of(name, 'n_layers')} layers of {results.of(name, 'd_model')}")
        loss = known_of(results, name, "held_out_loss")
        losses.append(f"not measured ({name})" if loss is None else f"{loss:.3f} ({name})")
    second = (
        f"Models of {results.of('A', 'parameters_non_embedding'):,} parameters in A's blocks ({', '.join(shapes)}) "
        f"with held-out losses of {', '.join(losses)} nats a token"
    )
    second += _beside_tables(results)
    by_load, by_count = (_spread(results, kind) for kind in ("load", "count"))
    if by_load:
        second += f"; on what blocks write, R (B's density over A's) is {by_load} by the entropy load of the features"
    if by_count:
        second += f" and {by_count} by their number, which full dictionaries of one size all but fix"
    return [results.verdict.sentence, second + "; 2 would be the paradox and 1 reconciliation."]


def _beside_tables(results: Results) -> str:
    """How the subjects' losses stand to n-gram tables of the text that they read; empty where nobody counted them."""
    tables = {
        key: [known_of(results, name, key) for name in results.subjects] for key in ("bigram_loss", "trigram_loss")
    }
    losses = [known_of(results, name, "held_out_loss") for name in results.subjects]
    if None in (*losses, *tables["bigram_loss"], *tables["trigram_loss"]):
        return ""
    said = " and ".join(f"{min(found):.2f} to {max(found):.2f} ({key[:-5]})" for key, found in tables.items())
    better = sum(loss < table for loss, table in zip(losses, tables["trigram_loss"], strict=True))
    worth = "all are better" if better == len(losses) else "none is better" if better == 0 else f"{better} are better"
    return f", where tables counted on what they read have {said}: {worth} than a trigram table"


def _spread(results: Results, kind: str) -> str:
    """From the lowest to the highest R of one kind of estimator on the primary site, and of the untrained pair."""
    said = []
    for state in ("trained", "untrained"):
        rows = results.rows.select("ratio", site=SITES[0], state=state)
        found = [row.value for row in rows if str(row.at.estimator).startswith(kind)]
        values = [one.value for one in found if isinstance(one, Estimate)]
        if values:
            said.append(f"{min(values):.2f} to {max(values):.2f}")
    return "" if not said else said[0] if len(said) == 1 else f"{said[0]} (untrained {said[1]})"


def _answer_for_one(results: Results) -> list[str]:
    where = {"subject": results.subjects[0], "state": "trained", "site": "residual", "role": "main"}
    found = [next(iter(results.rows.cells("alive", arm=arm, **where).values()), None) for arm in ARMS]
    bank, cross = found
    if bank is None or cross is None:
        return ["One of the two arms is missing.", "Nothing can be compared."]
    n_layers = len(next(iter(cross.values("explained_variance_per_layer")), []))
    low, high = bank.seed_range("merged_low"), bank.seed_range("merged_high")
    band = f"{low.low:.0f} to {high.high:.0f}" if low and high else "not measured"
    first = (
        f"On {n_layers} layers the per-layer bank has {_number(bank, 'alive')} alive features that merge to "
        f"{_number(bank, 'merged')} distinct ones (band {band} by rule), and the crosscoder has "
        f"{_number(cross, 'distinct')} distinct features that occupy {_number(cross, 'mean_rho', '.2f')} of {n_layers} "
        "layers each."
    )
    second = (
        f"The bank explains {_mean(bank, 'explained_variance', '.1%')} of the variance with "
        f"{_mean(bank, 'l0_token', '.0f')} active features a token and the crosscoder "
        f"{_mean(cross, 'explained_variance', '.1%')} with {_mean(cross, 'l0_token', '.0f')}; "
        f"{_alive_share(bank)} and {_alive_share(cross)} of the dictionaries are alive, so counts near the "
        "dictionary's size say more about the dictionary than about the model."
    )
    return [first, second]


def _number(cell: LongTable, key: str, form: str = ".0f") -> str:
    return shown(cell.seed_range(key), form, "an unknown number of")


def _mean(cell: LongTable, key: str, form: str) -> str:
    found = cell.seed_range(key)
    return shown(found and found.value, form, "an unknown share")


def _alive_share(cell: LongTable) -> str:
    dead = cell.seed_range("dead_share")
    return shown(dead and 1 - dead.value, ".0%", "an unknown share")
