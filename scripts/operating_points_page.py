"""The page of the operating points: what was planted, what the rule said, how far instruments are off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import machine_line, markdown_table, number

MARK = "<!-- written by operating_points.py from here on -->"
HEAD = ["# Operating points of rule version 3", ""]
INPUTS = (
    ("loads, joint and of banks, at equal FVU", "dictionaries", "own planted source, several k"),
    (
        "loads at equal loss",
        "FVU measured, loss planted",
        "the share of the harm of ablation lost is .3 of the FVU, .05 (sd of ln) between trainings",
    ),
    ("room", "covariance of planted tokens", "the library's unbiased participation ratio"),
    ("effective dimension, twins, self-cosine, matched share", "dictionaries", "two starts, each with its own order"),
    ("universality, rates", "dictionaries", "on the same held-out tokens"),
    ("calibration's errors, room at twice the size", "dictionaries", "pairs of their own; first training"),
    (
        "layers that features act on",
        "planted number",
        "participation of the planted windows, .05 (sd of ln), not a measured scatter",
    ),
    (
        "conjunctive share",
        "planted number",
        "1 of features of two letters, 0 of others, less or more .03, not a measured scatter",
    ),
    ("held-out loss, trigram's loss, lookup's share", "planted number", "2.57, 2.75 nats, .6; of bigrams 2.89 and .9"),
    ("nulls", "set to 0", "so that they explain nothing: what Gaussian data give is a plant of its own"),
)
KEYS = ("q/fvu", "r/fvu", "room/fvu", "kappa")


def write_page(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the tables under what stands above them in the page, or under a title."""
    path = folder / "README.md"
    above = path.read_text().partition(MARK)[0].rstrip().splitlines() if path.is_file() else HEAD[:1]
    lines = [*above, "", MARK, "", machine_line(record["machine"]), "", *tables(record)]
    path.write_text("\n".join(lines) + "\n")


def tables(record: Mapping[str, Any]) -> list[str]:
    """All tables with what they say."""
    seconds = sum(one["cpu_seconds"] for one in record["studies"])
    return [
        f"Studies with dictionaries took {seconds / 60:.0f} minutes of a core.",
        "",
        "## What is measured, and what is planted as a number",
        "",
        *markdown_table(["input of the rule", "from", "how"], INPUTS),
        "",
        "## What the rule says",
        "",
        "Truth: legs of the planted features, means over draws of directions and rates; the label is the rule's for "
        "these numbers without any scatter. Simulated studies: six trainings of A and of B, each a draw of the truth, "
        "with the scatter of trained dictionaries; instruments are right, or off by what those of the study below "
        "were. Right, wrong and open (undecided or not testable) are shares of studies, gates set aside unless the "
        "column names them; wrong is a conclusion that is not right.",
        "",
        *rule_table(record),
        "",
        "How often 90 % intervals cover the planted value in these studies, and what the mean of the leg is off:",
        "",
        *coverage_table(record),
        "",
        "## Studies with trained dictionaries",
        "",
        "One world a plant. Found (planted): the leg over trainings, and the planted one at the density at which "
        "dictionaries were trained. Off: measured less planted, ln, mean over trainings of A; B (sd between them). One "
        "who knows: the same of loads of a code that knows the features and drops the least energies until as much is "
        "lost, of the first training.",
        "",
        *study_table(record),
        "",
        "## Calibration pairs",
        "",
        "A study's own calibration has gamma .5, where A and B are equally crowded. |error| of ln or exponent:",
        "",
        *calibration_table(record),
    ]


def shares(found: Mapping[str, Any]) -> str:
    """Right, wrong and open in percent."""
    return " / ".join(f"{100 * found[key]:.0f}" for key in ("right", "wrong", "open"))


def commonest(found: Mapping[str, Any]) -> str:
    """The two commonest labels."""
    each = sorted(found["labels"].items(), key=lambda one: -one[1])[:2]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in each)


def rule_table(record: Mapping[str, Any]) -> list[str]:
    """Labels of truth and of simulated studies."""
    rows = []
    for one in record["rule"]:
        truth = " ".join(number(one["truth"][key], ".2f") for key in KEYS)
        row = [one["plant"], truth, " or ".join(one["right"]), one["label_of_truth"], shares(one["ideal"])]
        if "legs" in one:
            named = list(one["reasons"].items())[:1]
            stops = ", ".join(f"{name} {100 * share:.0f} %" for name, share in named)
            row += [shares(one["legs"]), commonest(one["legs"]), shares(one["gated"]), stops or "-"]
        else:
            row += ["not run", commonest(one["ideal"]), *["not run"] * 2]
        rows.append(row)
    title = [
        "plant",
        "truth: q, r, ln R_J, kappa",
        "right",
        "label of truth",
        "instruments right: right / wrong / open, %",
        "instruments as measured",
        "commonest labels",
        "gates asked too",
        "what stops it first",
    ]
    return markdown_table(title, rows)


def coverage_table(record: Mapping[str, Any]) -> list[str]:
    """Coverage and bias by leg."""
    names = ("q/fvu", "q/loss", "r/fvu", "g/fvu", "room/fvu", "dimension/fvu", "kappa")
    rows = []
    for one in record["rule"]:
        if "coverage" not in one:
            continue
        cells = [one["plant"]]
        for name in names:
            held, mean = one["coverage"].get(name), one["means"].get(name)
            known = held is not None and mean is not None
            cells.append(f"{100 * held:.0f} % ({mean - one['truth'][name]:+.2f})" if known else "not read")
        rows.append(cells)
    return markdown_table(["plant", *names], rows)


def study_table(record: Mapping[str, Any]) -> list[str]:
    """Legs found, residuals and agreement of trained dictionaries."""
    rows = []
    for one in record["studies"]:
        legs = [_found(one["legs"].get(name)) for name in ("q/fvu", "r/fvu", "room/fvu", "universality")]
        off = [_off(one, name) for name in ("joint/fvu", "bank/fvu", "dense/fvu", "room")]
        known = one["known"] and "; ".join(f"{joint:+.2f}, {bank:+.2f}" for joint, bank in one["known"].values())
        agreed = [_least(one, key) for key in ("self_cosine", "point_matched_share")]
        lost = "; ".join(number(float(np.mean(one["lost_at_main"][side])), ".2f") for side in "AB")
        read = "; ".join(", ".join(f"{target:g}" for target in values) for values in one["targets"].values())
        rows.append([one["plant"], read, one["label_of_legs"], *legs, *off, known or "-", *agreed, lost])
    title = [
        "plant",
        "read at FVU; loss",
        "label, legs alone",
        "q",
        "r",
        "ln R_J",
        "U",
        "off: joint load",
        "bank load",
        "load / d",
        "room",
        "of one who knows: joint, bank",
        "self-cosine",
        "matched",
        "FVU of the main k",
    ]
    return markdown_table(title, rows)


def _found(leg: list[float] | str | None) -> str:
    return f"{leg[0]:.2f} [{leg[1]:.2f}, {leg[2]:.2f}]" if isinstance(leg, list) else "not read"


def _off(record: Mapping[str, Any], name: str) -> str:
    cells = []
    for side in "AB":
        one = record["residuals"][side][name]
        spread = float(np.std(one, ddof=1)) if not isinstance(one, str) and len(one) > 1 else math.nan
        cells.append("not read" if isinstance(one, str) else f"{np.mean(one):+.2f} ({spread:.3f})")
    return "; ".join(cells)


def _least(record: Mapping[str, Any], key: str) -> str:
    values = [value for side in "AB" for value in record["main"][side].get(key, [])]
    return number(min(values), ".2f") if values else "-"


def calibration_table(record: Mapping[str, Any]) -> list[str]:
    """Errors by gamma."""
    rows = [[gamma, *(number(value) for _, value in one)] for gamma, one in record["calibration"].items()]
    names = [
        key.removeprefix("calibration_").replace("_", " ") for key, _ in next(iter(record["calibration"].values()))
    ]
    return markdown_table(["gamma", *names], rows)
