"""The report of what features do to predictions, each beside both controls; and as plain tables."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from crosscoder.foundation.artifact import replace_file
from crosscoder.foundation.console import aligned
from crosscoder.measure.effects import CONTROLS
from crosscoder.report import panels
from crosscoder.report.panels import FAINT, INK, PALETTE, describe
from crosscoder.report.screen import Number, Parts, Screen
from crosscoder.report.table import (
    WORDS,
    Line,
    Phrase,
    Table,
    Value,
    format_number,
    format_range,
    heading,
    linked,
    prose,
    word_heads,
    words,
)
from crosscoder.report.tables import provenance_table
from crosscoder.results.file import Results
from crosscoder.results.table import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BESIDE = {
    "effect_kl_active": ("control_kl_active", "beyond_kl"),
    "effect_promoted": ("control_promoted", "beyond_promoted"),
    "steered_promoted": ("steered_promoted", "beyond_steered"),
}
"""What is measured of a feature, with the key of its controls, and whether the feature is beyond them."""
RANGED = ("effect_loss", "effect_loss_active", "effect_kl", *BESIDE, "steered_kl")
ALONE = ("effect_rate", "effect_energy", "effect_tokens", "effect_rows", "effect_documents", "steered_by")
TEXTS = ("promoted_tokens", "effect_up", "effect_down")
TABLE = "effects.csv"
MOST = 40
"""Features that the picture shows."""
SECTIONS: dict[str, tuple[str, ...]] = {"each": ("each",), "by-layer": ("by-layer",), "origin": ("provenance",)}


def parts(results: Results) -> Parts:
    """The page of a measurement of effects."""
    lines = by_feature(results)
    whole, single = ([one for one in lines if (one["layer"] == "all") == is_whole] for is_whole in (True, False))
    tables = {"each": _table(whole), "by-layer": _table(single), "provenance": provenance_table(results)}
    return Parts(
        screen=_screen(results, [one for one in whole if one["missing"] is None]),
        tables=tables,
        titles={name: WORDS["tables"].get(name, "") for name in tables},
        sections=SECTIONS,
        pictures={"effects": draw_effects},
        first=("effects",),
        shown_in={},
        names=[str(results.rows.one("dictionary_reads", dictionary=None) or "")],
    )


def _screen(results: Results, known: list[dict[str, Any]]) -> Screen:
    draws, tokens = results.rows.one("effect_draws"), format_number(results.rows.one("tokens_held_out"))
    answer = [f"None of the features is active on these {tokens} tokens."]
    if known and not draws:
        answer = ["No random direction was drawn, so that nothing says what a push of that size does."]
    elif known:
        answer = [said for key in BESIDE if (said := _beyond(key, known))]
        answer.append(f"Of features that are no better than a control, at most one in {draws + 1} would.")
    return Screen(
        question=linked(
            WORDS["question"]["effects"], n=len({one["feature"] for one in by_feature(results)}), tokens=tokens
        ),
        answer=answer,
        numbers=list(_numbers(known)),
    )


def _beyond(key: str, known: list[dict[str, Any]]) -> str:
    """How many features do what they should, beyond each control; empty where that was not measured."""
    told = {control: [one[control].get(BESIDE[key][1]) for one in known] for control in CONTROLS}
    counts = {control: [flag for flag in flags if flag is not None] for control, flags in told.items()}
    if not any(counts.values()):
        return ""
    said = {control: f"{sum(flags)} of {len(flags)}" for control, flags in counts.items()}
    return WORDS["effects"][key].format(**said)


def _numbers(known: list[dict[str, Any]]) -> Iterator[Number]:
    """Medians over features, beside those of each control."""
    for key, (of_control, _) in BESIDE.items():
        found = [value for one in known if (value := _middle(one.get(key))) is not None]
        if not found:
            continue
        beside: list[tuple[str, Phrase]] = []
        for control in CONTROLS:
            nulls = [value for one in known if (value := _middle(one[control].get(of_control))) is not None]
            beside += [(_spread(nulls), [(WORDS["chance"][control], "control_loss")])] if nulls else []
        said = WORDS["numbers"][key]
        yield Number(
            linked(said["title"]), [(_spread(found), linked(WORDS["chance"]["effects"]))], said["argument"], beside
        )


def _spread(values: list[float]) -> str:
    return f"{median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def _middle(value: Any) -> float | None:
    found = value.value if isinstance(value, Estimate) else value
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _table(found: list[dict[str, Any]]) -> Table:
    """A line a feature, or a feature and layer; beside each measure both controls, with a sign for beyond or not."""
    shown = [key for key in BESIDE if any(key in one for one in found)]
    width = 1 + (1 + len(CONTROLS)) * len(shown)
    lines = []
    for one in found:
        first = words(f"{one['feature']}", "" if one["layer"] == "all" else f"layer {one['layer']}")
        if one["missing"] is not None:
            lines.append(Line([first, prose(one["missing"]), *[Value("")] * width]))
            continue
        promoted, rate = ", ".join(one.get("promoted_tokens") or []), format_number(one.get("effect_rate"))
        cells = [first, prose(promoted), Value(rate)]
        for key in shown:
            of_control, is_beyond = BESIDE[key]
            cells.append(format_range(one.get(key)))
            cells += [_cell(one[control].get(of_control), one[control].get(is_beyond)) for control in CONTROLS]
        lines.append(Line(cells))
    heads = [*word_heads("feature"), heading("promoted_tokens", word=True), heading("effect_rate")]
    for key in shown:
        heads += [heading(key), *(heading(BESIDE[key][1], WORDS["controls"][control]) for control in CONTROLS)]
    return Table(heads, lines, WORDS["notes"]["effects"], terms=("control_loss",))


def _cell(value: Any, is_beyond: bool | None) -> Value:
    found = format_range(value)
    return found if is_beyond is None else Value(f"{found.text} {'✓' if is_beyond else '✗'}", found.detail)


def draw_effects(results: Results) -> Figure | None:
    """Each measure of the features that change most (diamonds), beside both controls with their ranges."""
    known = [one for one in by_feature(results) if one["layer"] == "all" and one["missing"] is None]
    known = sorted(known, key=lambda one: _middle(one.get("effect_kl_active")) or 0.0)[-MOST:]
    shown = [key for key in BESIDE if any(_middle(one.get(key)) is not None for one in known)]
    if not shown:
        return None
    figure, axes = panels.make_panels(1, len(shown), (1.5 + 3 * len(shown), 1.3 + 0.24 * len(known)), sharey=True)
    for ax, key in zip(axes[0], shown, strict=True):
        for control, color, mark, lift in zip(CONTROLS, (FAINT, PALETTE[1]), "so", (0.15, -0.15), strict=True):
            each = [(y + lift, one[control].get(BESIDE[key][0])) for y, one in enumerate(known)]
            ranged = [(y, one) for y, one in each if isinstance(one, Estimate)]
            for y, one in ranged:
                ax.plot([one.low, one.high], [y, y], color=color, linewidth=1.4)
            label = WORDS["controls"][control] if ranged else None
            ax.plot([one.value for _, one in ranged], [y for y, _ in ranged], mark, color=color, ms=4, label=label)
        own = [(y, value) for y, one in enumerate(known) if (value := _middle(one.get(key))) is not None]
        ax.plot([value for _, value in own], [y for y, _ in own], "D", color=INK, markersize=5, label="the feature")
        ax.set(ylim=(-0.7, len(known) - 0.3))
        if key == "effect_kl_active":
            ax.set_xscale("log")
        else:
            ax.axvline(0, color=FAINT, linewidth=0.8)
        ax.set_yticks(range(len(known)), [str(one["feature"]) for one in known])
        ax.grid(False, axis="y")
        describe(ax, None, WORDS["axes"][key], "feature" if key == shown[0] else None)
    panels.share_legend(figure)
    return figure


def terminal_table(results: Results) -> str:
    """What was measured of each feature, for people at a terminal; tokens are quoted, and hold no control character."""
    each = ("the feature", "isotropic", "activations")
    lines: list[tuple[str, ...]] = [
        ("", "", "share of", "off: KL,", "", "", "off: promoted,", "", "", "added: promoted,", "", "", ""),
        ("feature", "layer", "tokens", *each * len(BESIDE), "promoted tokens"),
    ]
    for one in by_feature(results):
        cells = [_short(one.get("effect_rate"))]
        for key, (of_control, _) in BESIDE.items():
            cells += [_short(one.get(key)), *(_short(one[control].get(of_control)) for control in CONTROLS)]
        last = " ".join((one.get("promoted_tokens") or [])[:3]) if one["missing"] is None else one["missing"]
        lines.append((str(one["feature"]), str(one["layer"]), *cells, last))
    return aligned(lines)


def _short(value: Any) -> str:
    found = _middle(value)
    return "–" if found is None else f"{found:.2g}"


def by_feature(results: Results) -> list[dict[str, Any]]:
    """One mapping of keys to values for each feature and layer, `feature` and `layer` among them; those of a control
    are a mapping under its name."""
    lines: dict[tuple[int, str | None], dict[str, Any]] = {}
    for row in results.rows:
        if (feature := row.at.feature) is None:
            continue
        one = lines.setdefault(
            (feature, row.at.layer),
            {"feature": feature, "layer": row.at.layer, "missing": None} | {control: {} for control in CONTROLS},
        )
        if row.missing is not None:
            one["missing"] = row.missing
        (one if row.at.kind is None else one.setdefault(row.at.kind, {}))[row.key] = row.value
    return list(lines.values())


def write_table(results: Results, folder: Path) -> None:
    """Write the effects as CSV: a line for each feature and layer; intervals, and each control, have columns of their
    own."""
    columns: dict[str, tuple[str | None, str]] = {key: (None, key) for key in (*ALONE, *RANGED)}
    for control in CONTROLS:
        for key in RANGED:
            columns[f"{control}_{key}"] = (control, key.replace("effect", "control"))
        columns |= {f"{control}_{is_beyond}": (control, is_beyond) for _, is_beyond in BESIDE.values()}
    names = ["feature", "layer"]
    for name, (_, key) in columns.items():
        names += [name, f"{name}_low", f"{name}_high"] if not key.startswith("beyond") and name not in ALONE else [name]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*names, *TEXTS, "missing"], lineterminator="\n")
    writer.writeheader()
    for one in by_feature(results):
        line = defaultdict(str, {name: one[name] for name in ("feature", "layer", "missing")})
        for name, (control, key) in columns.items():
            value = (one if control is None else one[control]).get(key)
            if isinstance(value, Estimate):
                line |= {f"{name}_low": value.low, f"{name}_high": value.high}
            line[name] = getattr(value, "value", value)
        line |= {key: " ".join(one.get(key) or []) for key in TEXTS}
        writer.writerow(line)
    replace_file(folder / TABLE, buffer.getvalue().encode("utf-8"))
