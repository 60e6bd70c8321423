"""Print every quantity and term of a study into `docs/results.md`, under its heading `Quantities`."""

from __future__ import annotations

from pathlib import Path

from crosscoder.foundation.artifact import replace_file
from crosscoder.results.quantities import GROUPS, TERMS, Quantity

DOCUMENT = Path(__file__).parents[1] / "docs" / "results.md"
HEADING = "## Quantities"
TITLES = {
    "counts": ("Features of a dictionary", "a dictionary and its seed"),
    "cell": ("What a dictionary was measured on", "a dictionary"),
    "pair": ("Agreement of dictionary seeds", "a dictionary; the mean over all pairs of its seeds"),
    "quality": ("Reconstruction", "a dictionary and its seed"),
    "splice": ("Reconstructions in the subject", "a dictionary and its seed; some also a layer, or `all`"),
    "spread": ("Where features are written", "a crosscoder and its seed; profiles and labels of the first seed"),
    "stability": ("Which features are found again", "a crosscoder with three seeds or more"),
    "causal": ("Which layers act", "a crosscoder and its first seed"),
    "labels": ("What the text says of features", "a crosscoder and its first seed"),
    "room": (
        "How many dimensions the writes fill",
        "subject, training seed, state, site, estimator (units); exponents: site and estimator",
    ),
    "point": ("A shape's dictionaries", "subject, training seed, state, site, on the main crosscoders"),
    "site": (
        "Statistics of the rule",
        "site; some also a state and an estimator: a currency, or statistic-currency at a null; shares a kind",
    ),
    "agreement": ("Are the features the same", "site"),
    "planted": ("Planted worlds", "size and seed of a dictionary, world seed; some an estimator or a kind"),
    "calibration": ("The study's instruments on planted pairs", "role `calibration`, world seed"),
    "subject": ("Subjects", "subject; losses and tokens also a training seed"),
    "compared": ("Dictionaries that are compared", "dictionary"),
    "between": ("Two dictionaries of one model and text", "dictionary, against; of both at kind `pair`"),
    "effects": (
        "What a feature does to predictions",
        "feature, layer; of a control also its kind; of all features no place, or the kind alone",
    ),
    "study": ("The study", "no place: they are of everything"),
}
HOLDS = {"number": "number", "whole": "whole number", "flag": "true or false", "list": "list", "texts": "texts"}
HOLDS |= {"text": "text", "lists": "list of lists"}


def render(document: str) -> str:
    """The document with everything below its heading written from the registry."""
    prose, _, _ = document.partition(f"{HEADING}\n")
    lines = [HEADING, ""]
    for group, entries in GROUPS.items():
        title, place = TITLES.get(group, (group.capitalize(), "see the rows"))
        lines += [f"### {title}", "", f"At: {place}.", "", "| key | unit | definition |", "|---|---|---|"]
        for key, one in entries.items():
            sentence = one.definition.replace("|", "\\|")
            lines.append(f"| `{key}` | {_unit(one)} | {sentence} |")
        lines.append("")
    lines += ["## Terms", ""]
    lines += [f"- **{key}**: {sentence}" for terms in TERMS.values() for key, sentence in terms.items()]
    return prose + "\n".join(lines) + "\n"


def _unit(one: Quantity) -> str:
    if one.unit in ("text", "flag"):
        return HOLDS[one.value]
    return one.unit if one.value == "number" else f"{one.unit}, {HOLDS[one.value]}"


if __name__ == "__main__":
    replace_file(DOCUMENT, render(DOCUMENT.read_text(encoding="utf-8")).encode("utf-8"))
