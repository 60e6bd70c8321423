"""From which sparsity on writing a code out and multiplying beats gathering: decoding with its loss and both backward
passes, dense against sparse, by width, features and F / K. `triton_kernels.dense.FEATURES_PER_ACTIVE` is set by it.

    python scripts/bench_crossover.py [--device cuda] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from types import ModuleType

import torch
from bench_common import milliseconds

from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.provenance import describe_run
from triton_kernels import dense
from triton_kernels.arguments import Code
from triton_kernels.ops import implementation

SHAPES = {
    "cpu": [(512, 8, 64, 512), (512, 4, 64, 1024), (512, 1, 512, 512), (512, 1, 512, 2048), (1024, 1, 1536, 2048)],
    "cuda": [(4096, 12, 768, 8192), (4096, 1, 9216, 8192), (8192, 1, 9216, 32768)],
}
RATIOS = {"cpu": (2, 3, 4, 6, 8, 16, 32, 64), "cuda": (16, 32, 64, 128, 181, 256, 512, 1024)}


def passes(form: ModuleType, shape: tuple[int, int, int, int], k: int, device: str) -> float:
    """Milliseconds of the three passes in one form, median of seven."""
    n_rows, n_groups, width, n_features = shape
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(n_rows, n_groups, n_features, generator=generator).topk(k, dim=2).indices.sort(2).values
    features = (chosen + torch.arange(n_groups)[:, None] * n_features).flatten().int().to(device)
    values, offsets = torch.rand(features.numel(), device=device), torch.arange(0, features.numel() + 1, k).to(device)
    code = Code(values, features, offsets)
    decoder = torch.randn(n_groups, n_features, width, device=device)
    bias, x = torch.zeros(n_groups, width, device=device), torch.randn(n_rows, n_groups, width, device=device)
    weight = torch.ones(n_groups, 1, device=device)

    def call() -> None:
        error, _ = form.decode_loss(code, decoder, bias, x, 1)
        d_values, _ = form.backward_decoder(code, error, weight, decoder)
        form.backward_encoder(code._replace(values_P=d_values), x, bias, n_features)

    return statistics.median([milliseconds(call, device) for _ in range(9)][2:])


def main() -> None:
    """Measure, print the table and write it with its JSON under `out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sparse = implementation(torch.empty(0, device=given.device))
    ratios = RATIOS[given.device]
    lines = [
        "Time of the sparse passes over that of the dense ones; above 1 the dense form wins.",
        "",
        "| B, G, N, F | " + " | ".join(f"F/K = {ratio}" for ratio in ratios) + " |",
        "|---" * (len(ratios) + 1) + "|",
    ]
    record = []
    for shape in SHAPES[given.device]:
        cells = []
        for ratio in ratios:
            k = max(1, shape[3] // ratio)
            times = {
                name: passes(form, shape, k, given.device) for name, form in (("sparse", sparse), ("dense", dense))
            }
            cells.append(times["sparse"] / times["dense"])
            record.append({"shape": shape, "k": k, "ms": times})
        lines.append(f"| {', '.join(map(str, shape))} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    print("\n".join(lines))
    stem = f"crossover_{given.device}{given.threads if given.device == 'cpu' else ''}"
    (given.out / f"{stem}.md").write_text("\n".join(lines) + "\n")
    write_json(given.out / f"{stem}.json", {"passes": record, "provenance": describe_run()})


if __name__ == "__main__":
    main()
