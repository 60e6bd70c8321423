"""The report's tables: rows of formatted text from plain results, the same for the page and for Markdown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from crosscoder.report.figures import ARM_NAME, SITE_NAME, Cell, Results, seed_range, select
from crosscoder.report.model_figures import SMALL_HARM, splice_ranges

NOTHING = "–"
_ROLE_NAME = {"main": "main", "size": "size sweep", "k": "k sweep"}
GROUP_TITLE = {
    "subject": "The models",
    "per-layer": "Counted layer by layer (bank of SAEs)",
    "cross-layer": "Counted across layers (crosscoder)",
    "control": "Control: the same shapes, untrained",
}
ABSENT = {
    "subject": "The study reports no quantity of the models themselves.",
    "per-layer": "The study counted no bank of per-layer SAEs.",
    "cross-layer": "The study counted no crosscoder.",
    "control": "The study has no untrained control.",
}
_LEAD = ("model", "site", "dictionary", "role")
# heading, quantity, key of its definition
_QUALITY = (
    ("explained variance", "explained_variance", "explained_variance"),
    ("L0 per token", "l0_token", "l0_token"),
    ("L0 per token and layer", "l0_token_layer", "l0_token_layer"),
    ("dead share", "dead_share", "dead_share"),
)
_COUNTS = (
    ("size", "dictionary_size", "dictionary_size"),
    ("alive", "alive", "alive"),
    ("dead share", "dead_share", "dead_share"),
    ("ultra-dense", "ultra_dense", "ultra_dense"),
    ("distinct", "distinct", "distinct"),
    ("merged", "merged", "merged"),
    ("per layer", "features_per_layer", "features_per_layer"),
    ("per neuron, per layer", "per_neuron_layer", "per_neuron_layer"),
    ("per neuron, joint", "per_neuron_joint", "per_neuron_joint"),
    ("entropy load (nats)", "entropy_load", "entropy_load"),
    ("effective dimension", "effective_dimension", "effective_dimension"),
)
_PAIRS = (
    ("matched", "matched", "matched"),
    ("matched share", "matched_share", "matched_share"),
    ("Chapman estimate", "chapman", "chapman"),
    ("q, adjacent layers", "q_adjacent", "survival"),
    ("q, same layer", "q_same", "survival"),
    ("survival", "survival", "survival"),
    ("lifespan (layers)", "lifespan", "lifespan_bank"),
    ("corrected count", "corrected", "corrected"),
)
_SPLICE = (
    ("clean loss", "clean_loss"),
    ("loss", "loss"),
    ("ablated loss", "ablated_loss"),
    ("loss recovered", "loss_recovered"),
    ("KL (nats/token)", "kl"),
)


@dataclass(frozen=True)
class Head:
    """A column's heading, with the definition it links to or the subject it marks."""

    text: str
    definition: str | None = None
    mark: str = ""
    word: bool = False


@dataclass(frozen=True)
class Value:
    """One cell of a table: what it says, the small print under it, and how it looks."""

    text: str
    detail: str = ""
    style: str = ""
    mark: str = ""
    definition: str | None = None


@dataclass(frozen=True)
class Row:
    """The cells of one line; lines of a `sweep` stand back, those of a `group` share a heading."""

    cells: list[Value]
    sweep: bool = False
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under headings, and what to say without any."""

    columns: list[Head]
    rows: list[Row]
    absent: str
    note: str = ""
    wide: bool = True


def format_number(value: Any) -> str:
    """A number with four significant digits and thousands separators; a dash for None; strings pass."""
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e15):
        return f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"
    return f"{value:.4g}"


def format_range(entry: tuple[float, float, float] | None, style: str = "") -> Value:
    """A mean with `[low, high]` under it; no brackets where they would be equal."""
    if entry is None:
        return Value(NOTHING, style=style)
    mean, low, high = entry
    detail = "" if low == high else f"[{format_number(low)}, {format_number(high)}]"
    return Value(format_number(mean), detail, style)


def seeds_note(results: Results) -> str:
    """What a printed range means in the table of groups, each of which names its own seeds."""
    cells = results["counts"]["cells"]
    if not cells:
        return "No dictionary was counted."
    if max(len(cell["per_seed"]) for cell in cells) == 1 and len({cell["training_seed"] for cell in cells}) == 1:
        return "Values are from one dictionary seed, so no interval is shown."
    return (
        "Values are means with [low, high], the range over the seeds named under each group: not a confidence "
        "interval. Without brackets, the seeds agree or there is one."
    )


def line_note(results: Results) -> str:
    """What a printed range means where each line is one training."""
    line = "Each line is one training seed, the number behind the model's letter"
    if all(len(cell["per_seed"]) == 1 for cell in results["counts"]["cells"]):
        return f"{line}; values are from one dictionary seed, so no interval is shown."
    return (
        f"{line}. Values are means with [low, high] over its dictionary seeds: the range, not a confidence interval. "
        "Without brackets, the seeds agree or there is one."
    )


def group_note(results: Results, group: str) -> str:
    """Which seeds the rows of a group are over; for the models, what a neuron is."""
    if group == "subject":
        return "A neuron here is one of the D numbers of the residual stream, not a unit of an MLP."
    wanted: dict[str, Any] = {"state": "untrained" if group == "control" else "trained", "role": "main"}
    if group != "control":
        wanted["arm"] = "layerwise" if group == "per-layer" else "crosscoder"
    said: dict[str, list[str]] = {}
    for subject in sorted(results["subjects"]):
        cells = select(results["counts"]["cells"], subject=subject, **wanted)
        if cells:
            over = f"{_number_of({cell['training_seed'] for cell in cells}, 'training seed')}, "
            sizes = sorted({len(cell["per_seed"]) for cell in cells})
            each = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
            over += f"{each} dictionary seed{'' if sizes[-1] == 1 else 's'} each"
            said.setdefault(over, []).append(subject)
    if len(said) == 1:
        return f"Over {next(iter(said))}."
    parts = [f"{', '.join(names)} over {over}" for over, names in said.items()]
    return f"{'; '.join(parts)}." if parts else ""


def _number_of(things: set[int], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def subject_mark(results: Results, subject: str) -> str:
    """The style class that gives a subject its colour, in the order of `subject_color`."""
    return f"dot s{sorted(results['subjects']).index(subject) % 4}"


def _subject_heads(results: Results) -> list[Head]:
    return [Head(subject, mark=subject_mark(results, subject)) for subject in sorted(results["subjects"])]


def known_definition(results: Results, definition: str | None) -> str | None:
    """The key of a definition, if the study recorded it."""
    return definition if definition in results["definitions"] else None


def _entry(value: dict[str, float] | None) -> tuple[float, float, float] | None:
    return None if value is None else (value["mean"], value["low"], value["high"])


def measured_table(results: Results, group: str) -> Table:
    """The rows of one group of the counting table, a column a subject, and the ratio B/A for two subjects.

    What stands before ": " in a quantity becomes a heading shared by the rows that have it.
    """
    rows_here = [entry for entry in results["counts"]["table"] if entry["group"] == group]
    subjects = [s for s in sorted(results["subjects"]) if any(entry["values"].get(s) for entry in rows_here)]
    ratio = {"A", "B"} <= set(subjects)
    heads = [Head("quantity", word=True), *(Head(s, mark=subject_mark(results, s)) for s in subjects)]
    if ratio:
        heads.append(Head("B/A"))
    rows = []
    for entry in rows_here:
        where, _, what = entry["quantity"].rpartition(": ")
        cells = [Value(what, style="word", definition=entry["definition"])]
        cells += [format_range(_entry(entry["values"].get(subject))) for subject in subjects]
        cells += [format_range(_entry(entry["ratio"]))] if ratio else []
        rows.append(Row(cells, group=where))
    return Table(heads, rows, ABSENT[group], note=group_note(results, group), wide=False)


def matched_table(results: Results) -> Table:
    """What was held equal between the subjects (✓), what differs (✗), and what was not tested (–)."""
    signs = {True: Value("✓", mark="yes"), False: Value("✗", mark="no"), None: Value(NOTHING)}
    heads = [Head("quantity", word=True), *_subject_heads(results), Head("matched"), Head("note", word=True)]
    rows = []
    for item in results["matched"]["items"]:
        cells = [Value(item["quantity"], style="word")]
        cells += [Value(format_number(item["values"].get(subject))) for subject in sorted(results["subjects"])]
        rows.append(Row([*cells, signs[item["matched"]], Value(item["note"], style="word prose")]))
    return Table(heads, rows, "The study matched nothing: there is no pair to compare.", wide=False)


def subject_table(results: Results) -> Table:
    """The models: shape, parameters, neurons, loss, training."""
    entries = [results["subjects"][subject] for subject in sorted(results["subjects"])]
    unit = entries[0]["held_out_loss_unit"]
    lines: list[tuple[str, list[Any]]] = [("name", [e["name"] for e in entries])]
    fields = {"layers": "n_layers", "width": "d_model"}
    lines += [(name, [e[key] for e in entries]) for name, key in fields.items()]
    for key in ("non_embedding", "embedding", "norms"):
        lines.append((f"parameters, {key.replace('_', '-')}", [e["parameters"][key] for e in entries]))
    fields = {
        "neurons per layer": "neurons_per_layer",
        "neurons in total": "total_neurons",
        f"held-out loss ({unit})": "held_out_loss",
        f"held-out loss, untrained ({unit})": "untrained_loss",
        "training tokens": "tokens",
        "epochs": "epochs",
        "description": "description",
    }
    rows = [Row([Value(name, style="word"), *(Value(format_number(v)) for v in values)]) for name, values in lines]
    for name, key in fields.items():
        values = [Value(format_number(entry[key]), _each_run(entry, key)) for entry in entries]
        rows.append(Row([Value(name, style="word"), *values]))
    return Table([Head("quantity", word=True), *_subject_heads(results)], rows, "No model.", wide=False)


def _each_run(entry: dict[str, Any], key: str) -> str:
    """The value of every training seed, where there are several and they differ from the mean."""
    values = [run[key] for run in sorted(entry.get("runs", []), key=lambda run: run["seed"]) if key in run]
    return f"seeds {'; '.join(format_number(v) for v in values)}" if len(set(values)) > 1 else ""


def lead_cells(results: Results, cell: Cell) -> list[Value]:
    """Which dictionary a line is about, in the order of `_LEAD`; a spread cell has no arm and no role."""
    n_seeds = len(cell["per_seed"])
    size = f"n = {format_number(cell['n_features'])}, k = {format_number(cell['k'])}"
    return [
        Value(
            f"{cell['subject']}{cell['training_seed']}",
            cell["state"],
            "word",
            subject_mark(results, cell["subject"]),
        ),
        Value(SITE_NAME[cell["site"]], style="word"),
        Value(ARM_NAME[cell.get("arm", "crosscoder")], size, "word"),
        Value(_ROLE_NAME[cell.get("role", "main")], f"{n_seeds} seed{'s' if n_seeds != 1 else ''}", "word"),
    ]


def lead_heads(results: Results, columns: Any) -> list[Head]:
    """Headings of `lead_cells`, then of `(heading, quantity, key of its definition)` each."""
    heads = [Head(name, word=True) for name in _LEAD]
    return heads + [Head(name, definition=known_definition(results, key)) for name, _, key in columns]


def quality_table(results: Results) -> Table:
    """Explained variance, its worst layer, both L0 and the dead share of every dictionary."""
    worst = ("worst layer", "", "explained_variance")
    rows = []
    for cell in results["quality"]["cells"]:
        values = [format_range(seed_range(cell, quantity)) for _, quantity, _ in _QUALITY]
        lead = lead_cells(results, cell)
        rows.append(Row([*lead, values[0], _worst_layer(cell), *values[1:]], sweep=cell["role"] != "main"))
    heads = lead_heads(results, (_QUALITY[0], worst, *_QUALITY[1:]))
    return Table(heads, rows, "No dictionary's quality was measured.", note=line_note(results))


def _worst_layer(cell: Cell) -> Value:
    layers = list(zip(*(seed["explained_variance_per_layer"] for seed in cell["per_seed"]), strict=False))
    if not layers:
        return Value(NOTHING)
    means = [sum(values) / len(values) for values in layers]
    at = means.index(min(means))
    low, high = min(layers[at]), max(layers[at])
    where = f"layer {at + 1}"
    detail = where if low == high else f"{where} [{format_number(low)}, {format_number(high)}]"
    return Value(format_number(means[at]), detail)


def count_table(results: Results) -> Table:
    """Every count of every dictionary, with the band of merged counts over merging rules."""
    band = ("merged, all rules", "", "merged")
    columns = (*_COUNTS[:6], band, *_COUNTS[6:], ("held-out tokens", "", None), ("p_min", "", "alive"))
    rows = []
    for cell in results["counts"]["cells"]:
        values = [format_range(seed_range(cell, quantity)) for _, quantity, _ in _COUNTS]
        low, high = seed_range(cell, "merged_low"), seed_range(cell, "merged_high")
        rules = f"{format_number(low[1])} to {format_number(high[2])}" if low and high else NOTHING
        tail = [Value(format_number(cell["tokens_held_out"])), Value(format_number(cell["p_min"]))]
        lead = lead_cells(results, cell)
        rows.append(Row([*lead, *values[:6], Value(rules), *values[6:], *tail], sweep=cell["role"] != "main"))
    return Table(lead_heads(results, columns), rows, "No dictionary was counted.", note=line_note(results))


def pair_table(results: Results) -> Table:
    """How far two seeds of each dictionary agree."""
    cells = [cell for cell in results["counts"]["cells"] if cell["pair"] is not None]
    rows = [
        Row(
            lead_cells(results, cell) + [Value(format_number(cell["pair"][quantity])) for _, quantity, _ in _PAIRS],
            sweep=cell["role"] != "main",
        )
        for cell in cells
    ]
    return Table(lead_heads(results, _PAIRS), rows, "No dictionary was trained with a second seed.")


def splice_table(results: Results) -> Table:
    """Loss with each site replaced by its reconstruction."""
    rows, kinds, seeds = [], set(), set()
    for cell in results["quality"]["cells"]:
        splices = [seed["splice"] for seed in cell["per_seed"] if seed["splice"]]
        kinds |= {f"{s['ablation']} ablation, on {format_number(s['tokens'])} tokens" for s in splices}
        seeds |= {(cell["training_seed"], i) for i, seed in enumerate(cell["per_seed"]) if seed["splice"]}
        clean = [splice["clean_loss"] for splice in splices]
        columns = {quantity: splice_ranges(cell, quantity) for _, quantity in _SPLICE[1:]}
        for i, (site, _) in enumerate(columns["loss"]):
            cells = [*lead_cells(results, cell), Value(site)]
            cells.append(format_range((sum(clean) / len(clean), min(clean), max(clean))))
            cells += [format_range(ranges[i][1]) for ranges in columns.values()]
            rows.append(Row(cells, sweep=cell["role"] != "main"))
    heads = [*lead_heads(results, ()), Head("spliced layer")]
    heads += [Head(name, definition=known_definition(results, quantity)) for name, quantity in _SPLICE]
    of = "the first training seed's first dictionary seed"
    if seeds != {(0, 0)}:
        of = f"training seeds {_listed({t for t, _ in seeds})}, dictionary seeds {_listed({i for _, i in seeds})}"
    note = (
        f"Splices are of {of}; compared with {'; '.join(sorted(kinds))}. Where ablation costs less than {SMALL_HARM} "
        "nats a token, what is recovered of it is noise."
    )
    return Table(heads, rows, "No reconstruction was spliced into a model.", note=note)


def _listed(numbers: set[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


def provenance_table(provenance: dict[str, Any]) -> Table:
    """The short fields of the provenance."""
    lines = {
        "schema": provenance["schema"],
        "kind": provenance["kind"],
        "preset": provenance["preset"],
        "started": provenance["started"],
        "git commit": provenance["git_commit"],
        "command": " ".join(provenance["command"]),
        "Python": provenance["python"],
        "text": provenance["text"],
        "tokens fingerprint": provenance["tokens_fingerprint"],
    }
    lines |= {f"seconds, {stage}": value for stage, value in provenance["seconds"].items()}
    rows = [Row([Value(name, style="word"), Value(format_number(v), style="mono")]) for name, v in lines.items()]
    return Table([Head("field", word=True), Head("value", word=True)], rows, "", wide=False)


def provenance_details(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """The long fields, each as indented JSON."""
    shown = {"schema", "kind", "preset", "started", "git_commit", "command", "python", "text"}
    shown |= {"tokens_fingerprint", "seconds"}
    return [
        (key, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
        for key, value in sorted(provenance.items())
        if key not in shown
    ]
