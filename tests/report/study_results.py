"""A hand-made study: the numbers are plausible and easy to find again in a report."""

from __future__ import annotations

import math
from typing import Any

from crosscoder.measure import density
from crosscoder.measure.comparison import SiteStatistics, Statistic, Universality
from crosscoder.measure.statistics import Estimate
from crosscoder.results.schema import POINT_FIELDS
from crosscoder.verdict import decide as verdict
from crosscoder.verdict import evidence
from crosscoder.verdict.evidence import Conditions

SHAPES = {"A": (8, 64), "B": (2, 128), "S": (6, 96)}
DEFINITIONS = evidence.DEFINITIONS | {
    "calibration": "A planted world of the study's own sizes.",
    "alive": "A feature is alive if it is active on more than a share p_min of the held-out tokens.",
    "dead_share": "Share of a dictionary's features that are not alive.",
    "distinct": "Alive features after joining duplicates.",
    "merged": "Distinct features of the bank: chains of alive features in neighbouring layers.",
    "per_neuron_layer": "Features of one layer over its width D.",
    "per_neuron_joint": "Distinct crosscoder features over the total neurons L * D.",
    "explained_variance": "1 - squared error / variance, summed over tokens and layers.",
    "neurons": "Layers times width.",
}


def span(mean: float, width: float = 0.0) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + width}


def make_subject(key: str) -> dict[str, Any]:
    n_layers, d_model = SHAPES[key]
    final = 1.68 if key == "A" else 1.57
    curve = [
        {
            "step": 50 * i,
            "tokens": 102_400 * i,
            "held_out_loss": final + 4.6 * math.exp(-i / 3) + 0.9 / (i + 1),
        }
        for i in range(21)
    ]
    return {
        "name": f"model-{key}",
        "n_layers": n_layers,
        "d_model": d_model,
        "parameters": {"non_embedding": 393_216, "embedding": 1024 * d_model, "norms": 17 * d_model},
        "neurons_per_layer": d_model,
        "total_neurons": n_layers * d_model,
        "held_out_loss": curve[20 if key == "A" else 14]["held_out_loss"],
        "held_out_loss_unit": "nats/token",
        "tokens": curve[20 if key == "A" else 14]["tokens"],
        "epochs": 1.25,
        "curve": curve,
        "untrained_loss": 6.93,
        "description": f"{n_layers} layers of width {d_model}, trained on short stories",
    }


def count_seed(seed: int, subject: str, arm: str, n_features: int) -> dict[str, Any]:
    n_layers, d_model = SHAPES[subject]
    bank = arm == "layerwise"
    size = n_features * (n_layers if bank else 1)
    alive = round(size * (1 - 0.5 * size / (size + 30 * d_model))) - 7 * seed
    merged = round(alive * 0.62)
    return {
        "seed": seed,
        "dictionary_size": size,
        "alive": alive,
        "alive_per_layer": [alive // n_layers] * n_layers if bank else None,
        "dead_share": 1 - alive / size,
        "ultra_dense": 4 + seed,
        "distinct": None if bank else alive - 11 - seed,
        "merged": merged if bank else None,
        "merged_low": round(merged * 0.7) if bank else None,
        "merged_high": round(merged * 1.3) if bank else None,
        "features_per_layer": alive / n_layers,
        "per_neuron_layer": alive / n_layers / d_model,
        "per_neuron_joint": None if bank else alive / n_layers / d_model,
        "entropy_load": 31.25 + seed / 8 + n_layers,
        "effective_dimension": None if bank else 77.5 + d_model / 4 + seed,
    }


def count_cell(subject: str, state: str, site: str, arm: str, n_features: int, k: int, role: str) -> dict[str, Any]:
    seeds = [count_seed(i, subject, arm, n_features) for i in range(2)]
    bank = arm == "layerwise"
    pair = {"matched": 311.5, "matched_share": 0.5125, "chapman": 1187.5}
    pair |= {"q_adjacent": 0.29, "q_same": 0.31, "survival": 0.9355, "lifespan": 6.381, "corrected": 402.25}
    if not bank:
        pair |= dict.fromkeys(("q_adjacent", "q_same", "survival", "lifespan", "corrected"))
    summary = {"alive": span((seeds[0]["alive"] + seeds[1]["alive"]) / 2, 3.5)}
    return {
        "subject": subject,
        "state": state,
        "site": site,
        "arm": arm,
        "n_features": n_features,
        "k": k,
        "training_seed": 0,
        "role": role,
        "tokens_train": 1_228_800,
        "tokens_held_out": 65_536,
        "p_min": 10 / 65_536,
        "per_seed": seeds,
        "pair": pair if role == "main" else None,
        "summary": summary,
    }


def spread_cell(subject: str, state: str, site: str) -> dict[str, Any]:
    n_layers, _ = SHAPES[subject]
    sharp = 2.2 if state == "trained" else 1.1
    rows = []
    for i in range(60):
        weight = [math.exp(-sharp * abs(layer - i * (n_layers - 1) / 59)) for layer in range(n_layers)]
        rows.append([w / sum(weight) for w in weight])
    counts = [round(80 * math.exp(-((b / 20 - 0.9 + 0.2 * (state == "trained")) ** 2) / 0.05)) for b in range(20)]
    seed = {
        "mean_rho": 0.66 * n_layers,
        "mean_rho_share": 0.66 if state == "trained" else 0.83,
        "mean_lifespan": 0.5 * n_layers,
        "single_layer_share": 0.18,
        "mean_adjacent_cosine": 0.74 if state == "trained" else None,
        "rho_histogram": {"edges": [i / 20 for i in range(21)], "counts": counts},
        "lifespan_counts": [40] * n_layers,
    }
    return {
        "subject": subject,
        "state": state,
        "site": site,
        "n_features": 1024,
        "k": 16,
        "training_seed": 0,
        "per_seed": [{"seed": i, **seed} for i in range(2)],
        "heatmap": rows if state == "trained" else [],
        "layers": [str(i + 1) for i in range(n_layers)],
        "summary": {"mean_rho": span(0.66 * n_layers, 0.0625)},
    }


def quality_cell(count: dict[str, Any]) -> dict[str, Any]:
    n_layers, _ = SHAPES[count["subject"]]
    bank, k = count["arm"] == "layerwise", count["k"]
    explained = 0.97 - 1.2 / (k + 3) - 0.03 * bank - 0.02 * (count["subject"] == "B")
    per_token = k * n_layers if bank else k
    sites = [*(str(i + 1) for i in range(n_layers)), "all"]
    seeds = []
    for seed in range(2):
        spliced = [
            {
                "site": s,
                "loss": 1.75 + i / 90,
                "ablated_loss": 4.5,
                "loss_recovered": 0.96 - i / 60 - seed / 90 - 0.04 * bank,
                "kl": 0.0625,
            }
            for i, s in enumerate(sites)
        ]
        splice = {"tokens": 16_384, "ablation": "mean", "clean_loss": 1.6875, "sites": spliced}
        seeds.append(
            {
                "seed": seed,
                "explained_variance": explained + seed / 200,
                "explained_variance_per_layer": [explained - 0.01 * i + seed / 150 for i in range(n_layers)],
                "l0_token": float(per_token),
                "l0_token_layer": per_token / n_layers,
                "dead_share": 0.0475,
                "threshold": [0.4375] if count["arm"] == "crosscoder" else None,
                "splice": splice if count["role"] == "main" and count["site"] == "residual" else None,
            }
        )
    keys = ("subject", "state", "site", "arm", "n_features", "k", "training_seed", "role")
    return {**{key: count[key] for key in keys}, "per_seed": seeds, "summary": {}}


def table_rows(subjects: list[str]) -> list[dict[str, Any]]:
    both = len(subjects) == 2

    def row(quantity: str, group: str, mean: float, definition: str | None, width: float = 0.0) -> dict[str, Any]:
        values = {s: span(mean * (1 + i), width) for i, s in enumerate(subjects)}
        ratio = span(2.0, width / 100) if both else None
        return {
            "quantity": quantity,
            "values": values,
            "ratio": ratio,
            "definition": definition,
            "group": group,
        }

    return [
        row("parameters, non-embedding", "subject", 393_216.0, None),
        row("neurons in total", "subject", 512.0, "neurons"),
        row("residual stream: alive features, all layers", "per-layer", 3641.5, "alive", 17.5),
        row("residual stream: distinct features, merged", "per-layer", 1875.5, "merged", 12.5),
        row("block writes: features per neuron", "per-layer", 7.125, "per_neuron_layer", 0.375),
        row("residual stream: alive features", "cross-layer", 911.5, "alive", 3.5),
        row("residual stream: distinct features", "cross-layer", 899.5, "distinct", 4.5),
        row("block writes: features per neuron", "cross-layer", 1.7578125, "per_neuron_joint", 0.009765625),
        row("untrained, residual stream, crosscoder: distinct features", "control", 988.25, "distinct", 5.75),
    ]


def make_verdict() -> dict[str, Any]:
    """A verdict on values that pass every gate, described as a study does."""
    ratio = Estimate(1.9, 1.7, 2.2)
    found = verdict.Evidence(
        loss_gap=0.004,
        loss_matched=True,
        explained_variance=(0.9, 0.89),
        dead_share=0.04,
        self_cosine=0.93,
        calibration_count_error=0.05,
        calibration_rho_error=0.02,
        calibration_same_sizes=True,
        trained_difference=Estimate(0.5, 0.3, 0.7),
        ratio=ratio,
        universality=Estimate(0.95, 0.9, 1.0),
        alpha=Estimate(1.9, 1.7, 2.1),
        gamma=Estimate(0.0, -0.02, 0.02),
        gamma_excess=Estimate(0.0, -0.02, 0.02),
        delta=Estimate(0.95, 0.9, 1.0),
        cross_layer=Estimate(0.0, -0.01, 0.01),
        count_gain=Estimate(0.0, -0.05, 0.05),
        n_training_seeds=2,
    )
    names = {f"R, {e}": ratio for e in density.ESTIMATORS} | {"gamma": found.gamma, "delta": found.delta}
    statistics = {n: Statistic(n, e, n.removeprefix("R, ")) for n, e in names.items()}
    agreement = Universality(
        ratio, 0.1, ratio, 0.5, found.universality, {"forward_7": 0.8, "backward_7": 0.7}, None, None
    )
    fields = dict.fromkeys(POINT_FIELDS, 0.9)
    points = [
        {"subject": s, "state": "trained", "training_seed": t, **fields, "d_eff_debiased": 60.0 + t}
        for s in "AB"
        for t in range(2)
    ]
    sites = {"write": SiteStatistics("write", statistics, agreement, points)}
    conditions = Conditions(loss_gap=0.004, loss_matched=True)
    world = {"subject": "A", "world_seed": 0, "mcc": 0.97, "count": 120, "count_true": 128, "count_error": -0.0625}
    return {**evidence.describe(sites, found, conditions), "calibration": [world]}


def make_results(subjects: tuple[str, ...] = ("A", "B")) -> dict[str, Any]:
    """A plausible study of these subjects."""
    keys = list(subjects)
    counts = []
    for subject in keys:
        for arm in ("crosscoder", "layerwise"):
            sizes = (256, 512, 2048) if arm == "crosscoder" else (64, 128, 512)
            main = 1024 if arm == "crosscoder" else 256
            for site in ("residual", "write"):
                counts += [count_cell(subject, s, site, arm, main, 16, "main") for s in ("trained", "untrained")]
            counts += [count_cell(subject, "trained", "residual", arm, n, 16, "size") for n in sizes]
            counts += [count_cell(subject, "trained", "residual", arm, main, k, "k") for k in (8, 32)]
    spread = [spread_cell(s, t, w) for s in keys for w in ("residual", "write") for t in ("trained", "untrained")]
    matched = [
        {
            "quantity": "non-embedding parameters",
            "values": dict.fromkeys(keys, 393_216),
            "matched": True,
            "note": "exact",
        },
        {
            "quantity": "held-out loss",
            "values": dict.fromkeys(keys, 1.68),
            "matched": False,
            "note": "gap 1.2 %",
        },
        {
            "quantity": "optimiser",
            "values": dict.fromkeys(keys, "AdamW"),
            "matched": None,
            "note": "rate not tuned",
        },
    ]
    return {
        "verdict": make_verdict() if len(keys) == 2 else None,
        "subjects": {s: make_subject(s) for s in keys},
        "matched": {"items": matched if len(keys) == 2 else []},
        "counts": {
            "answer": [
                "Counted layer by layer the wider model holds 1.97 times as many features per neuron; counted "
                "across layers it holds 1.08 times as many.",
                "Most of the apparent difference is one feature seen again in the next layer, and the "
                "untrained control shows part of it too.",
            ],
            "table": table_rows(keys),
            "cells": counts,
        },
        "spread": {"cells": spread},
        "quality": {"cells": [quality_cell(cell) for cell in counts]},
        "definitions": dict(DEFINITIONS),
        "provenance": {
            "schema": "crosscoder.results/2",
            "kind": "aspect_ratio" if len(keys) == 2 else "subject_study",
            "preset": "tiny",
            "seconds": {"subjects": 201.5, "dictionaries": 377.25},
            "tokens_fingerprint": "a1b2c3d4",
            "text": "short stories, 12 MB",
            "config": {"seed": 0, "dictionary": {"n_features": 1024, "k": 16}},
            "command": ["crosscoder", "aspect-ratio", "--preset", "tiny"],
            "device": {"cpu": "a cpu", "cpu_threads": 2, "gpus": [], "system": "Linux"},
            "git_commit": "0123456789abcdef",
            "python": "3.11.9",
            "started": "2025-01-01T00:00:00Z",
            "versions": {"torch": "2.11.0"},
        },
    }
