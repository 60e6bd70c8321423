#!/usr/bin/env bash
# Everything that only a GPU can show, in under ten minutes: parity and repetition, each kernel, the whole step, targets.
#
#     scripts/gpu_check.sh [OUT]        (default benchmarks/gpu)
#
# Needs a python3 with torch and Triton, and nothing installed from here; PYTHON names another one. A stage that fails or
# runs out of its time is recorded, and the next one runs. OUT gets summary.md, check.log and the benchmarks' files; the
# exit status is that of the worst stage.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/benchmarks/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
log=$out/check.log
summary=$out/summary.md
: >"$log"
printf '| stage | result | seconds |\n| --- | --- | --- |\n' >"$summary"
worst=0

record() { # NAME RESULT SECONDS
  printf '| %s | %s | %s |\n' "$1" "$2" "$3" | tee -a "$summary"
}

stage() { # NAME LIMIT-SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS code result
  shift 2
  printf '\n== %s\n' "$name" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) result=passed ;;
    124 | 137) result="out of time ($limit s)" ;;
    *) result="failed ($code)" ;;
  esac
  record "$name" "$result" $((SECONDS - start))
  [ "$code" -le "$worst" ] || worst=$code
  return "$code"
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$log"; then
  record "GPU" "torch sees none, or is missing" 0
  exit 1
fi
shape=(--device cuda --batch 8192 --n-layers 12 --d-model 768 --n-features 32768 --k 32 --threads 8 --out "$out")

# The runner needs no pytest and is the one that counts; the kernels' own tests come on top where pytest is there.
stage "parity, 20 repetitions, memory" 180 "$python" scripts/gpu_parity.py --device cuda
stage "each kernel, predictions beside" 110 "$python" scripts/bench_kernels.py "${shape[@]}" --product bf16
stage "maxima from the product itself" 40 "$python" scripts/bench_epilogue.py --device cuda --out "$out"
if ! stage "whole step, targets" 150 "$python" scripts/bench_step.py "${shape[@]}" --targets --no-memory; then
  stage "whole step, this library alone" 40 "$python" scripts/bench_step.py "${shape[@]}" --arms "library bf16" \
    --targets --no-memory
fi
stage "peak bytes of a step" 45 "$python" scripts/bench_step.py "${shape[@]}" --memory-of "library bf16"
# A shape is written as soon as it is measured. Without torch.compile, whose compiler would take most of the time.
left=$((570 - SECONDS > 20 ? 570 - SECONDS : 20))
stage "grid of shapes" $((left < 150 ? left : 150)) "$python" scripts/bench_step.py --grid --device cuda --threads 8 \
  --repeats 5 --no-memory --out "$out" \
  --arms "dense eager" "dense eager bf16" "library fp32" "library bf16" "library, BatchTopK bf16" \
  "library, JumpReLU bf16" "sparsify bf16" \
  --shapes 12,768,32768,4096,32 1,768,24576,4096,32 4,640,16384,4096,64 8,64,160,512,5
if "$python" -c 'import pytest' 2>/dev/null; then
  stage "tests/kernels" $((590 - SECONDS > 20 ? 590 - SECONDS : 20)) "$python" -m pytest -q -o addopts= -p no:cacheprovider tests/kernels
else
  record "tests/kernels" "not run: no pytest" 0
fi

{
  printf '\n'
  sed -n '/^| target /,$p' "$out"/step_cuda_F32768.md 2>/dev/null || echo "no step was measured"
} | tee -a "$summary"
exit "$worst"
