"""Parity with float64, repetition and memory, without pytest: `--device cuda`, or `--device cpu --tiny` for a look."""

import argparse
import itertools
import sys

import bench_kernels
import bench_step
from bench_common import Shape, make_problem

from triton_kernels import dense

EDGES = [Shape(1, 1, 1, 1, 1), Shape(7, 3, 5, 13, 4), Shape(33, 1, 31, 64, 64), Shape(130, 2, 65, 1000, 16)]
LARGE = [Shape(64, 12, 768, 2048, 32), Shape(256, 1, 64, 4096, 32), Shape(16, 1, 128, 40960, 32)]
KINDS = ({}, {"ragged": True}, {"hot": True}, {"bank": True, "ragged": True})

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--device", default="cuda")
parser.add_argument("--tiny", action="store_true", help="small shapes, two repetitions")
given = parser.parse_args()
bad: list[str] = []
for shape, limit in itertools.product(
    EDGES + ([] if given.tiny else LARGE), (0, dense.FEATURES_PER_ACTIVE[given.device])
):
    dense.FEATURES_PER_ACTIVE[given.device] = limit  # 0 keeps small codes from the dense form
    for kind in KINDS:
        for tables, product in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
            problem = make_problem(shape, dtype=tables, device=given.device, **{"bank": False, **kind})
            label = f"{shape} {' '.join(kind) or 'plain'}, limit {limit}, tables {tables}, product {product}"
            found = bench_kernels.errors(problem, product, shape.k).items()
            bad += [f"{label}: {name}: {one}" for name, one in found if not one.get("allowed")]
    print(f"{shape}, {'usual' if limit else 'sparse'} form: {len(bad)} failures so far", flush=True)
bad += bench_step.repetitions(given.device, 2 if given.tiny else 20)
bad += [] if given.device == "cpu" else bench_step.grids_held(Shape(32768, 1, 256, 65536, 32), given.device)
print("\n".join(bad) or "parity, repetition and memory: all as they should be")
sys.exit(bool(bad))
