"""The report of dictionaries compared: whose features are found in whose, beside what chance gives, and where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from crosscoder.report import panels
from crosscoder.report.panels import FAINT, PALETTE, describe
from crosscoder.report.screen import Number, Parts, Screen
from crosscoder.report.table import (
    NOTHING,
    WORDS,
    Head,
    Line,
    Phrase,
    Table,
    Value,
    format_number,
    format_range,
    heading,
    lines_of,
    linked,
    prose,
    shown,
    word_heads,
    words,
)
from crosscoder.report.tables import provenance_table
from crosscoder.results.file import Results
from crosscoder.results.table import Estimate, Place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTS = ("dictionary_size", "alive", "dead_share", "distinct", "merged", "ultra_dense", "entropy_load")
COUNTS += ("per_neuron_layer", "per_neuron_joint", "l0_token", "l0_token_layer", "explained_variance")
SPREADS = ("spread_norm", "spread_model", "spread_connection", "spread_read", "spread_use")
FOUND = ("found_share", "found_null", "beyond_null", "found_best", "found_best_null", "partnered_share")
FOUND += ("partnered_null", "written_share", "written_null")
PAIRS = ("between_matched", "between_matched_share", "between_chapman", "between_cosine", "between_alike")
PAIRS += ("between_rate_ratio", "between_rate_sd", "tokens_common")
OF_SIDES = ("alive", "dictionary_form", "dictionary_sites", "strongest_layers", "found_in")
OF_WAYS = ("found_share", "found_layers", "found_by_layer", "found_in_layers")
LONGEST = 48
"""Characters of a dictionary's path in a heading."""
MOST = 6
"""Directions that the first screen and the pictures show; the tables show all."""
SECTIONS = {"found": ("found", "pairs"), "places": (), "spreads": ("spreads",), "stable": ("stable",)}
SECTIONS |= {"dictionaries": ("what", "counts"), "origin": ("provenance",)}


def parts(results: Results) -> Parts:
    _check(results)
    told = _told(results)
    tables = {
        "found": _found_table(results),
        "pairs": _pair_table(results),
        "spreads": _side_table(results, SPREADS),
        "stable": _stable_table(results),
        "what": _what_table(results),
        "counts": _side_table(results, COUNTS),
        "provenance": provenance_table(results),
    }
    titles = {name: WORDS["tables"].get(name, "") for name in tables}
    places = {
        f"places-{a}-{b}": (f"Features of {told[a]} in {told[b]}", _place_table(results, a, b))
        for a, b in directions(results)
    }
    tables |= {name: table for name, (_, table) in places.items()}
    titles |= {name: title for name, (title, _) in places.items()}
    return Parts(
        screen=_screen(results),
        tables=tables,
        titles=titles,
        sections={**SECTIONS, "places": tuple(places)},
        pictures={"found-both-ways": draw_found, "found-layers": draw_layers},
        first=("found-both-ways",),
        shown_in={"found-layers": "places"},
        names=[f"{name}: {results.rows.one('dictionary_path', dictionary=name)}" for name in sides(results)],
        title=WORDS["titles"]["dictionaries"].format(names=_listed(list(told.values()))),
    )


def _check(results: Results) -> None:
    """Nothing, if all is there that a page cannot do without."""
    wanted = [((name, None), key) for name in sides(results) for key in OF_SIDES]
    wanted += [(way, key) for way in directions(results) for key in OF_WAYS]
    for (a, b), key in wanted:
        if _one(results, key, a, b) is None:
            raise ValueError(f"results.rows: {key} of dictionary {a}{f' in {b}' if b else ''} is missing")
    if not directions(results):
        raise ValueError("results.rows: no two dictionaries are compared")


def sides(results: Results) -> list[str]:
    return [str(row.at.dictionary) for row in results.rows.select("dictionary_path")]


def _told(results: Results) -> dict[str, str]:
    """What each dictionary is called: its letter, and its folder as it was given, of a long path the last parts."""
    found = {}
    for name in sides(results):
        path = str(_one(results, "dictionary_path", name))
        tail = path if len(path) <= LONGEST else f"…{path[-LONGEST:].partition('/')[2] or path[-LONGEST:]}"
        found[name] = f"{name} ({tail})"
    return found


def _listed(names: list[str]) -> str:
    shown = names if len(names) <= MOST else [*names[:MOST], f"{len(names) - MOST} more"]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def directions(results: Results) -> list[tuple[str, str]]:
    """Whose features are sought in whom, pair by pair."""
    return [(str(row.at.dictionary), str(row.at.against)) for row in results.rows.select("found_share")]


def _one(results: Results, key: str, a: str, b: str | None = None, kind: str | None = None) -> Any:
    return results.rows.one(key, dictionary=a, against=b, kind=kind)


def _screen(results: Results) -> Screen:
    names, ways = sides(results), directions(results)
    tokens = max(results.rows.values("tokens_common"), default=0)
    return Screen(
        question=linked(WORDS["question"]["dictionaries"], n=len(names), tokens=format_number(tokens)),
        answer=[_answer(results, names, ways), _which(results, names)],
        numbers=list(_numbers(results, ways)),
    )


def _answer(results: Results, names: list[str], ways: list[tuple[str, str]]) -> str:
    """One sentence on the two of a pair, or on what all have."""
    told = _told(results)
    if len(names) > 2:
        each = ", ".join(f"{told[name]} {_percent(_one(results, 'found_everywhere', name))}" for name in names)
        return f"Of the features of each dictionary that is used on this text, so many are found in all others: {each}."
    said = []
    for a, b in ways:
        alive, share = _one(results, "alive", a), _one(results, "found_share", a, b)
        said.append(
            f"of the {format_number(alive)} alive features of {told[a]} {_percent(share)} are found in {told[b]}"
        )
    nulls = [_one(results, "found_null", a, b) for a, b in ways]
    known = [_percent(one.value) for one in nulls if isinstance(one, Estimate)]
    chance = f"; chance gives {' and '.join(dict.fromkeys(known))}" if known else "; what chance gives was not measured"
    return f"{said[0][0].upper()}{said[0][1:]}, and {said[1]}{chance}."


def _which(results: Results, names: list[str]) -> str:
    told = _told(results)
    forms = [f"{told[name]}: {_one(results, 'dictionary_form', name)}" for name in names[:MOST]]
    return "; ".join([*forms, *([f"and {len(names) - MOST} more"] if len(names) > MOST else [])]) + "."


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f} %"


def _numbers(results: Results, ways: list[tuple[str, str]]) -> Iterator[Number]:
    """Found by activity, by what is written, and one to one: both ways, beside the shifted."""
    for key, null in (
        ("found_share", "found_null"),
        ("written_share", "written_null"),
        ("partnered_share", "partnered_null"),
    ):
        found = {way: _one(results, key, *way) for way in ways}
        values: list[tuple[str, Phrase]] = [
            (_percent(value), [(f"of {a}'s in {b}", None)])
            for (a, b), value in list(found.items())[:MOST]
            if value is not None
        ]
        for row in results.rows.select("between_cosine").rows[: MOST // 2] if key == "partnered_share" else ():
            if isinstance(row.value, float):
                where = linked(WORDS["chance"]["between_cosine"], a=row.at.dictionary, b=row.at.against)
                values.append((shown(row.value, ".2f"), where))
        chance = [one for way in ways if isinstance(one := _one(results, null, *way), Estimate)]
        said = WORDS["numbers"][key]
        if values:
            yield Number(linked(said["title"]), values, said["argument"], _chance(key, chance))


def _chance(key: str, nulls: list[Estimate]) -> list[tuple[str, Phrase]]:
    """The range of what chance gives, over all directions and draws."""
    if not nulls:
        return []
    low, high = (f"{100 * end:.1f}" for end in (min(one.low for one in nulls), max(one.high for one in nulls)))
    return [(f"{low} %" if low == high else f"{low} to {high} %", linked(WORDS["chance"][key]))]


def _found_table(results: Results) -> Table:
    """Both directions of every pair, a line each."""
    lines, told = [], _told(results)
    for a, b in directions(results):
        cells = [_cell(results, key, Place(dictionary=a, against=b)) for key in FOUND]
        lines.append(Line([words(f"{told[a]} in {told[b]}"), *cells]))
    return Table([*word_heads("features of"), *map(heading, FOUND)], lines, WORDS["notes"]["chance"])


def _pair_table(results: Results) -> Table:
    lines, told = [], _told(results)
    for row in results.rows.select("between_matched"):
        cells = [_cell(results, key, row.at) for key in PAIRS]
        sites = _one(results, "between_sites", str(row.at.dictionary), row.at.against, "pair") or []
        layers = Value(", ".join(f"{site:g}" for site in sites) or "none")
        lines.append(Line([words(f"{told[str(row.at.dictionary)]} and {told[str(row.at.against)]}"), layers, *cells]))
    return Table([*word_heads("pair"), heading("between_sites"), *map(heading, PAIRS)], lines)


def _cell(results: Results, key: str, at: Place) -> Value:
    for row in results.rows.select(key, dictionary=at.dictionary, against=at.against, kind=at.kind):
        return format_range(row.value) if row.value is not None or row.missing is None else prose(row.missing)
    return Value(format_number(None))


def _side_table(results: Results, keys: tuple[str, ...]) -> Table:
    """A line a quantity, a column a dictionary."""
    names = sides(results)
    lines = lines_of((key, [_one(results, key, name) for name in names]) for key in keys)
    return Table([*word_heads(""), *map(Head, _told(results).values())], lines, wide=False)


def _what_table(results: Results) -> Table:
    keys = ("dictionary_path", "dictionary_form", "dictionary_rule", "dictionary_reads")
    lines = [Line([words(name), *(prose(_one(results, key, name)) for key in keys)]) for name in sides(results)]
    return Table([*word_heads(""), *(heading(key, word=True) for key in keys)], lines, wide=False)


def _stable_table(results: Results) -> Table:
    """In how many others the features of each dictionary are found, as shares."""
    names, lines = sides(results), []
    for name in names:
        counts = _one(results, "found_in", name)
        total = math.fsum(counts)
        cells = [Value(format_number(int(count)), _percent(count / total)) for count in counts]
        lines.append(Line([words(_told(results)[name]), *cells]))
    heads = [Head(f"in {i} of {len(names) - 1}", "found_in") for i in range(len(names))]
    return Table([*word_heads("features of"), *heads], lines, wide=False)


def _place_table(results: Results, a: str, b: str) -> Table:
    """Of each layer's features of `a`, the shares that are found in each layer of `b`, and anywhere."""
    own, other = (_labels(results, name) for name in (a, b))
    counts, found = _one(results, "strongest_layers", a), _one(results, "found_layers", a, b)
    anywhere = _one(results, "found_by_layer", a, b)
    lines = []
    for label, count, shares, known in zip(own, counts, found, anywhere, strict=True):
        cells = [Value(_percent(share) if count else NOTHING) for share in (*shares, known)]
        lines.append(Line([words(f"layer {label}", f"{format_number(int(count))} features"), *cells]))
    total = [Value(_percent(share)) for share in _one(results, "found_in_layers", a, b)]
    lines.append(Line([words("all"), *total, Value(_percent(_one(results, "found_share", a, b)))]))
    heads = [Head(f"in layer {label}", "found_layers") for label in other]
    return Table([*word_heads(f"{a}'s strongest layer"), *heads, Head("anywhere", "found_by_layer")], lines)


def _labels(results: Results, name: str) -> list[str]:
    return [f"{site:g}" for site in _one(results, "dictionary_sites", name)]


def draw_found(results: Results) -> Figure | None:
    """Shares found by activity (filled) and by what is written (open), beside chance (grey)."""
    ways = directions(results)[:MOST]
    height = {way: len(ways) - i for i, way in enumerate(ways)}
    figure, axes = panels.make_panels(1, 1, (5.0, 1.2 + 0.55 * len(ways)))
    ax = axes[0][0]
    marks = (("found_share", "found_null", 0.14, True), ("written_share", "written_null", -0.14, False))
    for way, y in height.items():
        for key, null, shift, filled in marks:
            value, chance = (_one(results, one, *way) for one in (key, null))
            if value is not None:
                color, said = (PALETTE[0], "by activity") if filled else (PALETTE[1], "by what is written")
                look = {"markerfacecolor": color if filled else "white", "label": said if y == len(ways) else None}
                ax.plot([value], [y + shift], "D", color=color, **look)
            if isinstance(chance, Estimate):
                label = "chance" if y == len(ways) and filled else None
                ax.plot([chance.low, chance.high], [y + shift] * 2, color=FAINT, linewidth=1.4)
                ax.plot([chance.value], [y + shift], "s", color=FAINT, markersize=5, label=label)
    ax.set(xlim=(-0.03, 1.03), ylim=(0.4, len(ways) + 0.6))
    ax.set_yticks(list(height.values()), [f"{a} in {b}" for a, b in ways])
    ax.grid(False, axis="y")
    describe(ax, None, "share of features found")
    panels.share_legend(figure)
    return figure


def draw_layers(results: Results) -> Figure | None:
    """From which layer of one dictionary features are found in which of the other, as heat maps."""
    ways = [way for way in directions(results) if min(len(_labels(results, name)) for name in way) > 1][:MOST]
    if not ways:
        return None
    columns = min(2, len(ways))
    n_rows = -(-len(ways) // columns)
    figure, axes = panels.make_panels(n_rows, columns, (0.6 + 3.2 * columns, 0.4 + 2.9 * n_rows))
    image: Any = None
    for ax, (a, b) in zip(axes.flat, ways):
        ax.grid(False)
        shares = _one(results, "found_layers", a, b)
        image = ax.imshow(shares, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for axis, name in ((ax.yaxis, a), (ax.xaxis, b)):
            labels = _labels(results, name)
            ticks = range(0, len(labels), 1 + (len(labels) - 1) // 12)
            axis.set_ticks(ticks, [labels[i] for i in ticks])
        describe(ax, f"{a} in {b}", f"layer of {b}", f"strongest layer in {a}")
    for ax in axes.flat[len(ways) :]:
        ax.remove()
    bar = figure.colorbar(image, ax=list(figure.axes), shrink=0.8, pad=0.02)
    bar.set_label("share found", fontsize=9.5)
    return figure
