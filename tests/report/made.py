"""A whole study of planted power laws, from rows to verdict, without a model: what the report is shown in tests."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from crosscoder.results.file import Provenance, Results
from crosscoder.results.table import Estimate, LongTable, Place, Row, rows_at
from crosscoder.studies.judge import law_rows, share_rows
from crosscoder.verdict import evidence, rule, words
from crosscoder.verdict.rows import evidence_rows, statistic_rows

SHAPES = {"A": (8, 64), "B": (2, 128), "C": (4, 90), "D": (2, 64)}
KS = (4, 8, 12, 16)
FVU, LOST = (0.3, 0.12, 0.08, 0.04), (0.2, 0.06, 0.03, 0.015)
LOADS = {"crosscoder": {"A": 20.0, "B": 11.0}, "layerwise": {"A": 9.0, "B": 7.0}}
"""ln-ln laws `load = factor * fvu^-.5`; of a layer in a bank."""
OWN = (0.97, 1.0, 1.04, 0.99, 1.02)
OFF_LAW = {"A": 1.0, "B": 1.01, "C": 0.98, "D": 1.02}
NULLS = {"gaussian": 1.5, "frozen_encoder": 1.3, "untrained": 1.4, "shuffled": 1.2}
"""B's load of a null over that of the trained B."""


def sweep(subject: str, arm: Any, state: Any, t: int) -> list[Row]:
    """One training's dictionaries of all k; the first k is the main one, with two seeds."""
    rows = []
    own = OWN[t] ** (1.1 if arm == "layerwise" else 1.0)
    factor = LOADS[arm][subject] * own * (NULLS.get(state, 1.0) if subject == "B" else 1.0)
    for k, fvu, lost in zip(KS, FVU, LOST, strict=True):
        main = k == KS[0]
        where: dict[str, Any] = {"subject": subject, "training_seed": t, "state": state, "site": "write", "arm": arm}
        place = Place(**where, role="main" if main else "k", n_features=1024, k=k)
        for seed in (0, 1) if main else (0,):
            at = replace(place, seed=seed)
            load = factor * fvu**-0.5 * (1.01 if seed else 1.0)
            found = {"dictionary_size": 1024, "alive": 1020, "dead_share": 0.004, "entropy_load": load}
            found |= {"effective_dimension": 40.0 + t, "explained_variance": 1 - fvu, "l0_token": float(k)}
            if arm == "crosscoder" and main:
                found |= {"mean_rho": 4.0 + t / 10, "mean_rho_model": 1.5 + t / 10, "twin_share": 0.01 * t}
                found |= {"causal_layers": 1.3 + t / 20, "additivity": 0.9, "conjunctive_share": 0.02 * t}
                found |= {"raw_density": load / 40, "raw_density_rest": load / (41 + t / 100), "label_gain": 0.02}
            rows += rows_at(at, found)
            if state in ("trained", "frozen_encoder"):
                rows += [
                    Row(at, "clean_loss", 2.5),
                    Row(replace(at, layer="all"), "spliced_loss", 2.5 + 2 * lost),
                    Row(replace(at, layer="all"), "ablated_loss", 4.5),
                ]
        if arm == "crosscoder" and main:
            layers = [str(one + 1) for one in range(SHAPES[subject][0])]
            shared = {"layers": layers, "profile_heatmap": [[1 / len(layers)] * len(layers)] * 3}
            shared |= {"matched_share": 0.8, "chapman": 1100.0, "stable_share": 0.7} if state == "trained" else {}
            rows += rows_at(place, shared)
            rows += rows_at(replace(place, n_features=None, k=None), {"self_cosine": 0.95, "point_matched_share": 0.8})
    if (subject, arm, state, t) == ("A", "crosscoder", "trained", 0):
        at = Place(**where, role="main", n_features=1024, k=KS[0], seed=0)
        tops = [[float(10 * i), 0.1 - i / 200, 0.05, 1.25, float(i % 8), 0.5 + i / 50] for i in range(10)]
        said = {"top_features": tops, "top_feature_tokens": [f"' token{i}'" for i in range(10)]}
        said |= {"top_feature_examples": [f"before{i}⟦ token{i}⟧ behind ¶ another⟦ token{i}⟧" for i in range(10)]}
        said |= {"features_page": "features/index.html"}
        rows += rows_at(at, said | {"causal_by_feature": [[0.0, 1.75], [20.0, 2.25]]})
    return rows


def subject(name: str) -> list[Row]:
    """Sizes, losses and rooms of one shape."""
    n_layers, d_model = SHAPES[name]
    sizes = {"name": f"shape {name}", "description": "a shape", "n_layers": n_layers, "d_model": d_model}
    counted = {"parameters_non_embedding": 12 * n_layers * d_model**2, "parameters_embedding": 512 * d_model}
    rows = rows_at(Place(subject=name), sizes | counted | {"parameters_norms": 17, "depth_over_width": 1.25})
    for t, own in enumerate(OWN):
        at = Place(subject=name, training_seed=t)
        rows += rows_at(at, {"held_out_loss": 2.45 + own / 100, "training_tokens": 2_000_000, "rate_share": 0.1})
        if name in ("A", "B"):
            rows += rows_at(at, {"bigram_loss": 3.1, "trigram_loss": 2.55 + own / 100, "lookup_share": 0.7 + own / 100})
        for state in ("trained", "untrained"):
            room = 3.0 * n_layers**0.6 * d_model**0.5 * OFF_LAW[name] * own**-0.5
            room *= 2 if state == "untrained" else 1
            for units in ("model", "scaled"):
                place = replace(at, state=state, site="write", estimator=units)
                rows.append(Row(place, "room", room * (1.1 if units == "scaled" else 1.0)))
    return rows


@cache
def made() -> Results:
    """Five trainings of A and B with four nulls, and two further shapes."""
    rows = [row for name in SHAPES for row in subject(name)]
    for name in ("A", "B"):
        for state in ("trained", *NULLS):
            for t in range(len(OWN) if state == "trained" else 2):
                rows += [row for arm in LOADS for row in sweep(name, arm, state, t)]
    rows += rows_at(Place(), {"vocabulary": 512, "text_tokens": 5_000_000, "n_documents": 40})
    pair = Place(role="calibration", seed=0)
    rows += rows_at(pair, {"calibration_mcc": 0.95, "calibration_q_error": 0.02, "calibration_g_error": 0.03})
    rows += rows_at(pair, {"calibration_room_error": 0.04, "calibration_fvu": 0.1})
    site = Place(site="write")
    rows += rows_at(site, {"u": 0.6, "u_null": 0.05, "u_ceiling": 0.7, "universality": Estimate(0.85, 0.8, 0.9)})
    rows += rows_at(site, {"median_log_rate": Estimate(-0.05, -0.1, 0.0), "rate_dispersion": Estimate(1.0, 0.9, 1.1)})
    rows += rows_at(site, {"matched_between": 0.5})
    table = LongTable(tuple(rows))
    table = LongTable((*table, *law_rows(table, SHAPES)))
    found, by_state = evidence.gather(table, SHAPES), evidence.statistics(table, SHAPES)
    more = statistic_rows(by_state) + evidence_rows(found) + share_rows(by_state, table, SHAPES)
    table = LongTable((*table, *more))
    verdict = words.tell(rule.decide(found), found, table, SHAPES)
    subjects = {"seeds": [0, 1, 2, 3, 4], "grid": [{}, {}], "grid_seeds": 5}
    config = {"subjects": subjects, "seeds": [0, 1], "nulls": list(NULLS), "residual_trainings": 0, "tokens_train": 7}
    provenance = Provenance(
        kind="aspect_ratio",
        preset="made",
        seconds={"verdict": 1.0},
        tokens_fingerprint="0" * 64,
        text="a text",
        command=["made"],
        config=config,
        device={"cpu": "one"},
        git_commit=None,
        python="3.11",
        started="2026-01-01T00:00:00Z",
    )
    return Results(table, verdict, provenance)
