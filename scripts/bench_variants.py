"""Every kind of dictionary at one L0: six sparsity rules, six layer structures, three banks and the shared SAE.

On a planted world, and with --activations on a real model's stored residual streams (`crosscoder harvest`). Writes one
table with its JSON for each; a variant that the JSON already holds under the same settings is not trained again.

    python scripts/bench_variants.py
    python scripts/bench_variants.py --activations runs/acts --l0 32 --n-features 4096 --steps 2000 --seeds 0 1
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_variants_fit import (
    VARIANTS,
    VariantsConfig,
    applicable,
    measure_variant,
    planted_source,
)

from crosscoder.data.shards import ActivationShards
from crosscoder.data.sources import SiteSource, Source
from crosscoder.data.world import WorldConfig
from crosscoder.foundation.artifact import read_json, write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import say
from crosscoder.foundation.provenance import describe_run

BETWEEN = ("weakly causal", "window of 2", "window of 4")
ENDS = ("bank", "batch_topk, acausal")


def average_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each variant: means over seeds, and the lowest and highest explained variance."""
    averaged = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        group = [row for row in rows if row["variant"] == name]
        entry: dict[str, Any] = {"variant": name, "seeds": len(group), "matched": all(row["matched"] for row in group)}
        for key in ("l0", "explained_variance", "explained_variance_later", "dead_share", "alive", "seconds"):
            values = [row[key] for row in group]
            entry[key] = None if None in values else statistics.fmean(values)
        explained = [row["explained_variance"] for row in group]
        entry |= {"low": min(explained), "high": max(explained)}
        averaged.append(entry | {key: group[0][key] for key in ("features", "parameters")})
    return averaged


def lies_between(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """For each causal or local variant, whether its explained variance lies between the bank's and the acausal's."""
    explained = {row["variant"]: row["explained_variance"] for row in rows}
    if not all(end in explained for end in ENDS):
        return {}
    low, high = sorted(explained[end] for end in ENDS)
    return {name: low <= explained[name] <= high for name in BETWEEN if name in explained}


def markdown_table(rows: Sequence[dict[str, Any]], config: VariantsConfig) -> list[str]:
    """The averaged rows as Markdown, and under them who lies between the bank and the acausal crosscoder."""
    lines = [
        "| variant | L0 | explained variance | without layer 0 | dead | alive | of | parameters | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        later = "-" if row["explained_variance_later"] is None else f"{row['explained_variance_later']:.4f}"
        span = f" [{row['low']:.4f}, {row['high']:.4f}]" if row["seeds"] > 1 else ""
        star = "" if row["matched"] else " *"
        lines.append(
            f"| {row['variant']} | {row['l0']:.1f}{star} | {row['explained_variance']:.4f}{span} | {later} | "
            f"{row['dead_share']:.1%} | {row['alive']:.0f} | {row['features']} | {row['parameters']:,} | "
            f"{row['seconds']:.1f} |"
        )
    lines += ["", f"L0: active features of a token in the whole model, asked for {config.l0}."]
    if not all(row["matched"] for row in rows):
        lines[-1] += f" *: off by more than {config.tolerance:.0%}."
    lines.append(
        "Explained variance is over the layers that the variant reconstructs: all but layer 0 for strictly causal, the "
        "second half, told from the first, for the transcoder; without layer 0 it is the mean over layers."
    )
    for name, inside in lies_between(rows).items():
        lines.append(f"{name}: {'lies' if inside else 'does not lie'} between the bank and the acausal crosscoder.")
    return lines


def run(source: Source, config: VariantsConfig, name: str, settings: dict[str, Any], given: argparse.Namespace) -> None:
    """Measures every variant on one source and writes its table after each."""
    path = given.out / f"variants_{name}.json"
    settings = {**settings, "config": to_mapping(config)}
    old = read_json(path) if path.exists() else {}
    rows = old["rows"] if old.get("settings") == settings else []
    wanted = [variant for variant in applicable(source.n_layers) if variant in given.variants]
    for variant in wanted:
        for seed in config.seeds:
            if any((row["variant"], row["seed"]) == (variant, seed) for row in rows):
                continue
            say(f"{name}: {variant}, seed {seed}")
            rows.append(measure_variant(variant, config, source, seed=seed, device=given.device))
            table = average_rows(rows)
            record = {"settings": settings, "rows": rows, "table": table, "between": lies_between(table)}
            write_json(path, {**record, "provenance": describe_run()})
            shape = f"{source.n_layers} layers x {source.d_model}, {config.steps} steps of {config.batch}"
            head = [f"{name}: {shape}, seeds {list(config.seeds)}; matched by {config.match}; {given.device}", ""]
            path.with_suffix(".md").write_text("\n".join([*head, *markdown_table(table, config)]) + "\n")
    print(path.with_suffix(".md").read_text())


def main() -> None:
    """The planted world first, then the store if one is given."""
    defaults = VariantsConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=Path, help="what `crosscoder harvest` wrote")
    parser.add_argument("--site", default="residual", choices=["residual", "write"])
    parser.add_argument("--label", default="model", help="name of the store's table")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--match", default=defaults.match, choices=["features", "parameters"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(defaults.seeds))
    for key in ("l0", "n_features", "steps", "batch", "search_steps", "most_searches", "dead_after_tokens"):
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, default=getattr(defaults, key))
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    for key, value in {"l0": 6, "n_features": 384, "layers": 6, "width": 32, "planted": 256}.items():
        parser.add_argument(f"--world-{key.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    shared = {key: getattr(given, key) for key in ("match", "steps", "batch", "search_steps", "most_searches")}
    shared |= {key: getattr(given, key) for key in ("dead_after_tokens", "learning_rate")} | {
        "seeds": tuple(given.seeds)
    }
    world = WorldConfig(
        n_features=given.world_planted,
        n_layers=given.world_layers,
        d_model=given.world_width,
        kinds=("local", "persistent", "drifting", "split"),
        p_min=0.005,
        p_max=0.05,
        noise=0.05,
    )
    config = VariantsConfig(l0=given.world_l0, n_features=given.world_n_features, **shared)
    run(planted_source(world), config, "planted", {"world": to_mapping(world)}, given)
    if given.activations is not None:
        train, held_out = (ActivationShards.load(given.activations / part) for part in ("train", "held_out"))
        config = VariantsConfig(l0=given.l0, n_features=given.n_features, **shared)
        settings = {"store": train.fingerprint, "held_out": held_out.fingerprint, "site": given.site}
        run(SiteSource(train, held_out, given.site), config, given.label, settings, given)


if __name__ == "__main__":
    main()
