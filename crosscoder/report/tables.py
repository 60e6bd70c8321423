"""The tables of models and dictionaries: each is a selection of a study's rows, a line a dictionary or a quantity.

`COLUMNS` declares the tables of dictionaries. What is said of a table stands in `templates/words.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from crosscoder.report.answer import ARMS, WORDS, Arm, known_of, main_range
from crosscoder.report.table import (
    NOTHING,
    Head,
    Line,
    Table,
    Value,
    format_number,
    format_range,
    heading,
    named,
    sign,
    word_heads,
    words,
)
from crosscoder.results.file import Results
from crosscoder.results.table import COMPARED, SITE_NAME, Estimate, LongTable

SMALL_HARM = 0.02  # nats a token: where ablating a site costs less, the share of it that is recovered is noise
TOLERANCE = {"dictionary_size": 0.0, "explained_variance": 0.05, "l0_token": 0.05}
PARAMETERS = 1.02  # largest ratio of parameters that are called equal, since widths are whole numbers
COLUMNS: dict[str, tuple[str, ...]] = {
    "quality": ("explained_variance", "explained_variance_per_layer", "l0_token", "l0_token_layer", "dead_share"),
    "counts": (
        *("dictionary_size", "alive", "dead_share", "ultra_dense", "distinct", "merged", "merged_low"),
        *("features_per_layer", "per_neuron_layer", "per_neuron_joint", "entropy_load", "effective_dimension"),
        *("tokens_held_out", "p_min"),
    ),
    "pairs": (
        *("matched", "matched_share", "chapman", "q_adjacent", "q_same", "survival", "seed_corrected_lifespan"),
        "corrected",
    ),
    "spread": ("mean_rho", "mean_rho_share", "mean_lifespan", "single_layer_share", "mean_adjacent_cosine"),
    "read": (
        *("probed", "functional_rho", "decoder_rho", "best_layer_auc", "joint_auc", "joint_gain"),
        *("best_layer_precision", "joint_precision", "genuine_share"),
    ),
    "splice": ("clean_loss", "spliced_loss", "ablated_loss", "loss_recovered", "kl"),
}
"""A line for each dictionary that has the first quantity; spread and read are of main crosscoders alone."""
BASELINES = ("bigram_loss", "trigram_loss", "lookup_share")
"""Of models that the study trained on a text that it knows."""
OF_MODELS = (
    *("name", "n_layers", "d_model", "parameters_non_embedding", "parameters_embedding", "parameters_norms"),
    *("neurons", "held_out_loss", *BASELINES, "untrained_loss", "training_tokens", "epochs", "description"),
)


def subject_mark(results: Results, subject: str | None) -> str:
    """The style class that gives a subject its colour, in the order of `subject_color`."""
    return f"dot s{results.subjects.index(str(subject)) % 4}"


def _heads(results: Results, subjects: Sequence[str]) -> list[Head]:
    """A column for each quantity's name, and one for each subject."""
    return [*word_heads("quantity"), *(Head(name, mark=subject_mark(results, name)) for name in subjects)]


class PaperRow(NamedTuple):
    """One line of the seed paper's table, with measured values."""

    where: str
    words: str
    key: str
    values: dict[str, Estimate | None]


def paper_rows(results: Results, group: str) -> list[PaperRow]:
    """The seed paper's table: of `subject`, `per-layer`, `cross-layer`, or of the untrained `control`."""
    names = results.subjects
    if group == "subject":
        rows = []
        for key, said in WORDS["paper"][group].items():
            values = {name: float(known_of(results, name, key)) for name in names}
            rows.append(PaperRow("", said, key, {name: Estimate.over([value]) for name, value in values.items()}))
        return rows
    rows, state = [], "untrained" if group == "control" else "trained"
    for site, place in SITE_NAME.items():
        for arm, said_of in _arms(group).items():
            where = f"untrained, {place}, {said_of.short}" if group == "control" else place
            for key, said in WORDS["paper"][said_of.group].items():
                found = {
                    name: main_range(results, key, subject=name, state=state, site=site, arm=arm) for name in names
                }
                if all(found[name] is not None for name in names if name != "C"):  # C has crosscoders only
                    rows.append(PaperRow(where, said, key, found))
    return rows


def _arms(group: str) -> dict[str, Arm]:
    return {arm: one for arm, one in ARMS.items() if group in (one.group, "control")}


def ratio_range(a: Estimate | None, b: Estimate | None) -> Estimate | None:
    """b / a with the widest interval that the two ranges allow; None where a may be zero or below."""
    if a is None or b is None or min(a.low, a.value, a.high) <= 0:
        return None
    return Estimate(b.value / a.value, b.low / a.high, b.high / a.low)


def measured_table(results: Results, group: str) -> Table:
    """The rows of one group of the seed paper's table, a column a subject, and the ratio B/A for two subjects."""
    rows = paper_rows(results, group)
    subjects = [name for name in results.subjects if any(row.values[name] for row in rows)]
    ratio = set(COMPARED) <= set(subjects)
    heads = _heads(results, subjects) + [Head("B/A", definition="seed_ratio")] * ratio
    lines = []
    for row in rows:
        values = [row.values[name] for name in subjects]
        values += [ratio_range(*(row.values[name] for name in COMPARED))] if ratio else []
        lines.append(Line([named(row.key, row.words), *map(format_range, values)], group=row.where))
    terms = ("seed_range", "control") if group == "control" else ("seed_range",)
    absent = WORDS["groups"][group]["absent"]
    return Table(heads, lines, absent, note=group_note(results, group), wide=False, terms=terms)


def group_note(results: Results, group: str) -> str:
    """Which seeds the rows of a group are over; for the models, what a neuron is."""
    if group == "subject":
        return WORDS["notes"]["neurons"]
    where: dict[str, Any] = {"state": "untrained" if group == "control" else "trained", "role": "main"}
    where["arm"] = tuple(_arms(group))
    said: dict[str, list[str]] = {}
    for subject in results.subjects:
        cells = results.rows.cells("alive", subject=subject, **where)
        if cells:
            sizes = sorted({len(cell.seeds()) for cell in cells.values()})
            each = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
            runs = _counted(len({at.training_seed for at in cells}), "training seed")
            over = f"{runs}, {_counted(each, 'dictionary seed')} each"
            said.setdefault(over, []).append(subject)
    if len(said) == 1:
        return f"Over {next(iter(said))}."
    return "; ".join(f"{', '.join(names)} over {over}" for over, names in said.items()) + "." * bool(said)


def _counted(n: int | str, name: str) -> str:
    return f"{n} {name}{'' if n == 1 else 's'}"


def seeds_note(results: Results) -> str:
    """What a printed range means in the table of groups, each of which names its own seeds."""
    cells = results.rows.cells("alive")
    if not cells:
        return WORDS["absent"]["counts"]
    one = _one_seed(results) and len({at.training_seed for at in cells}) == 1
    return WORDS["notes"]["one_seed" if one else "groups"]


def _one_seed(results: Results) -> bool:
    return all(len(cell.seeds()) == 1 for cell in results.rows.cells("alive").values())


def matched_table(results: Results) -> Table:
    """What was held equal between the subjects (✓), what differs (✗), and what was not tested (–)."""
    single = results.provenance.kind != "aspect_ratio"
    lines = [*(_matched_layers(results) if single else _matched_subjects(results)), *_matched_dictionaries(results)]
    heads = [*_heads(results, results.subjects), Head("matched"), *word_heads("note")]
    return Table(heads, lines, WORDS["absent"]["matched"], wide=False)


def _matched(
    results: Results, item: str, values: dict[str, Any], met: bool | None, where: str = "", **numbers: str
) -> Line:
    said = WORDS["matched"][item]
    note = Value(said["note"].format(**numbers), style="word prose")
    shown = [format_range(values.get(name)) for name in results.subjects]
    return Line([words(where + said["quantity"]), *shown, sign(met), note])


def _matched_layers(results: Results) -> list[Line]:
    name = results.subjects[0]
    labels = results.rows.values("layers", subject=name, site="residual")
    layers = f"layers [{', '.join(map(str, labels[0]))}]" if labels else "all layers"
    return [_matched(results, "layers", {name: layers}, True)]


def _matched_subjects(results: Results) -> list[Line]:
    rows, names, line = results.rows, results.subjects, partial(_matched, results)

    def each(key: str) -> dict[str, Any]:
        return {name: known_of(results, name, key) for name in names}

    def percent(value: float | None, digits: int = 2) -> str:
        return "not measured" if value is None else f"{value:.{digits}%}"

    parameters, tokens = each("parameters_non_embedding"), each("training_tokens")
    gap, chosen, total = (rows.one(key) for key in ("loss_gap", "chosen_loss_gap", "text_tokens"))
    limit = None if results.verdict is None else results.verdict.rule.get("loss_gap")
    met = None if gap is None or limit is None else gap <= limit
    gaps = {"gap": percent(gap), "chosen": percent(chosen), "limit": percent(limit, 0)}
    text = f"{results.provenance.text}, vocabulary {rows.one('vocabulary')}"
    return [
        line("parameters", parameters, max(parameters.values()) <= PARAMETERS * min(parameters.values())),
        line("loss", each("held_out_loss"), met, **gaps),
        line("tokens", tokens, len(set(tokens.values())) == 1),
        line("text", dict.fromkeys(names, text), True, total="unknown" if total is None else f"{total:,}"),
        line("embedding", each("parameters_embedding"), False),
        line("norms", each("parameters_norms"), False),
        line("neurons", each("neurons"), False),
        line("seeds", {name: len(rows.select("held_out_loss", subject=name)) for name in names}, True),
    ]


def _matched_dictionaries(results: Results) -> list[Line]:
    """From what they turned out to be."""
    lines = []
    for site in SITE_NAME:
        for arm in ARMS:
            where = {"state": "trained", "site": site, "arm": arm}
            for key, tolerance in TOLERANCE.items() if results.rows.cells("alive", role="main", **where) else ():
                found = {name: main_range(results, key, subject=name, **where) for name in results.subjects}
                means = {name: value.value for name, value in found.items() if value}
                low, high = min(means.values(), default=0.0), max(means.values(), default=0.0)
                near = math.isclose(low, high) or (high - low) <= tolerance * abs(high)
                lines.append(_matched(results, key, means, near if len(means) > 1 else None, f"{arm}, {site}: "))
    return lines


def subject_table(results: Results) -> Table:
    """The models: shape, parameters, neurons, loss, training; the value of each training where they differ."""
    lines = []
    for key in OF_MODELS:
        if key in BASELINES and not results.rows.select(key):
            continue
        cells = []
        for name in results.subjects:
            runs = [] if key == "neurons" else results.rows.values(key, subject=name, role=None)
            detail = f"seeds {'; '.join(map(format_number, runs))}" if len(set(runs)) > 1 else ""
            cells.append(format_range(known_of(results, name, key), detail))
        lines.append(Line([named(key, "neurons in total" if key == "neurons" else None), *cells]))
    return Table(_heads(results, results.subjects), lines, "No model.", wide=False)


def dictionary_table(results: Results, slug: str) -> Table:
    """The table of `COLUMNS` with this name: means and ranges over seeds, those left out where it is undefined."""
    keys, lines = COLUMNS[slug], []
    where = {"role": "main"} if slug in ("spread", "read") else {}
    for at, cell in results.rows.cells(keys[0], **where).items():
        size = f"n = {format_number(at.n_features)}, k = {format_number(at.k)}"
        lead = [
            words(f"{at.subject}{at.training_seed}", str(at.state), mark=subject_mark(results, at.subject)),
            words(SITE_NAME[str(at.site)], definition=at.site),
            words(ARMS[str(at.arm)].name, size),
            words("main" if at.role == "main" else f"{at.role} sweep", _counted(len(cell.seeds()), "seed")),
        ]
        for layer in (
            dict.fromkeys(row.at.layer for row in cell.select("spliced_loss")) if slug == "splice" else (None,)
        ):
            here = cell.select(layer=(None, layer))
            cells = lead[:2] if slug == "read" else [*lead, *([Value(layer)] if layer else [])]
            cells += [SHOWN[key][1](here) if key in SHOWN else show_range(here, key) for key in keys]
            lines.append(Line(cells, sweep=at.role != "main"))
    heads = word_heads(*("model", "site", "dictionary", "role")[: 2 if slug == "read" else 4])
    heads += [Head("spliced layer")] * (slug == "splice")
    heads += [heading(key, SHOWN[key][0] if key in SHOWN else None) for key in keys]
    note = WORDS["notes"]["line_one_seed" if _one_seed(results) else "line"]
    note = {"pairs": "", "splice": _splice_note(results)}.get(slug, note)
    return Table(heads, lines, WORDS["absent"][slug], note=note, terms=("scale",) * (slug == "quality"))


def show_range(cell: LongTable, key: str) -> Value:
    """Mean and range of a quantity over seeds, those left out where it is undefined."""
    return format_range(cell.known_range(key))


def _worst_layer(cell: LongTable) -> Value:
    layers = list(zip(*cell.values("explained_variance_per_layer"), strict=False))
    known = [values for values in layers if None not in values]
    if not known:
        return Value(NOTHING)
    worst = min(known, key=lambda values: Estimate.over(values).value)
    shown = format_range(Estimate.over(worst))
    return Value(shown.text, f"layer {layers.index(worst) + 1} {shown.detail}".strip())


def _merged_band(cell: LongTable) -> Value:
    low, high = (cell.known_range(key) for key in ("merged_low", "merged_high"))
    return Value(f"{format_number(low.low)} to {format_number(high.high)}" if low and high else NOTHING)


SHOWN: dict[str, tuple[str, Callable[[LongTable], Value]]] = {
    "explained_variance_per_layer": ("worst layer", _worst_layer),
    "merged_low": ("merged, all rules", _merged_band),
}
"""Columns that are no mean over seeds: heading and cell."""


def _splice_note(results: Results) -> str:
    """Of which dictionaries splices are, and what they are compared with."""
    kinds, seeds = set(), set()
    for at, cell in results.rows.cells("clean_loss").items():
        seeds |= {(at.training_seed, cell.seeds().index(seed)) for seed in cell.select("clean_loss").seeds()}
        for row in cell.select("splice_tokens"):
            kind = cell.one("spliced_ablation", seed=row.at.seed)
            kinds.add(f"{kind} ablation, on {format_number(row.value)} tokens")
    trained, drawn = (", ".join(map(str, sorted(set(places)))) for places in zip(*(seeds or {(0, 0)}), strict=True))
    of = f"training seeds {trained}, dictionary seeds {drawn}"
    of = of if seeds != {(0, 0)} else "the first training seed's first dictionary seed"
    return WORDS["notes"]["splice"].format(of=of, kinds="; ".join(sorted(kinds)), harm=SMALL_HARM)


def provenance_table(results: Results) -> Table:
    """The short fields of the provenance."""
    shown = results.provenance
    lines: dict[str, Any] = {name: getattr(shown, name) for name in ("schema", "kind", "preset", "started")}
    lines |= {"git commit": shown.git_commit, "command": " ".join(shown.command), "Python": shown.python}
    lines |= {"text": shown.text, "tokens fingerprint": shown.tokens_fingerprint}
    lines |= {f"seconds, {stage}": seconds for stage, seconds in shown.seconds.items()}
    rows = [Line([words(name), Value(format_number(value), style="mono")]) for name, value in lines.items()]
    return Table(word_heads("field", "value"), rows, "", wide=False)


def provenance_details(results: Results) -> list[tuple[str, str]]:
    """The long fields, each as indented JSON."""
    return [
        (key, json.dumps(getattr(results.provenance, key), indent=2, sort_keys=True, ensure_ascii=False))
        for key in ("config", "device", "versions")
    ]


TABLES: dict[str, Callable[[Results], Table]] = {
    "matched": matched_table,
    "subjects": subject_table,
    **{slug: partial(dictionary_table, slug=slug) for slug in COLUMNS},
    "provenance": provenance_table,
}
