"""What each command of the console does: settings from the command line handed to the library's functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from crosscoder import cli
from crosscoder.experiments import subject_study
from crosscoder.experiments.aspect_ratio import run_study, study_cells
from crosscoder.experiments.budget import CLASSES, HAS_PENALTY, Arm, DictionaryBudget
from crosscoder.experiments.cells import Cell
from crosscoder.experiments.matched import OtherPartsError, Part
from crosscoder.experiments.presets import PRESETS, StudyConfig
from crosscoder.experiments.stages import study_folder
from crosscoder.experiments.workers import default_workers
from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import human_bytes, say

Needs = list[tuple[str, str]]


def _dictionary_changes(command: cli.Compare) -> dict[str, Any]:
    names = ("steps", "n_features", "structure", "window", "bank")
    return {name: value for name in names if (value := getattr(command, name)) is not None}


def study_config(command: cli.Compare) -> StudyConfig:
    """The preset with the command's own settings put in."""
    config = PRESETS[command.preset]
    budget = replace(config.dictionaries, **_dictionary_changes(command))
    config = replace(config, dictionaries=budget, seeds=command.seeds or config.seeds)
    if command.text is not None:
        config = replace(config, subjects=replace(config.subjects, text=command.text))
    if command.training_seeds is not None:
        config = replace(config, subjects=replace(config.subjects, seeds=command.training_seeds))
    return replace(config, joint=True) if command.joint else config


def subject_config(command: cli.Compare) -> subject_study.SubjectStudyConfig:
    """The single-model study that the command asks for."""
    assert command.subject is not None
    base = subject_study.SubjectStudyConfig(subject=command.subject)
    budget = replace(base.dictionaries, **_dictionary_changes(command))
    given = {
        "text": command.text,
        "layers": command.layers,
        "blocks_path": command.blocks_path,
        "tokens_train": command.tokens,
        "seeds": command.seeds,
    }
    return replace(base, dictionaries=budget, **{key: value for key, value in given.items() if value is not None})


def resolved_config(command: cli.Command) -> Any:
    """The settings that a command would run with, as JSON values."""
    if isinstance(command, cli.Compare):
        study = subject_config(command) if command.subject else study_config(command)
        return {"command": asdict(command), "study": to_mapping(study)}
    if isinstance(command, cli.Synthetic):
        from crosscoder.experiments.synthetic import PRESETS as WORLDS

        worlds = replace(WORLDS[command.preset], verdicts=command.verdicts)
        return {"command": asdict(command), "study": to_mapping(worlds)}
    return asdict(command)


def compare(command: cli.Compare) -> None:
    """Run the study and print the path of its report."""
    from crosscoder.analysis.report import render_report

    workers = command.workers or default_workers(command.device)
    if command.subject is not None:
        config = subject_config(command)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(command.subject).stem)
        folder = study_folder(config, f"subject-{name}", command.out)
        say(f"study folder: {folder}")
        results = subject_study.run_subject_study(config, folder=folder, device=command.device, workers=workers)
    else:
        config = study_config(command)
        folder = study_folder(config, command.preset, command.out)
        say(f"study folder: {folder}")
        part = Part(*command.part)
        try:
            results = run_study(
                config, folder=folder, preset=command.preset, device=command.device, workers=workers, part=part
            )
        except OtherPartsError as left:
            say(f"{left}; when all are done, run once more without --part")
            print(folder)
            return
    path = render_report(results, folder)
    for sentence in results["counts"]["answer"]:
        say(sentence)
    print(path)


def synthetic(command: cli.Synthetic) -> None:
    """Run the planted worlds and print the path of their report."""
    from crosscoder.experiments import synthetic as planted

    config = replace(planted.PRESETS[command.preset], verdicts=command.verdicts)
    folder = study_folder(config, f"synthetic-{command.preset}", command.out)
    workers = command.workers or default_workers(command.device)
    planted.run_synthetic(config, folder=folder, preset=command.preset, device=command.device, workers=workers)
    print(folder / "report.md")


def report(command: cli.Report) -> None:
    """Render results.json again."""
    from crosscoder.analysis.report import load_results, render_report

    print(render_report(load_results(command.folder), command.folder))


def prepare(command: cli.Prepare) -> None:
    """Write token blocks and say what they are."""
    from crosscoder.data.prepared import prepare_tokens
    from crosscoder.data.subject import load_subject

    tokenizer = load_subject(command.subject).tokenizer if command.subject else None
    prepared = prepare_tokens(
        command.text,
        tokenizer=tokenizer,
        vocab_size=None if tokenizer else command.vocab_size,
        sequence_length=command.context,
        held_out_fraction=command.held_out_fraction,
        max_documents=command.max_documents,
        seed=command.seed,
    )
    prepared.save(command.out)
    say(
        f"{prepared.train.n_tokens:,} training and {prepared.held_out.n_tokens:,} held-out tokens in blocks of "
        f"{command.context}; fingerprint {prepared.train.fingerprint[:12]}"
    )
    print(command.out)


def train_subject(command: cli.TrainSubject) -> None:
    """Train a subject and say where its checkpoints are and how good they are."""
    from crosscoder.data import subject_training
    from crosscoder.data.prepared import PreparedTokens

    prepared = PreparedTokens.load(command.tokens_folder)
    config = subject_training.SubjectConfig(
        n_layers=command.n_layers,
        d_model=command.d_model,
        context=prepared.train.sequence_length,
        tokens=command.tokens,
        batch=command.batch,
        learning_rate=command.learning_rate,
        n_checkpoints=command.n_checkpoints,
        seed=command.seed,
    )
    run = subject_training.train_subject(
        config, prepared.train, prepared.held_out, folder=command.out, device=command.device
    )
    for checkpoint in run.checkpoints:
        say(f"{checkpoint.folder:<12} {checkpoint.tokens:>12,} tokens  {checkpoint.held_out_loss:.4f} nats/token")
    print(command.out / run.checkpoints[-1].folder)


def harvest(command: cli.Harvest) -> None:
    """Write the subject's activations for training and held-out text."""
    from crosscoder.data.residuals import ResidualHarvester
    from crosscoder.data.shards import write_shards
    from crosscoder.data.subject import load_model
    from crosscoder.data.tokens import TokenBlocks

    model = load_model(command.subject, device=command.device)
    harvester = ResidualHarvester(model, layers=command.layers, blocks_path=command.blocks_path, reads=command.reads)
    for split, most in (("train", command.max_tokens), ("held_out", command.max_held_out_tokens)):
        blocks = TokenBlocks.load(command.tokens_folder / split)
        store = write_shards(
            harvester,
            blocks,
            command.out / split,
            dtype=command.dtype,
            max_tokens=most,
            metadata={"subject": command.subject},
            quiet=False,
        )
        shape = f"{store.n_tokens:,} tokens x {store.n_layers} sites x {store.d_model}"
        say(f"{split}: {shape}; dropped {store.index.dropped}")
    print(command.out)


def train(command: cli.Train) -> None:
    """Train one dictionary on a store."""
    from crosscoder.data.shards import ActivationShards
    from crosscoder.experiments.cells import new_dictionary

    store = ActivationShards.load(command.activations / "train")
    view = store.view(command.site)
    budget = command.budget
    dictionary = new_dictionary(command.arm, view, budget, seed=command.seed)

    def batches(start: int) -> Iterator[Any]:
        return (view.batch(index, budget.batch, budget.data_seed) for index in range(start, budget.steps))

    result = budget.trainer(command.arm)(
        dictionary,
        batches,
        config=replace(budget.train_config(), checkpoint_every=command.checkpoint_every),
        folder=command.out,
        resume=command.resume,
        device=command.device,
        data_fingerprint=f"{store.fingerprint}/{command.site}/{budget.data_seed}",
    )
    last = result.metrics[-1]
    say(f"explained variance {last['explained_variance']:.4f}, L0 {last['l0']:.1f}, after {result.tokens:,} tokens")
    print(command.out / "dictionary")


def evaluate(command: cli.Evaluate) -> None:
    """Measure a dictionary and print the numbers as JSON."""
    from crosscoder.data.shards import ActivationShards
    from crosscoder.dictionary import load_dictionary
    from crosscoder.experiments.cells import evaluate_dictionary

    dictionary = load_dictionary(command.dictionary).to(command.device)
    held_out = ActivationShards.load(command.activations / "held_out")
    numbers = evaluate_dictionary(dictionary, held_out, site=command.site, device=command.device)
    text = json.dumps(numbers, indent=2)
    if command.out is not None:
        write_json(command.out, numbers)
    print(text)


ACTIONS: dict[type, Callable[[Any], None]] = {
    cli.Prepare: prepare,
    cli.TrainSubject: train_subject,
    cli.Harvest: harvest,
    cli.Train: train,
    cli.Evaluate: evaluate,
    cli.Compare: compare,
    cli.Synthetic: synthetic,
    cli.Report: report,
}


def dictionary_needs(arm: Arm, n_layers: int, d_model: int, budget: DictionaryBudget) -> Needs:
    """What training one dictionary takes, from its shape and rule alone."""
    from crosscoder.dictionary import DICTIONARIES, DictionaryConfig
    from triton_kernels.cpu.encode import SLAB_ELEMENTS

    batch, n_features = budget.batch, budget.n_features
    config = DictionaryConfig(n_layers=n_layers, d_model=d_model, **budget.settings(arm))
    shapes = DICTIONARIES[CLASSES[arm]].tensor_shapes(config)
    sizes = {name: _product(shape) for name, shape in shapes.items() if name not in ("threshold", "input_scale")}
    parameters = sum(sizes.values())
    # Before a penalty has had its effect about half of all features are active.
    active = n_features // 2 if budget.selection in HAS_PENALTY else budget.k(arm)
    pairs = batch * active * (1 if arm == "crosscoder" else n_layers)
    return [
        (f"{arm}: parameters", f"{parameters:,}"),
        (f"{arm}: weights", human_bytes(4 * parameters)),
        (f"{arm}: gradients", human_bytes(4 * parameters)),
        (f"{arm}: optimiser (Adam moments)", human_bytes(8 * parameters)),
        (f"{arm}: batch, reconstruction, gradient", human_bytes(3 * 4 * batch * n_layers * d_model)),
        (f"{arm}: score slab (never all of [B, F])", human_bytes(4 * min(SLAB_ELEMENTS, batch * n_features))),
        (f"{arm}: encoder rounded to bf16, where that is fast", human_bytes(2 * _product(shapes["encoder"]))),
        (f"{arm}: active pairs", human_bytes(pairs * 12)),
        (f"{arm}: one checkpoint on disk", human_bytes(12 * parameters)),
    ]


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def needs(command: cli.Command) -> Needs:
    """What a command would take, before any of it is done."""
    match command:
        case cli.Prepare():
            return [("text", command.text), ("writes", f"{command.out} (4 bytes a token)")]
        case cli.TrainSubject():
            return _subject_needs("subject", command.n_layers, command.d_model, None, command.n_checkpoints)
        case cli.Harvest():
            return _harvest_needs(command)
        case cli.Train():
            store = _stored_shape(command.activations / "train", command.site)
            return dictionary_needs(command.arm, *store, command.budget)
        case cli.Evaluate():
            return [
                ("reads", f"{command.dictionary}, {command.activations}"),
                ("writes", str(command.out or "nothing")),
            ]
        case cli.Compare() if command.subject is not None:
            return subject_study.study_needs(subject_config(command), dictionary_needs)
        case cli.Compare():
            return _study_needs(study_config(command))
        case cli.Synthetic():
            return _synthetic_needs(command)
        case cli.Report():
            return [("reads", str(command.folder / "results.json")), ("writes", str(command.folder / "report.html"))]


def _synthetic_needs(command: cli.Synthetic) -> Needs:
    from crosscoder.experiments import synthetic as planted

    config = planted.PRESETS[command.preset]
    world = config.world
    n_pairs = len(config.gammas) * len(planted.SIDES)
    n_dictionaries = len(config.seeds) * (len(config.sizes) + len(config.bank_sizes)) + n_pairs
    largest = max(*config.sizes, *config.bank_sizes, config.pair_size)
    width = world.n_layers * world.d_model
    return [
        ("world", f"{world.n_features} features, {world.n_layers} layers x {world.d_model}"),
        ("dictionaries", str(n_dictionaries)),
        ("steps of each, and tokens a step", f"{config.fit.steps} x {config.fit.batch}"),
        ("largest dictionary: weights, gradients, optimiser", human_bytes(32 * largest * width)),
        ("one batch and its truth", human_bytes(4 * config.fit.batch * (world.n_features + width))),
        ("verdicts", f"{command.verdicts} seeds of {len(config.verdict.plants)} planted answers, 3 minutes a seed"),
        ("writes", f"report.md, results.json and recovery.png, in a folder of {command.out}"),
    ]


def _subject_needs(name: str, n_layers: int, d_model: int, vocab_size: int | None, kept: int) -> Needs:
    matrices = 12 * n_layers * d_model**2
    embedding = (vocab_size or 512) * d_model
    total = matrices + embedding
    return [
        (f"{name}: parameters outside the embedding", f"about {matrices:,}"),
        (f"{name}: weights, gradients, optimiser", human_bytes(16 * total)),
        (f"{name}: {kept + 1} checkpoints on disk", human_bytes(4 * total * (kept + 1))),
    ]


def _harvest_needs(command: cli.Harvest) -> Needs:
    from transformers import AutoConfig

    from crosscoder.data.subject import locate

    config = AutoConfig.from_pretrained(**locate(command.subject))
    n_all = config.num_hidden_layers + (command.reads == "residual")
    sites = len(command.layers) if command.layers is not None else n_all
    sites *= 2 if command.reads == "mlp" else 1
    tokens = command.max_tokens + command.max_held_out_tokens
    itemsize = 4 if command.dtype == "float32" else 2
    return [
        ("sites", str(sites)),
        ("width", str(config.hidden_size)),
        ("tokens, at most", f"{tokens:,}"),
        ("disk, at most", human_bytes(tokens * sites * config.hidden_size * itemsize)),
    ]


def _stored_shape(folder: Path, site: str) -> tuple[int, int]:
    from crosscoder.data.shards import ActivationShards

    view = ActivationShards.load(folder, verify=False).view(site)  # ty: ignore[invalid-argument-type]
    return view.n_layers, view.d_model


def _study_needs(config: StudyConfig) -> Needs:
    cells = study_cells(config)
    rows: Needs = [
        ("text", config.subjects.text),
        ("training runs", str(len(config.subjects.runs()))),
        ("cells", str(len(cells))),
        ("dictionaries", str(sum(len(cell.seeds) for cell in cells))),
        ("steps of each, and tokens a step", f"{config.dictionaries.steps} x {config.dictionaries.batch}"),
    ]
    disk = 0
    for name, shape in config.subjects.shapes().items():
        rows += _subject_needs(
            f"subject {name}",
            shape.n_layers,
            shape.d_model,
            config.subjects.vocab_size,
            config.subjects.n_checkpoints,
        )
        mains = [cell for cell in cells if cell.subject == name and cell.role == "main"]
        stores = {(cell.training_seed, cell.state) for cell in mains if cell.state != "shuffled"}
        tokens = len(stores) * (config.tokens_train + config.tokens_held_out)
        disk += tokens * (shape.n_layers + 1) * shape.d_model * 4
        for arm in dict.fromkeys(cell.arm for cell in mains):
            cell: Cell = next(cell for cell in mains if cell.arm == arm)
            found = dictionary_needs(cell.arm, shape.n_layers, shape.d_model, cell.budget)
            rows += [(f"{name}, {label}", value) for label, value in found]
    kept = "kept" if config.keep_activations else "removed at the end"
    rows.append((f"activations on disk ({kept})", human_bytes(disk)))
    return rows
