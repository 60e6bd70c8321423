"""What each command of the console does: settings from the command line handed to the library's functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from crosscoder import cli
from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import say
from crosscoder.studies import single as subject_study
from crosscoder.studies.folder import study_folder
from crosscoder.studies.matched import OtherPartsError, Part
from crosscoder.studies.presets import PRESETS, StudyConfig
from crosscoder.studies.shapes import run_study
from crosscoder.studies.workers import default_workers

FOR_SUBJECT = ("layers", "blocks_path", "tokens")
FOR_STUDY = ("preset", "training_seeds", "joint", "part")


def _refuse_idle(command: cli.Compare, names: tuple[str, ...], instead: str) -> None:
    """Refuses settings that would change nothing."""
    usual = cli.Compare()
    idle = [f"--{name.replace('_', '-')}" for name in names if getattr(command, name) != getattr(usual, name)]
    if idle:
        raise ValueError(f"{', '.join(idle)} would change nothing here: {instead}")


def _dictionary_changes(command: cli.Compare) -> dict[str, Any]:
    names = ("steps", "n_features", "structure", "window", "bank")
    return {name: value for name in names if (value := getattr(command, name)) is not None}


def study_config(command: cli.Compare) -> StudyConfig:
    """The preset with the command's own settings put in.

    Raises:
        ValueError: a setting is given that only a single model has.
    """
    _refuse_idle(command, FOR_SUBJECT, "only a single model has that; name one with --subject")
    config = PRESETS[command.preset]
    budget = replace(config.dictionaries, **_dictionary_changes(command))
    config = replace(config, dictionaries=budget, seeds=command.seeds or config.seeds)
    if command.text is not None:
        config = replace(config, subjects=replace(config.subjects, text=command.text))
    if command.training_seeds is not None:
        config = replace(config, subjects=replace(config.subjects, seeds=command.training_seeds))
    return replace(config, joint=True) if command.joint else config


def subject_config(command: cli.Compare) -> subject_study.SubjectStudyConfig:
    """The single-model study that the command asks for.

    Raises:
        ValueError: a setting is given that only the study of several shapes has.
    """
    assert command.subject is not None
    _refuse_idle(command, FOR_STUDY, "only the study of several shapes has that; leave out --subject")
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
        from crosscoder.studies.synthetic import PRESETS as WORLDS

        worlds = replace(WORLDS[command.preset], verdicts=command.verdicts)
        return {"command": asdict(command), "study": to_mapping(worlds)}
    return asdict(command)


def compare(command: cli.Compare) -> None:
    """Run the study and print the path of its report."""
    from crosscoder.report.page import render_report

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
    from crosscoder.studies import synthetic as planted

    config = replace(planted.PRESETS[command.preset], verdicts=command.verdicts)
    folder = study_folder(config, f"synthetic-{command.preset}", command.out)
    workers = command.workers or default_workers(command.device)
    planted.run_synthetic(config, folder=folder, preset=command.preset, device=command.device, workers=workers)
    print(folder / "report.md")


def report(command: cli.Report) -> None:
    """Render results.json again."""
    from crosscoder.report.page import render_report
    from crosscoder.results.file import load_results

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
        shape = f"{store.n_tokens:,} tokens x {len(store.sites)} sites x {store.d_model}"
        say(f"{split}: {shape}; dropped {store.index.dropped}")
    print(command.out)


def train(command: cli.Train) -> None:
    """Train one dictionary on a store."""
    from crosscoder.data.shards import stored_source
    from crosscoder.studies.cells import new_dictionary

    source = stored_source(command.activations / "train", None, command.site)
    budget = command.budget
    dictionary = new_dictionary(command.arm, source, budget, seed=command.seed)
    result = budget.trainer(command.arm)(
        dictionary,
        source.batches(budget.batch, seed=budget.data_seed, steps=budget.steps),
        config=replace(budget.train_config(), checkpoint_every=command.checkpoint_every),
        folder=command.out,
        resume=command.resume,
        device=command.device,
        data_fingerprint=f"{source.fingerprint}/{budget.data_seed}",
    )
    last = result.metrics[-1]
    say(f"explained variance {last['explained_variance']:.4f}, L0 {last['l0']:.1f}, after {result.tokens:,} tokens")
    print(command.out / "dictionary")


def evaluate(command: cli.Evaluate) -> None:
    """Measure a dictionary and print the numbers as JSON."""
    from crosscoder.data.shards import ActivationShards
    from crosscoder.dictionary import load_dictionary
    from crosscoder.studies.cells import evaluate_dictionary

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
