#!/usr/bin/env bash
# Build the wheel, install it into a fresh environment, and use it outside the checkout: templates, presets, C sources
# and a small training are all there. Extra arguments go to pip, such as --index-url or -c constraints.txt.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet "$@" "$root"
cd "$work"
export XDG_CACHE_HOME="$work/cache"
unset PYTHONPATH
PATH="$work/env/bin:$PATH"
python - <<'PY'
import crosscoder, triton_kernels, pathlib, sys
for package in (crosscoder, triton_kernels):
    where = pathlib.Path(package.__file__).parent
    assert pathlib.Path(sys.prefix) in where.parents and (where / "py.typed").is_file(), where
PY
crosscoder --help > /dev/null
crosscoder compare --preset smoke --dry-run > /dev/null
cp -r "$root/benchmarks/quick-study" study && crosscoder report study
python - <<'PY'
import pathlib
words = "the cat sat on a mat and saw one dog run past two old red barns by a slow wide river".split()
pathlib.Path("texts").mkdir()
for i in range(20):
    chosen = [words[(i * 7 + j * j) % len(words)] for j in range(300)]
    pathlib.Path(f"texts/{i}.txt").write_text(" ".join(chosen))
PY
crosscoder prepare --text texts --vocab-size 280 --context 32 --out tokens
crosscoder train-subject --tokens-folder tokens --out subject --n-layers 2 --d-model 32 --tokens 4000 --batch 4 --n-checkpoints 1
subject="$(ls -d subject/step-* | tail -1)"
crosscoder train --subject "$subject" --tokens-folder tokens --out cc --budget.n-features 64 --budget.k-crosscoder 8 \
  --budget.steps 20 --budget.batch 128
crosscoder evaluate --dictionary cc/dictionary --subject "$subject" --tokens-folder tokens --out cc.json > /dev/null
crosscoder card cc/dictionary --evaluation cc.json
ls "$XDG_CACHE_HOME"/crosscoder/*.so || echo "no C compiler: stock operators"
