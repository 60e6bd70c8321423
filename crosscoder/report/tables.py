"""The tables of models and dictionaries: each is a selection of a study's rows, a line a dictionary or a quantity."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from crosscoder.report.answer import ARM_NAME, SITE_NAME, paper_table, total_neurons
from crosscoder.report.matched import matched_items, mean_tokens
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
    number,
    sign,
    words,
)
from crosscoder.results.file import Results
from crosscoder.results.table import COMPARED, LongTable, Place

SMALL_HARM = 0.02  # nats a token: where ablating a site costs less, the share of it that is recovered is noise
ROLE_NAME = {"main": "main", "size": "size sweep", "k": "k sweep"}
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
ARM_OF_GROUP = {"per-layer": ("layerwise",), "cross-layer": ("crosscoder",), "control": ("layerwise", "crosscoder")}

Show = Callable[[LongTable], Value]


def ranges(key: str) -> Show:
    """What a column shows of a dictionary: mean and range over its seeds, those left out where it is undefined."""
    return lambda cell: format_range(cell.seed_range(key, of_known=True))


def subject_mark(results: Results, subject: str | None) -> str:
    """The style class that gives a subject its colour, in the order of `subject_color`."""
    return f"dot s{results.subjects.index(str(subject)) % 4}"


def subject_heads(results: Results) -> list[Head]:
    """A column for each model."""
    return [Head(subject, mark=subject_mark(results, subject)) for subject in results.subjects]


def measured_table(results: Results, group: str) -> Table:
    """The rows of one group of the seed paper's table, a column a subject, and the ratio B/A for two subjects."""
    here = [row for row in paper_table(results) if row.group == group]
    subjects = [s for s in results.subjects if any(row.values.get(s) for row in here)]
    ratio = set(COMPARED) <= set(subjects)
    heads = [Head("quantity", word=True), *(Head(s, mark=subject_mark(results, s)) for s in subjects)]
    heads += [Head("B/A", definition="seed_ratio")] if ratio else []
    lines = []
    for row in here:
        cells = [named(row.key, row.words), *(format_range(row.values.get(subject)) for subject in subjects)]
        lines.append(Line(cells + [format_range(row.ratio)] * ratio, group=row.where))
    terms = ("seed_range", "control") if group == "control" else ("seed_range",)
    return Table(heads, lines, ABSENT[group], note=group_note(results, group), wide=False, terms=terms)


def group_note(results: Results, group: str) -> str:
    """Which seeds the rows of a group are over; for the models, what a neuron is."""
    if group == "subject":
        return "A neuron here is one of the D numbers of the residual stream, not a unit of an MLP."
    where = {"state": "untrained" if group == "control" else "trained", "role": "main", "arm": ARM_OF_GROUP[group]}
    said: dict[str, list[str]] = {}
    for subject in results.subjects:
        cells = results.rows.cells("alive", subject=subject, **where)
        if cells:
            over = f"{_number_of({at.training_seed for at in cells}, 'training seed')}, "
            sizes = sorted({len(cell.seeds()) for cell in cells.values()})
            each = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
            over += f"{each} dictionary seed{'' if sizes[-1] == 1 else 's'} each"
            said.setdefault(over, []).append(subject)
    if len(said) == 1:
        return f"Over {next(iter(said))}."
    parts = [f"{', '.join(names)} over {over}" for over, names in said.items()]
    return f"{'; '.join(parts)}." if parts else ""


def _number_of(things: set[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def seeds_note(results: Results) -> str:
    """What a printed range means in the table of groups, each of which names its own seeds."""
    cells = results.rows.cells("alive")
    if not cells:
        return "No dictionary was counted."
    if _one_seed(results) and len({at.training_seed for at in cells}) == 1:
        return "Values are from one dictionary seed, so no interval is shown."
    return (
        "Values are means with [low, high], the range over the seeds named under each group: not a confidence "
        "interval. Without brackets, the seeds agree or there is one."
    )


def line_note(results: Results) -> str:
    """What a printed range means where each line is one training."""
    line = "Each line is one training seed, the number behind the model's letter"
    if _one_seed(results):
        return f"{line}; values are from one dictionary seed, so no interval is shown."
    return (
        f"{line}. Values are means with [low, high] over its dictionary seeds: the range, not a confidence interval. "
        "Without brackets, the seeds agree or there is one."
    )


def _one_seed(results: Results) -> bool:
    return all(len(cell.seeds()) == 1 for cell in results.rows.cells("alive").values())


def matched_table(results: Results) -> Table:
    """What was held equal between the subjects (✓), what differs (✗), and what was not tested (–)."""
    heads = [Head("quantity", word=True), *subject_heads(results), Head("matched"), Head("note", word=True)]
    lines = []
    for item in matched_items(results):
        values = [number(item.values.get(subject)) for subject in results.subjects]
        note = Value(item.note, style="word prose")
        lines.append(Line([words(item.quantity), *values, sign(item.matched), note]))
    return Table(heads, lines, "The study matched nothing: there is no pair to compare.", wide=False)


def subject_table(results: Results) -> Table:
    """The models: shape, parameters, neurons, loss, training."""
    parameters = [f"parameters_{name}" for name in ("non_embedding", "embedding", "norms")]
    lines = [_model_line(results, key) for key in ("name", "n_layers", "d_model", *parameters)]
    total = [number(total_neurons(results, name)) for name in results.subjects]
    lines.append(Line([named("d_model", "neurons in total"), *total]))
    lines += [_run_line(results, key) for key in ("held_out_loss", "untrained_loss", "training_tokens")]
    lines += [_model_line(results, key) for key in ("epochs", "description")]
    return Table([Head("quantity", word=True), *subject_heads(results)], lines, "No model.", wide=False)


def _model_line(results: Results, key: str) -> Line:
    return Line([named(key), *(number(results.of(name, key)) for name in results.subjects)])


def _run_line(results: Results, key: str) -> Line:
    """The mean over training seeds, and the value of each where there are several and they differ."""
    cells = []
    for name in results.subjects:
        known = results.rows.values(key, subject=name)
        mean = results.rows.seed_range(key, subject=name)
        shown = mean_tokens(results, name) if key == "training_tokens" else mean and mean.value
        detail = f"seeds {'; '.join(format_number(v) for v in known)}" if len(set(known)) > 1 else ""
        cells.append(number(shown, detail))
    return Line([named(key), *cells])


def lead_cells(results: Results, at: Place, cell: LongTable) -> list[Value]:
    """Which dictionary a line is about, under `lead_heads`."""
    n_seeds = len(cell.seeds())
    size = f"n = {format_number(at.n_features)}, k = {format_number(at.k)}"
    return [
        words(f"{at.subject}{at.training_seed}", str(at.state), mark=subject_mark(results, at.subject)),
        words(SITE_NAME[str(at.site)], definition=at.site),
        words(ARM_NAME[str(at.arm)], size),
        words(ROLE_NAME[str(at.role)], f"{n_seeds} seed{'s' if n_seeds != 1 else ''}"),
    ]


def lead_heads() -> list[Head]:
    """Headings of `lead_cells`."""
    return [Head(name, word=True) for name in ("model", "site", "dictionary", "role")]


def _dictionary_table(
    results: Results,
    columns: dict[str, Show | None],
    absent: str,
    *,
    heads: dict[str, str] | None = None,
    terms: tuple[str, ...] = (),
    **where: Any,
) -> Table:
    """A line for each dictionary that has the first column's quantity; a column shows ranges unless told otherwise."""
    lines = []
    for at, cell in results.rows.cells(next(iter(columns)), **where).items():
        shown = [(show or ranges(key))(cell) for key, show in columns.items()]
        lines.append(Line([*lead_cells(results, at, cell), *shown], sweep=at.role != "main"))
    named_heads = [heading(key, (heads or {}).get(key)) for key in columns]
    return Table(lead_heads() + named_heads, lines, absent, note=line_note(results), terms=terms)


def quality_table(results: Results) -> Table:
    """Explained variance, its worst layer, both L0 and the dead share of every dictionary."""
    columns = {
        "explained_variance": None,
        "explained_variance_per_layer": _worst_layer,
        **dict.fromkeys(("l0_token", "l0_token_layer", "dead_share")),
    }
    heads = {"explained_variance_per_layer": "worst layer"}
    absent = "No dictionary's quality was measured."
    return _dictionary_table(results, columns, absent, heads=heads, terms=("scale",))


def _worst_layer(cell: LongTable) -> Value:
    layers = list(zip(*cell.values("explained_variance_per_layer"), strict=False))
    known = [values for values in layers if None not in values]
    if not known:
        return Value(NOTHING)
    worst = min(known, key=lambda values: sum(values) / len(values))
    low, high = min(worst), max(worst)
    where = f"layer {layers.index(worst) + 1}"
    detail = where if low == high else f"{where} [{format_number(low)}, {format_number(high)}]"
    return Value(format_number(sum(worst) / len(worst)), detail)


def count_table(results: Results) -> Table:
    """Every count of every dictionary, with the band of merged counts over merging rules."""
    first = ("dictionary_size", "alive", "dead_share", "ultra_dense", "distinct", "merged")
    then = ("features_per_layer", "per_neuron_layer", "per_neuron_joint", "entropy_load", "effective_dimension")
    columns = {**dict.fromkeys(first), "merged_low": _merged_band, **dict.fromkeys(then)}
    columns |= dict.fromkeys(("tokens_held_out", "p_min"))
    heads = {"merged_low": "merged, all rules"}
    return _dictionary_table(results, columns, "No dictionary was counted.", heads=heads)


def _merged_band(cell: LongTable) -> Value:
    low, high = (cell.seed_range(key, of_known=True) for key in ("merged_low", "merged_high"))
    return Value(f"{format_number(low.low)} to {format_number(high.high)}" if low and high else NOTHING)


def pair_table(results: Results) -> Table:
    """How far two seeds of each dictionary agree."""
    columns = ("matched", "matched_share", "chapman", "q_adjacent", "q_same", "survival", "seed_corrected_lifespan")
    absent = "No dictionary was trained with a second seed."
    table = _dictionary_table(results, dict.fromkeys((*columns, "corrected")), absent)
    return Table(table.columns, table.rows, absent)


def spread_table(results: Results) -> Table:
    """How many layers the features of each main crosscoder occupy."""
    columns = ("mean_rho", "mean_rho_share", "mean_lifespan", "single_layer_share", "mean_adjacent_cosine")
    absent = "No spread of a crosscoder was measured."
    return _dictionary_table(results, dict.fromkeys(columns), absent, role="main")


def read_table(results: Results) -> Table:
    """What one layer tells of each crosscoder's features, and what all layers tell; no rows where nobody asked."""
    columns = ("probed", "functional_rho", "decoder_rho", "best_layer_auc", "joint_auc", "joint_gain")
    columns += ("best_layer_precision", "joint_precision", "genuine_share")
    table = _dictionary_table(results, dict.fromkeys(columns), "No feature was read.", role="main")
    lines = [Line([*line.cells[:2], *line.cells[4:]]) for line in table.rows]
    return Table([*table.columns[:2], *table.columns[4:]], lines, table.absent, note=table.note)


def splice_table(results: Results) -> Table:
    """Loss with each site replaced by its reconstruction."""
    lines, kinds, seeds = [], set(), set()
    columns = ("spliced_loss", "ablated_loss", "loss_recovered", "kl")
    for at, cell in results.rows.cells("clean_loss").items():
        seen = cell.seeds()
        spliced = cell.select("clean_loss").seeds()
        seeds |= {(at.training_seed, seen.index(seed)) for seed in spliced}
        for row in cell.select("splice_tokens"):
            kind = cell.one("spliced_ablation", seed=row.at.seed)
            kinds.add(f"{kind} ablation, on {format_number(row.value)} tokens")
        lead = lead_cells(results, at, cell)
        for layer in dict.fromkeys(row.at.layer for row in cell.select("spliced_loss")):
            shown = [format_range(cell.seed_range(key, of_known=True, layer=layer)) for key in columns]
            cells = [*lead, Value(str(layer)), ranges("clean_loss")(cell), *shown]
            lines.append(Line(cells, sweep=at.role != "main"))
    heads = [*lead_heads(), Head("spliced layer"), *(heading(key) for key in ("clean_loss", *columns))]
    of = "the first training seed's first dictionary seed"
    if seeds != {(0, 0)}:
        of = f"training seeds {_listed({t for t, _ in seeds})}, dictionary seeds {_listed({i for _, i in seeds})}"
    note = (
        f"Splices are of {of}; compared with {'; '.join(sorted(kinds))}. Where ablation costs less than {SMALL_HARM} "
        "nats a token, what is recovered of it is noise."
    )
    return Table(heads, lines, "No reconstruction was spliced into a model.", note=note)


def _listed(numbers: set[Any]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


def provenance_table(results: Results) -> Table:
    """The short fields of the provenance."""
    provenance = results.provenance
    lines: dict[str, Any] = {"schema": provenance.schema, "kind": provenance.kind, "preset": provenance.preset}
    lines |= {"started": provenance.started, "git commit": provenance.git_commit}
    lines |= {"command": " ".join(provenance.command), "Python": provenance.python, "text": provenance.text}
    lines |= {"tokens fingerprint": provenance.tokens_fingerprint}
    lines |= {f"seconds, {stage}": seconds for stage, seconds in provenance.seconds.items()}
    rows = [Line([words(name), Value(format_number(value), style="mono")]) for name, value in lines.items()]
    return Table([Head("field", word=True), Head("value", word=True)], rows, "", wide=False)


def provenance_details(results: Results) -> list[tuple[str, str]]:
    """The long fields, each as indented JSON."""
    return [
        (key, json.dumps(getattr(results.provenance, key), indent=2, sort_keys=True, ensure_ascii=False))
        for key in ("config", "device", "versions")
    ]


TABLES: dict[str, Callable[[Results], Table]] = {
    "matched": matched_table,
    "subjects": subject_table,
    "quality": quality_table,
    "counts": count_table,
    "pairs": pair_table,
    "spread": spread_table,
    "read": read_table,
    "splice": splice_table,
    "provenance": provenance_table,
}
