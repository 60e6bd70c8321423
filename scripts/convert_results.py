"""Turn a `results.json` of version 2 into version 3: `python scripts/convert_results.py OLD NEW`.

Version 2 kept a number under the section that showed it; version 3 keeps rows, and everything that is derived from them
is derived where it is shown.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosscoder.foundation.artifact import read_json, write_json
from crosscoder.results.file import SCHEMA, Provenance, Results, document, from_document
from crosscoder.results.quantities import QUANTITIES
from crosscoder.results.table import Estimate, LongTable, Place, Row, Value
from crosscoder.results.verdict import Condition, Gate, Verdict

CELL = ("subject", "training_seed", "state", "site", "arm", "role", "n_features", "k")
PROBE = {"tokens": "probe_tokens", "features": "probe_features", "alive": "probe_alive"}
PAIR = {"lifespan": "seed_corrected_lifespan"}
STATISTICS = {"residual": "identity_residual", "stable": "stable_features", "exclusive": "exclusive_share"}
AGREEMENT = {"u": "u", "null": "u_null", "ceiling": "u_ceiling", "floor": "u_floor"}
RATES = {"n_pairs": "rate_pairs"}
POINTS = {"features", "rho", "load", "matched_share", "explained_variance", "dead_share", "l0"}
OF_SPREAD = ("mean_rho", "mean_rho_share", "mean_lifespan", "single_layer_share", "mean_adjacent_cosine")
RUN = {
    "seed": "training_seed_value",
    "held_out_loss": "held_out_loss",
    "untrained_loss": "untrained_loss",
    "tokens": "training_tokens",
}


def convert(old: dict[str, Any]) -> Results:
    """The version 3 of a version 2."""
    rows = [*_subjects(old), *_study(old), *_cells(old)]
    verdict = old["verdict"]
    if verdict is not None:
        rows += [*_statistics(verdict), *_agreement(verdict), *_points(verdict), *_joint(verdict)]
        rows += _calibration(verdict)
    provenance: dict[str, Any] = {**old["provenance"], "schema": SCHEMA}
    return Results(LongTable(tuple(rows)), verdict and _verdict(verdict), Provenance(**provenance))


def _value(entry: Any) -> Value:
    if isinstance(entry, dict) and entry.keys() == {"mean", "low", "high"}:
        return Estimate(entry["mean"], entry["low"], entry["high"])
    return entry


def _rows(at: Place, values: dict[str, Any], renamed: dict[str, str] | None = None) -> Iterator[Row]:
    for key, value in values.items():
        key = (renamed or {}).get(key, key)
        whole = QUANTITIES[key].value == "whole" and value is not None
        yield Row(at, key, int(value) if whole else _value(value))


def _subjects(old: dict[str, Any]) -> Iterator[Row]:
    for name, one in old["subjects"].items():
        at = Place(subject=name)
        yield from _rows(at, {key: one[key] for key in ("name", "description", "n_layers", "d_model", "epochs")})
        yield from _rows(at, {f"parameters_{key}": value for key, value in one["parameters"].items()})
        for key, words in (("step", "step"), ("tokens", "tokens"), ("held_out_loss", "loss")):
            yield Row(at, f"curve_{words}", [point[key] for point in one["curve"]])
        for t, run in enumerate(one.get("runs", [])):
            yield from _rows(Place(subject=name, training_seed=t), run, RUN)
        if not one.get("runs"):
            yield from _rows(at, {key: one[key] for key in RUN if key in one}, RUN)


def _study(old: dict[str, Any]) -> Iterator[Row]:
    """What version 2 said in the notes of what was matched."""
    runs = [run["held_out_loss"] for one in old["subjects"].values() for run in one.get("runs", [])]
    if len(runs) > 1:
        yield Row(Place(), "loss_gap", (max(runs) - min(runs)) / (sum(runs) / len(runs)))
    for item in old["matched"]["items"]:
        if chosen := re.search(r"([\d.]+)% where checkpoints were chosen", item["note"]):
            yield Row(Place(), "chosen_loss_gap", float(chosen[1]) / 100)
        if total := re.search(r"([\d,]+) training tokens in all", item["note"]):
            yield Row(Place(), "text_tokens", int(total[1].replace(",", "")))
            size = re.search(r"vocabulary (\d+)", next(iter(item["values"].values())))
            assert size is not None
            yield Row(Place(), "vocabulary", int(size[1]))


def _cells(old: dict[str, Any]) -> Iterator[Row]:
    spread = {tuple(c.get(key, "crosscoder") for key in CELL if key != "role"): c for c in old["spread"]["cells"]}
    quality = {tuple(c[key] for key in CELL): c for c in old["quality"]["cells"]}
    for cell in old["counts"]["cells"]:
        at = Place(**{key: cell[key] for key in CELL})
        yield from _rows(at, {key: cell[key] for key in ("tokens_train", "tokens_held_out", "p_min")})
        yield from _rows(at, cell["pair"] or {}, PAIR)
        for one in cell["per_seed"]:
            yield from _rows(_seed(at, one), {key: value for key, value in one.items() if key != "seed"})
        for one in quality[tuple(cell[key] for key in CELL)]["per_seed"]:
            yield from _quality(_seed(at, one), one)
        written = spread.get(tuple(cell[key] for key in CELL if key != "role"))
        if cell["role"] == "main" and written is not None:
            yield from _rows(at, {"profile_heatmap": written["heatmap"], "layers": written["layers"]})
            for one in written["per_seed"]:
                yield from _spread(_seed(at, one), one)


def _seed(at: Place, one: dict[str, Any], **more: Any) -> Place:
    return Place(**{**at.known(), "seed": one["seed"], **more})


def _quality(at: Place, one: dict[str, Any]) -> Iterator[Row]:
    skipped = {"seed", "dead_share", "splice"}  # the dead share is that of the counts
    yield from _rows(at, {key: value for key, value in one.items() if key not in skipped})
    if splice := one["splice"]:
        yield from _rows(at, {"splice_tokens": splice["tokens"], "spliced_ablation": splice["ablation"]})
        yield Row(at, "clean_loss", splice["clean_loss"])
        for site in splice["sites"]:
            here = Place(**{**at.known(), "layer": site["site"]})
            yield from _rows(here, {k: v for k, v in site.items() if k != "site"}, {"loss": "spliced_loss"})


def _spread(at: Place, one: dict[str, Any]) -> Iterator[Row]:
    yield from _rows(at, {key: one[key] for key in OF_SPREAD})
    edges = one["rho_histogram"]["edges"]
    assert edges == [round(i / 20, 6) for i in range(21)]
    yield Row(at, "rho_histogram", one["rho_histogram"]["counts"])
    yield Row(at, "lifespan_counts", one["lifespan_counts"])
    yield from _rows(at, one.get("functional") or {}, PROBE)


def _statistics(verdict: dict[str, Any]) -> Iterator[Row]:
    reasons = {}
    for row in verdict["statistics"]:
        name, _, subject = row["name"].partition(" ")
        if name in ("R,", "R"):
            reasons[row["site"], "untrained" if "untrained" in row["name"] else "trained"] = row["missing"]
            continue
        arm: Any = "joint" if name == "exclusive" else None
        at = Place(subject=subject or None, site=row["site"], arm=arm)
        yield Row(at, STATISTICS.get(name, name), _value(row["estimate"]), row["missing"])
    for row in verdict["estimators"]:
        states: tuple[Any, Any] = ("trained", "untrained")
        for state in states:
            at = Place(state=state, site=row["site"], estimator=row["estimator"])
            first = row["estimator"] == "load_debiased"
            missing = reasons.get((row["site"], state)) if first else row["missing"] if state == "trained" else None
            yield Row(at, "ratio", _value(row[state]), None if row[state] else missing)


def _agreement(verdict: dict[str, Any]) -> Iterator[Row]:
    for site, found in verdict["universality_by_site"].items():
        at = Place(site=site)
        yield from _rows(at, {key: found[key] for key in AGREEMENT}, AGREEMENT)
        shares = {f"share_{key}": value for key, value in found["shares"].items() if key != "hungarian"}
        yield from _rows(at, shares)
        for key, value in (found["rates"] or {}).items():
            yield from _rows(at, {RATES.get(key, f"rate_{key}"): value})


def _points(verdict: dict[str, Any]) -> Iterator[Row]:
    for row in verdict["points"]:
        where = {key: row[key] for key in ("subject", "training_seed", "state", "site")}
        at = Place(**where, arm="crosscoder", role="main")
        values = {key: value for key, value in row.items() if key not in where}
        yield from _rows(at, values, {key: f"point_{key}" for key in POINTS})


def _joint(verdict: dict[str, Any]) -> Iterator[Row]:
    for row in verdict.get("joint", []):
        first, second = row["training_seeds"]
        where = {key: row[key] for key in ("state", "site", "n_features", "k")}
        where |= {"subject": row["first"], "training_seed": first, "other": f"{row['second']}{second}"}
        at = Place(**where, arm="joint", role="main")
        for one in row["per_seed"]:
            yield from _rows(_seed(at, one), {key: value for key, value in one.items() if key != "seed"})


def _calibration(verdict: dict[str, Any]) -> Iterator[Row]:
    for row in verdict["calibration"]:
        where = {key: row[key] for key in ("subject", "n_features", "k")}
        at = Place(**where, role="calibration", seed=row["world_seed"])
        for key, value in row.items():
            if isinstance(value, dict):
                for kind, one in value.items():
                    yield Row(Place(**{**at.known(), "kind": kind}), key, one)
            elif key not in (*where, "world_seed"):
                yield from _rows(at, {key: value})


def _verdict(old: dict[str, Any]) -> Verdict:
    kept = {key: old[key] for key in ("version", "label", "universality", "sentence", "rule")}
    texts = {key: tuple(old[key]) for key in ("kinds", "reasons", "notes")}
    gates = tuple(Gate(**gate) for gate in old["gates"])
    conditions = tuple(Condition(**condition) for condition in old.get("conditions", []))
    return Verdict(**kept, **texts, gates=gates, conditions=conditions)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    converted = document(convert(read_json(Path(sys.argv[1]))))
    write_json(Path(sys.argv[2]), converted)
    print(f"{sys.argv[2]}: {len(from_document(read_json(Path(sys.argv[2]))).rows):,} rows")
