"""What a command would take, before any of it is done: parameters, bytes, disk. For `--dry-run`."""

from __future__ import annotations

from pathlib import Path

from crosscoder import cli
from crosscoder.commands import study_config, subject_config
from crosscoder.foundation.console import human_bytes
from crosscoder.studies import single as subject_study
from crosscoder.studies.budget import CLASSES, HAS_PENALTY, Arm, DictionaryBudget
from crosscoder.studies.cells import Cell
from crosscoder.studies.presets import StudyConfig
from crosscoder.studies.shapes import study_cells, study_joints

Needs = list[tuple[str, str]]


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
    from crosscoder.studies import planted

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
        (
            "verdicts",
            f"{command.verdicts} seeds of {len(config.verdict.plants)} planted answers, about 5 minutes a seed",
        ),
        ("writes", f"report.md, results.json and pictures, in a folder of {command.out}"),
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
    from crosscoder.data.shards import stored_source

    source = stored_source(folder, None, site, verify=False)  # ty: ignore[invalid-argument-type]
    return source.n_layers, source.d_model


def _study_needs(config: StudyConfig) -> Needs:
    cells, joints = study_cells(config), study_joints(config)
    rows: Needs = [
        ("text", config.subjects.text),
        ("training runs", str(len(config.subjects.runs()))),
        ("cells", str(len(cells) + len(joints))),
        ("dictionaries", str(sum(len(cell.seeds) for cell in [*cells, *joints]))),
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
    if joints:
        pair = [shape for name, shape in config.subjects.shapes().items() if name in ("A", "B")]
        layers, width = sum(shape.n_layers for shape in pair), max(shape.d_model for shape in pair)
        found = dictionary_needs("crosscoder", layers, width, joints[0].budget)
        rows += [(f"A and B, {label}", value) for label, value in found]
    kept = "kept" if config.keep_activations else "removed at the end"
    rows.append((f"activations on disk ({kept})", human_bytes(disk)))
    return rows
