"""Published numbers, as data, and how each stands beside a `results.json` of ours.

Every claim has one rule for all results (`published_rules`). Most published studies are thousands of times larger than
ours: rules judge directions, and say where numbers cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from crosscoder.report import published_rules as rules
from crosscoder.report.published_rules import Comparison, Results

Checked = Literal["text", "abstract", "second-hand"]

CHECKED = {
    "text": "read in a stored copy or transcript of the paper",
    "abstract": "read in the abstract",
    "second-hand": "not found in what could be read; quoted from others",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published number.

    ours: where in `results.json` the number stands that it is held against.
    rule: when ours agrees, in words; `compare` is the same as a function of plain results.
    """

    key: str
    source: str
    where: str
    checked: Checked
    setting: str
    figure: str
    ours: str
    rule: str
    compare: Callable[[Results], Comparison]


_CROSSCODERS = ("Lindsey et al. 2024", "transformer-circuits.pub/2024/crosscoders")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        key="feature-efficiency", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.1", checked="text",
        setting="residual stream of an 18-layer model; L1 of norms; loss is squared error plus penalty",
        figure="a crosscoder needs about 8 times fewer features in all than per-layer SAEs for the same loss",
        ours="quality.cells[].explained_variance, n_features",
        rule="the crosscoder explains at least as much with no more features and no more of them active",
        compare=lambda r: rules.over_pairs(r, rules.fewer_features, "one side has more features or more active ones"),
    ),
    Claim(
        key="flop-efficiency", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.1", checked="text",
        setting="the same; a crosscoder with n features costs what L SAEs of n cost",
        figure="about 2 times less efficient per training FLOP than per-layer SAEs, at large budgets",
        ours="quality.cells[].explained_variance at equal n_features and L0 a layer",
        rule="at equal n and equal L0 a token and layer the bank explains more",
        compare=lambda r: rules.over_pairs(r, rules.equal_compute, "n or L0 a token and layer is not equal"),
    ),
    Claim(
        key="total-l0", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.1", checked="text",
        setting="the same, at equal training FLOPs",
        figure="L0 summed over layers 15 to 40 times lower, with smaller error",
        ours="quality.cells[].l0_token at equal n_features",
        rule="at equal n: fewer active in the whole model, and no less explained",
        compare=lambda r: rules.over_pairs(
            r, rules.total_l0, "n is not equal, or one side has both more active and less error"
        ),
    ),
    Claim(
        key="profiles", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.2", checked="text",
        setting="decoder norms over layers of random features; no share is given",
        figure="most features peak in one layer; the decay is often gradual, over many or all layers",
        ours="spread.cells[].single_layer_share, mean_rho_share",
        rule="over 6 or more layers: under half live in one, and mean rho / L is below .9",
        compare=rules.feature_profiles,
    ),
    Claim(
        key="drift", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.2", checked="text",
        setting="cosine of a feature's decoder between layers",
        figure="far more stable than chance, yet most drift",
        ours="spread.cells[].mean_adjacent_cosine", rule="above 3 times chance (1 / sqrt D) and below .99",
        compare=rules.drift,
    ),
    Claim(
        key="weakly-causal", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.3.2", checked="text",
        setting="each feature read from one layer, written to it and all later ones",
        figure="needs 3 to 4 times the features of the global crosscoder; per FLOP between it and SAEs",
        ours="table[] of scripts/bench_variants.py",
        rule="explained variance lies between bank and crosscoder at equal n and L0",
        compare=rules.weakly_causal,
    ),
    Claim(
        key="local-windows", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.3.1", checked="text",
        setting="features in windows of K layers", figure="loss runs fairly linearly in K, without a best K",
        ours="table[] of scripts/bench_variants.py",
        rule="explained variance rises with K, between bank and crosscoder", compare=rules.local_windows,
    ),
    Claim(
        key="functional-layers", source="Demou et al. 2026 (fmxcoders)", where="arXiv 2605.09438", checked="abstract",
        setting="standard crosscoders on GPT2-Small, Pythia-410M and -1.4B, Gemma2-2B",
        figure="one or two layers drive a feature on average, though decoder norms are spread evenly",
        ours="spread.cells[].per_seed[].functional", rule="functional rho at most 2",
        compare=rules.functional_layers,
    ),
    Claim(
        key="chat-only", source="Minder et al. 2025", where="arXiv 2504.02922", checked="second-hand",
        setting="Gemma 2 2B, base and chat; crosscoders with L1 and with BatchTopK (abstract: direction only)",
        figure="3,176 features only in the chat model with L1, 134 with BatchTopK",
        ours="none yet", rule="L1 reports several times as many exclusive features",
        compare=rules.absent("no pair of a base and a tuned model"),
    ),
    Claim(
        key="seeds", source="Paulo and Belrose 2025", where="arXiv 2501.16615", checked="abstract",
        setting="SAE with 131K latents on a feed-forward block of Llama 3 8B",
        figure="30 % of features shared by two seeds", ours="counts.cells[].pair.matched_share (bank)",
        rule="less than half is shared", compare=rules.shared_by_seeds,
    ),
    Claim(
        key="pw-mcc", source="Song et al. 2025", where="arXiv 2505.20254", checked="abstract",
        setting="TopK SAEs on activations of language models",
        figure="mean cosine of matched features of two seeds (PW-MCC) .80 can be reached",
        ours="counts.cells[].pair.pw_mcc (bank)", rule="at least .75", compare=rules.pairwise_mcc,
    ),
    Claim(
        key="dead", source="Gao et al. 2024", where="arXiv 2406.04093, section 2.4", checked="text",
        setting="TopK SAE with 16 million latents on GPT-4; transposed start, AuxK",
        figure="7 % dead", ours="quality.cells[].dead_share (bank)", rule="at most 7 %", compare=rules.dead,
    ),
    Claim(
        key="recovery", source="Korznikov et al. 2026", where="arXiv 2602.14111", checked="abstract",
        setting="planted features, several SAE architectures",
        figure="9 % of true features recovered at 71 % explained variance",
        ours="rows[].recall, explained_variance of `crosscoder synthetic`",
        rule="some dictionary of ours explains at least 71 % and recovers at most half", compare=rules.planted_recovery,
    ),
    Claim(
        key="random-models", source="Heap et al. 2025", where="arXiv 2501.17727", checked="abstract",
        setting="SAEs on Pythia models, trained and with random weights",
        figure="reconstruction and interpretability scores are alike in many settings",
        ours="quality.cells[].explained_variance, trained and untrained (bank)",
        rule="explained variances within .1", compare=rules.random_models,
    ),
    Claim(
        key="shapes", source="Kaplan et al. 2020", where="arXiv 2001.08361, section 3.1", checked="text",
        setting="transformers with equal parameters outside the embedding",
        figure="6 layers of 4288 within 3 % of the loss of 48 layers of 1600",
        ours="subjects.*.curve[].held_out_loss at equal tokens", rule="within 3 %", compare=rules.equal_parameters,
    ),
    Claim(
        key="layer-variance", source="Lawson et al. 2024 (MLSAE)", where="arXiv 2409.04185", checked="abstract",
        setting="one SAE for all layers of Pythia models; spread of a latent's activity over layers",
        figure="variance about 100 times larger over many tokens than at one token",
        ours="none yet", rule="at least 10 times larger", compare=rules.absent("no SAE shared by all layers"),
    ),
)  # fmt: skip


def compare_published(results: Results) -> dict[str, Comparison]:
    """Every claim's comparison with one file of results, by the claim's key."""
    return {claim.key: claim.compare(results) for claim in CLAIMS}


def published_table(named: Sequence[tuple[str, Results]] = ()) -> list[str]:
    """Markdown lines: a row for each claim, and for each named file of results what it says to it."""
    header = ["source", "measured there", "published", "checked", "ours", "agrees if"]
    header += [f"ours: {name}" for name, _ in named]
    compared = [compare_published(results) for _, results in named]
    rows = []
    for claim in CLAIMS:
        row = [f"{claim.source}, {claim.where}", claim.setting, claim.figure, claim.checked, claim.ours, claim.rule]
        for by_key in compared:
            one = by_key[claim.key]
            row.append(f"{one.ours}; **{one.verdict}** ({one.why})")
        rows.append([cell.replace("|", "\\|") for cell in row])
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]
