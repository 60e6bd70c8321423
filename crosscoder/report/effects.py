"""The report of what features do to predictions, each beside random directions of its norms; and as plain tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from crosscoder.foundation.artifact import replace_file
from crosscoder.foundation.console import aligned
from crosscoder.report import panels
from crosscoder.report.panels import FAINT, INK, describe
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
from crosscoder.results.table import Estimate, LongTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = ("loss", "loss_active", "kl", "kl_active")
TABLE = "effects.csv"
COLUMNS = ("effect_rate", "effect_energy", "effect_tokens", "effect_rows", "effect_documents")
COLUMNS += tuple(f"{who}_{measure}" for measure in MEASURES for who in ("effect", "control"))
SHOWN = ("effect_rate", "effect_tokens", "effect_loss_active", "control_loss_active", "effect_kl_active")
SHOWN += ("control_kl_active", "effect_loss", "control_loss", "effect_beyond")
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
    draws, share = (results.rows.one(key) for key in ("effect_draws", "effect_beyond_share"))
    tokens = format_number(results.rows.one("tokens_held_out"))
    answer = [f"None of the features is active on these {tokens} tokens."]
    if known:
        beyond = sum(bool(one.get("effect_beyond")) for one in known)
        answer = [f"{beyond} of {len(known)} features change the prediction more than every random direction does."]
        if share is None or not draws:
            answer = ["No random direction was drawn, so that nothing says what a push of that size does."]
        else:
            answer.append(f"Of features that are no better than random directions, one in {draws + 1} would.")
    return Screen(
        question=linked(
            WORDS["question"]["effects"], n=len({one["feature"] for one in by_feature(results)}), tokens=tokens
        ),
        answer=answer,
        numbers=list(_numbers(known)) if known else [],
    )


def _numbers(known: list[dict[str, Any]]) -> Iterator[Number]:
    """Medians over features of KL and loss where they are active, and of loss over all tokens, beside random ones."""
    for measure in ("kl_active", "loss_active", "loss"):
        own, control = ([_middle(one.get(f"{who}_{measure}")) for one in known] for who in ("effect", "control"))
        found, nulls = ([value for value in side if value is not None] for side in (own, control))
        said = WORDS["numbers"][f"effect_{measure}"]
        values: list[tuple[str, Phrase]] = [(_spread(found), linked(WORDS["chance"]["effects"]))]
        random = [(WORDS["chance"]["control"], f"control_{measure}")]
        beside: list[tuple[str, Phrase]] = [(_spread(nulls), random)] if nulls else []
        yield Number(linked(said["title"]), values, said["argument"], beside)


def _spread(values: list[float]) -> str:
    return f"{median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def _middle(value: Any) -> float | None:
    found = value.value if isinstance(value, Estimate) else value
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _table(found: list[dict[str, Any]]) -> Table:
    """A line a feature, or a feature and layer."""
    lines = []
    for one in found:
        at = "" if one["layer"] == "all" else f"layer {one['layer']}"
        if one["missing"] is not None:
            blank = [Value("")] * (len(SHOWN) + 1)
            lines.append(Line([words(f"{one['feature']}", at), prose(one["missing"]), *blank]))
            continue
        cells = [_cell(one.get(key)) for key in SHOWN]
        texts = [prose(", ".join(one.get(key) or [])) for key in ("effect_down", "effect_up")]
        lines.append(Line([words(f"{one['feature']}", at), *cells, *texts]))
    heads = [*word_heads("feature"), *map(heading, SHOWN)]
    heads += [heading(key, word=True) for key in ("effect_down", "effect_up")]
    return Table(heads, lines, WORDS["notes"]["effects"])


def _cell(value: Any) -> Value:
    if isinstance(value, bool):
        return Value("yes" if value else "no")
    return format_range(value)


def draw_effects(results: Results) -> Figure | None:
    """KL where each feature is active (diamonds) beside random directions (grey, with their range), on a log scale."""
    known = [one for one in by_feature(results) if one["layer"] == "all" and one["missing"] is None]
    marks = [(one, _middle(one.get("effect_kl_active"))) for one in known]
    marks = sorted(((one, kl) for one, kl in marks if kl is not None and kl > 0), key=lambda mark: mark[1])[-MOST:]
    if not marks:
        return None
    figure, axes = panels.make_panels(1, 1, (5.0, 1.3 + 0.24 * len(marks)))
    ax = axes[0][0]
    for y, (one, kl) in enumerate(marks):
        control = one.get("control_kl_active")
        if isinstance(control, Estimate) and control.low > 0:
            ax.plot([control.low, control.high], [y, y], color=FAINT, linewidth=1.6)
            ax.plot([control.value], [y], "s", color=FAINT, markersize=5, label="random directions" if y == 0 else None)
        ax.plot([kl], [y], "D", color=INK, markersize=6, label="the feature" if y == 0 else None)
    ax.set(xscale="log", ylim=(-0.7, len(marks) - 0.3))
    ax.set_yticks(range(len(marks)), [str(one["feature"]) for one, _ in marks])
    ax.grid(False, axis="y")
    describe(ax, None, "KL where active, nats a token", "feature")
    panels.share_legend(figure)
    return figure


def terminal_table(results: Results) -> str:
    """What was measured of each feature, for people at a terminal; tokens are quoted, and hold no control character."""
    units = ("nats a token", "direction")
    lines: list[tuple[str, ...]] = [
        ("", "", "share of", "loss where active,", "random", "KL where active,", "random", ""),
        ("feature", "layer", "tokens", *units, *units, "less likely without it"),
    ]
    for one in by_feature(results):
        values = [_middle(one.get(key)) for key in ("effect_rate", *SHOWN[2:6])]
        shown = ("–" if value is None else f"{value:.3g}" for value in values)
        last = " ".join((one.get("effect_down") or [])[:3]) if one["missing"] is None else one["missing"]
        lines.append((str(one["feature"]), str(one["layer"]), *shown, last))
    return aligned(lines)


def by_feature(results: Results) -> list[dict[str, Any]]:
    """One mapping of keys to values for each feature and layer, `feature` and `layer` among them."""
    lines = []
    for at, group in (
        LongTable(tuple(row for row in results.rows if row.at.feature is not None)).groups("feature", "layer").items()
    ):
        missing = next((row.missing for row in group if row.missing is not None), None)
        lines.append({"feature": at.feature, "layer": at.layer, "missing": missing} | {r.key: r.value for r in group})
    return lines


def write_table(results: Results, folder: Path) -> None:
    """Write the effects as CSV: a line for each feature and layer; intervals have columns of their own."""
    buffer = io.StringIO()
    ranged = [f"{who}_{measure}" for measure in MEASURES for who in ("effect", "control")]
    names = ["feature", "layer"]
    for key in COLUMNS:
        names += [key, f"{key}_low", f"{key}_high"] if key in ranged else [key]
    writer = csv.DictWriter(
        buffer, [*names, "effect_beyond", "effect_up", "effect_down", "missing"], lineterminator="\n"
    )
    writer.writeheader()
    for one in by_feature(results):
        line = {"feature": one["feature"], "layer": one["layer"], "missing": one["missing"]}
        for key in COLUMNS:
            value = one.get(key)
            if hasattr(value, "low"):
                line |= {f"{key}_low": value.low, f"{key}_high": value.high}
            line[key] = getattr(value, "value", value)
        line["effect_beyond"] = one.get("effect_beyond")
        line |= {key: " ".join(one.get(key) or []) for key in ("effect_up", "effect_down")}
        writer.writerow(line)
    replace_file(folder / TABLE, buffer.getvalue().encode("utf-8"))
