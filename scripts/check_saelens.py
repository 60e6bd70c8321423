"""Our measurements against SAELens' of the same exported weights, on a language model and on planted features.

    scripts/install_peers.sh VENV
    VENV/bin/python scripts/check_saelens.py

Ends with an error if a judged row differs by more than 1 %. `--tiny` is for tests.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import check_saelens_language as language
import check_saelens_worlds as worlds
import torch
from check_common import report

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "benchmarks")
given = parser.parse_args()
torch.set_num_threads(given.threads)
chosen = (language.TINY, worlds.TINY) if given.tiny else (language.LanguageConfig(), worlds.WorldsConfig())
rows = [*worlds.compare(chosen[1]), *language.compare(chosen[0])]
notes = [*language.notes(chosen[0]), *worlds.notes(chosen[1])]
settings = {"language": asdict(chosen[0]), "worlds": asdict(chosen[1])}
sys.exit(report(rows, notes, settings, given.out, "saelens_check", given.threads))
