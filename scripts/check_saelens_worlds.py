"""Planted single-layer worlds, ours and theirs, scored by both on the same samples.

One world is `World` with one layer; the other is drawn by SAELens' `FeatureDictionary` and `ActivationGenerator`. Our
trainer learns an SAE of each. Their scores come from `eval_sae_on_synthetic_data` on the exported file, ours from
`crosscoder.measure`; where SAELens defines a score that we do not use, `check_detection` computes their definition.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import check_detection as detection
import numpy as np
import torch
from check_common import Row, peer
from scipy import sparse
from torch import Tensor, nn

from crosscoder.data.order import seeded_generator
from crosscoder.data.world import World, WorldConfig
from crosscoder.dictionary import BatchTopK, LayerwiseSAE
from crosscoder.formats.saelens import save_saelens
from crosscoder.measure import recovery
from crosscoder.measure.reading import measure_dictionary
from crosscoder.training import TrainConfig, train

Sample = Callable[[int, int], Tensor]
"""`sample(n, index)`: the planted features' activations `[n, P]`, the same for the same arguments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldsConfig:
    """Both worlds and the SAEs."""

    n_planted: int = 96
    d_model: int = 48
    n_features: int = 144
    short_size: int = 64
    """Another SAE, smaller than the world: where the two MCCs must differ."""
    p_min: float = 0.01
    p_max: float = 0.05
    steps: int = 800
    batch: int = 1024
    learning_rate: float = 1e-2
    samples: int = 20_480
    seed: int = 0


TINY = WorldsConfig(
    n_planted=16, d_model=16, n_features=24, short_size=8, p_min=0.05, p_max=0.1, steps=300, batch=256, samples=2048
)


@dataclasses.dataclass(frozen=True)
class Planted:
    """The truth of one layer: directions `[P, D]`, a bias `[D]`, and draws of activations."""

    directions_PD: Tensor
    bias_D: Tensor
    sample: Sample

    def hidden(self, acts_BP: Tensor) -> Tensor:
        """Activations of the layer, `[B, D]`."""
        return acts_BP @ self.directions_PD + self.bias_D


def our_world(config: WorldsConfig) -> Planted:
    """`World` with one layer, every feature local."""
    world = World(
        WorldConfig(
            n_features=config.n_planted, n_layers=1, d_model=config.d_model, kinds=("local",),
            p_min=config.p_min, p_max=config.p_max, seed=config.seed,
        )
    )  # fmt: skip

    def sample(n: int, index: int) -> Tensor:
        return world.sample(n, seeded_generator("check saelens", config.seed, index))[1]

    return Planted(world.decoder_FLD[:, 0], torch.zeros(config.d_model), sample)


def their_world(config: WorldsConfig) -> Planted:
    """Their generator's features: nearly orthogonal, Gaussian magnitudes, firing rates falling linearly, a bias."""
    synthetic = peer("sae_lens.synthetic")
    truth = synthetic.FeatureDictionary(config.n_planted, config.d_model, bias=True, seed=config.seed)
    rates = torch.linspace(config.p_max, config.p_min, config.n_planted)
    generator = synthetic.ActivationGenerator(config.n_planted, rates, std_firing_magnitudes=0.2)

    def sample(n: int, index: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # theirs draws from the global generator
            torch.manual_seed(1000 * config.seed + index)
            return generator.sample(n)

    return Planted(truth.feature_vectors.detach(), truth.bias.detach(), sample)


def compare(config: WorldsConfig) -> list[Row]:
    """The rows of both worlds, each with an SAE larger than it, and of ours with one that is smaller."""
    ours, theirs = our_world(config), their_world(config)
    rows: list[Row] = []
    for name, planted, size in (
        (f"Our planted world, {config.n_features} features", ours, config.n_features),
        (f"Their planted world, {config.n_features} features", theirs, config.n_features),
        (f"Our planted world, {config.short_size} features: fewer than planted", ours, config.short_size),
    ):
        rows += _compare_world(config, planted, _train(config, planted, size), name)
        print(name, flush=True)
    return rows


def _train(config: WorldsConfig, planted: Planted, size: int) -> LayerwiseSAE:
    active = (planted.sample(config.samples, -1) > 0).float().sum(1).mean().item()
    rule = BatchTopK(k=max(1, round(active)), momentum=0.9)
    bank = LayerwiseSAE(n_layers=1, d_model=config.d_model, n_features=size, sparsity=rule, seed=config.seed)

    def batches() -> Iterator[Tensor]:
        for index in range(config.steps):
            yield planted.hidden(planted.sample(config.batch, index))[:, None]

    train(bank, batches(), config=TrainConfig(steps=config.steps, learning_rate=config.learning_rate), quiet=True)
    return bank


@torch.no_grad()
def _compare_world(config: WorldsConfig, planted: Planted, bank: LayerwiseSAE, case: str) -> list[Row]:
    acts_TP = planted.sample(config.samples, -2)
    ours, theirs = _our_numbers(planted, bank, acts_TP), _their_numbers(planted, bank, acts_TP)
    smaller = bank.config.n_features < config.n_planted
    only_ours = "at cosine 0.9, one to one; theirs has no score of this kind"
    judged = (
        ("explained variance", "explained_variance", ""),
        ("L0 of the SAE", "sae_l0", ""),
        ("L0 of the truth", "true_l0", ""),
        ("dead features", "dead_latents", ""),
        ("shrinkage", "shrinkage", "mean over samples of the norm of the reconstruction over that of the input"),
        ("MCC, absolute cosine", "absolute_mcc", "their definition, by our code"),
        ("uniqueness", "uniqueness", "their definition, by our code"),
        ("precision as a detector", "precision", "their definition, by our code"),
        ("recall as a detector", "recall", "their definition, by our code"),
        ("F1 as a detector", "f1_score", "their definition, by our code"),
        ("accuracy as a detector", "accuracy", "their definition, by our code"),
    )
    rows = [Row(case=case, quantity=name, ours=ours[key], theirs=theirs[key], note=note) for name, key, note in judged]
    why = "ours divides by the planted features, theirs by the pairs" if smaller else "our definition against theirs"
    mcc = Row(
        case=case, quantity="MCC", ours=ours["mcc"], theirs=theirs["absolute_mcc"],
        expect="different" if smaller else "same", note=why,
    )  # fmt: skip
    shown = [
        Row(case=case, quantity=name, ours=ours[name], theirs=None, expect="shown", note=only_ours)
        for name in ("recall of directions", "precision of directions", "F1 of directions")
    ]
    return [mcc, *rows, *shown]


def _our_numbers(planted: Planted, bank: LayerwiseSAE, acts_TP: Tensor) -> dict[str, float]:
    hidden_TD = planted.hidden(acts_TP)
    measured = measure_dictionary(bank, [part[:, None] for part in hidden_TD.split(4096)])
    code = measured.code
    decoder_FD, truth_PD = bank.decoder[0].numpy(), planted.directions_PD.numpy()
    fires_F = measured.probability_F > 0
    assignment = recovery.assign(decoder_FD[:, None], truth_PD[:, None])
    recall = float(assignment.recalled_F.mean())
    precision = recovery.precision(assignment, len(decoder_FD))
    nearest_F = detection.nearest_planted(decoder_FD, truth_PD)
    truth = sparse.csr_array(acts_TP.numpy())
    scores = detection.score_detection(code, truth, nearest_F)
    norms = [x.norm(dim=1) for x in (bank(hidden_TD[:, None]).recon[:, 0], hidden_TD)]
    return {
        "explained_variance": measured.explained_variance,
        "sae_l0": code.nnz / len(acts_TP),
        "true_l0": truth.nnz / len(acts_TP),
        "dead_latents": float((~fires_F).sum()),
        "shrinkage": float((norms[0] / norms[1])[norms[1] > 1e-6].mean()),
        "mcc": recovery.mean_cosine(assignment),
        "absolute_mcc": detection.absolute_mcc(decoder_FD, truth_PD),
        "uniqueness": detection.uniqueness(nearest_F),
        "precision": scores.precision,
        "recall": scores.recall,
        "f1_score": scores.f1,
        "accuracy": scores.accuracy,
        "recall of directions": recall,
        "precision of directions": precision,
        "F1 of directions": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
    }


class _Replay(nn.Module):
    """Gives their evaluation the samples that ours saw."""

    def __init__(self, acts_TP: Tensor) -> None:
        super().__init__()
        self.acts_TP = acts_TP

    def sample(self, n: int) -> Tensor:
        """All samples; asked for once."""
        if n != len(self.acts_TP):
            raise ValueError(f"{n} samples asked for, expected all {len(self.acts_TP)} at once")
        return self.acts_TP


def _their_numbers(planted: Planted, bank: LayerwiseSAE, acts_TP: Tensor) -> dict[str, float]:
    sae_lens, synthetic = peer("sae_lens"), peer("sae_lens.synthetic")
    truth = synthetic.FeatureDictionary(*planted.directions_PD.shape, initializer=None)
    truth.feature_vectors.data, truth.bias.data = planted.directions_PD.clone(), planted.bias_D.clone()
    with tempfile.TemporaryDirectory() as folder:
        save_saelens(bank, Path(folder) / "sae")
        sae = sae_lens.SAE.load_from_disk(str(Path(folder) / "sae"))
    found: Any = synthetic.eval_sae_on_synthetic_data(sae, truth, _Replay(acts_TP), num_samples=len(acts_TP))
    flat = {**found.to_dict(), **found.to_dict()["classification"], "absolute_mcc": found.mcc}
    return {name: float(value) for name, value in flat.items() if isinstance(value, int | float | np.number)}


def notes(config: WorldsConfig) -> list[str]:
    """What a reader must know about these cases."""
    return [
        f"**Planted worlds**: {config.n_planted} features in {config.d_model} dimensions, firing with probability "
        f"{config.p_min} to {config.p_max}; BatchTopK with k the true L0, {config.steps} steps of {config.batch} by "
        f"our trainer; scored on {config.samples:,} samples that both sides see. Theirs: `eval_sae_on_synthetic_data`, "
        "`mean_correlation_coefficient`, and in the second world the features and the generator.",
        "",
    ]
