"""The tables of spread: over how many layers features are written, and from how many they are read."""

from __future__ import annotations

from crosscoder.report.figures import Cell, Results, seed_range
from crosscoder.report.tables import (
    Head,
    Row,
    Table,
    Value,
    format_number,
    format_range,
    known_definition,
    lead_cells,
    lead_heads,
    line_note,
)

_SPREAD = (
    ("mean ρ (layers)", "mean_rho", "rho"),
    ("mean ρ / L", "mean_rho_share", "rho"),
    ("mean lifespan (layers)", "mean_lifespan", "lifespan"),
    ("single-layer share", "single_layer_share", "lifespan"),
    ("adjacent cosine", "mean_adjacent_cosine", "adjacent_cosine"),
)
# heading, quantity, key of its definition
_READ = (
    ("ρ, read (layers)", "functional_rho", "functional_rho"),
    ("ρ, written (layers)", "decoder_rho", "rho"),
    ("AUC, best layer", "best_layer_auc", "layer_auc"),
    ("AUC, all layers", "joint_auc", "probe"),
    ("J", "joint_gain", "joint_gain"),
    ("precision, best layer", "best_layer_precision", "probe_precision"),
    ("precision, all layers", "joint_precision", "probe_precision"),
    ("cross-layer share, before nulls", "genuine_share", "cross_layer_excess"),
)


def spread_table(results: Results) -> Table:
    """How many layers the features of each crosscoder occupy."""
    rows = []
    for cell in results["spread"]["cells"]:
        values = [format_range(seed_range(cell, quantity)) for _, quantity, _ in _SPREAD]
        rows.append(Row(lead_cells(results, cell) + values, sweep=cell.get("role", "main") != "main"))
    absent = "No spread of a crosscoder was measured."
    return Table(lead_heads(results, _SPREAD), rows, absent, note=line_note(results))


def read_table(results: Results) -> Table:
    """What one layer tells of each crosscoder's features, and what all layers tell; no rows where nobody asked."""
    rows = []
    for cell in results["spread"]["cells"]:
        if not any(seed.get("functional") for seed in cell["per_seed"]):
            continue
        values = [format_range(_functional_range(cell, quantity)) for _, quantity, _ in _READ]
        probed = _functional_range(cell, "probed")
        model, site, *_ = lead_cells(results, cell)
        rows.append(Row([model, site, Value(format_number(probed[0] if probed else None)), *values]))
    heads = [Head("model", word=True), Head("site", word=True), Head("features probed")]
    heads += [Head(name, definition=known_definition(results, key)) for name, _, key in _READ]
    return Table(heads, rows, "No feature was read.", note=line_note(results))


def _functional_range(cell: Cell, quantity: str) -> tuple[float, float, float] | None:
    """`(mean, low, high)` over the dictionary seeds for which the quantity is known."""
    found = [seed["functional"].get(quantity) for seed in cell["per_seed"] if seed.get("functional")]
    known = [value for value in found if value is not None]
    return (sum(known) / len(known), min(known), max(known)) if known else None
