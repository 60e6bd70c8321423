"""What a config would take before any work is done: parameters, bytes of memory and disk. For `--dry-run`."""

from __future__ import annotations

import math
from typing import Any

from crosscoder.data.stream import BLOCKS_PER_REFILL
from crosscoder.data.subject import locate
from crosscoder.data.world_pair import SIDES
from crosscoder.dictionary import DICTIONARIES, DictionaryConfig
from crosscoder.foundation.console import human_bytes
from crosscoder.studies.budget import CLASSES, HAS_PENALTY, Arm, DictionaryBudget
from crosscoder.studies.planted import PlantedConfig
from crosscoder.studies.presets import StudyConfig
from crosscoder.studies.shapes import study_cells
from crosscoder.studies.single import SubjectStudyConfig
from triton_kernels.cpu.encode import SLAB_ELEMENTS

Needs = list[tuple[str, str]]
Layers = tuple[int, ...] | None
ARMS: tuple[Arm, ...] = ("layerwise", "crosscoder")
VOCAB_SIZE = 512  # assumed for the embedding where no tokenizer is known yet


def dictionary_needs(arm: Arm, n_layers: int, d_model: int, budget: DictionaryBudget) -> Needs:
    """What training one dictionary takes."""
    batch, n_features = budget.batch, budget.n_features
    config = DictionaryConfig(n_layers=n_layers, d_model=d_model, **budget.settings(arm))
    shapes = DICTIONARIES[CLASSES[arm]].tensor_shapes(config)
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if name not in ("threshold", "input_scale")}
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
        (f"{arm}: encoder rounded to bf16, where that is fast", human_bytes(2 * sizes["encoder"])),
        (f"{arm}: active pairs", human_bytes(pairs * 12)),
        (f"{arm}: one checkpoint on disk", human_bytes(12 * parameters)),
    ]


def subject_needs(name: str, n_layers: int, d_model: int, n_checkpoints: int, vocab_size: int = VOCAB_SIZE) -> Needs:
    """What training one subject takes; the initial weights are kept beside the checkpoints."""
    matrices = 12 * n_layers * d_model**2
    total = matrices + vocab_size * d_model
    return [
        (f"{name}: parameters outside the embedding", f"about {matrices:,}"),
        (f"{name}: weights, gradients, optimiser", human_bytes(16 * total)),
        (f"{name}: {n_checkpoints + 1} checkpoints on disk", human_bytes(4 * total * (n_checkpoints + 1))),
    ]


def harvest_needs(subject: str, layers: Layers, reads: str, tokens: int, itemsize: int) -> Needs:
    """What storing a subject's activations takes; of the subject only the configuration is read."""
    n_sites, width = _sites_and_width(subject, layers, reads)
    return [
        ("sites", str(n_sites)),
        ("width", str(width)),
        ("tokens, at most", f"{tokens:,}"),
        ("disk, at most", human_bytes(tokens * n_sites * width * itemsize)),
    ]


def stream_needs(subject: str, layers: Layers, reads: str, n_blocks: int, context: int) -> tuple[Needs, int, int]:
    """What harvesting activations as training goes takes beside the dictionary, the number of sites and their width."""
    n_sites, width = _sites_and_width(subject, layers, reads)
    # A refill and its shuffled copy; the blocks that it is made of are freed before that.
    refill = 2 * 4 * min(BLOCKS_PER_REFILL, n_blocks) * context * n_sites * width
    return [("activations in memory", human_bytes(refill)), ("activations on disk", "none")], n_sites, width


def single_needs(config: SubjectStudyConfig) -> Needs:
    """What a study of one model takes; of the model only the configuration is read."""
    n_blocks, width = _blocks_and_width(config.subject)
    n_layers = len(config.layers) if config.layers is not None else n_blocks
    tokens = config.tokens_train + config.tokens_held_out
    states = 1 + config.untrained
    rows: Needs = [
        ("subject", config.subject),
        ("layers x width", f"{n_layers} x {width}"),
        ("tokens run through the subject", f"{tokens:,}"),
        ("activations on disk", human_bytes(4 * tokens * n_layers * width * states)),
        ("dictionaries, at most", str(2 * 2 * states * len(config.seeds))),
    ]
    for arm in ARMS:
        rows += dictionary_needs(arm, n_layers, width, config.dictionaries)
    return rows


def study_needs(config: StudyConfig) -> Needs:
    """What a study of several shapes takes."""
    cells = study_cells(config)
    rows: Needs = [
        ("text", config.subjects.text),
        ("training runs", str(len(config.subjects.runs()))),
        ("cells", str(len(cells))),
        ("dictionaries", str(sum(len(cell.seeds) for cell in cells))),
        ("steps of each, and tokens a step", f"{config.dictionaries.steps} x {config.dictionaries.batch}"),
    ]
    disk, shapes = 0, config.subjects.shapes()
    for name, shape in shapes.items():
        size = (shape.n_layers, shape.d_model)
        rows += subject_needs(f"subject {name}", *size, config.subjects.n_checkpoints, config.subjects.vocab_size)
        mains = [cell for cell in cells if cell.subject == name and cell.role == "main"]
        stores = {(cell.training_seed, cell.state) for cell in mains if cell.state != "shuffled"}
        tokens = len(stores) * (config.tokens_train + config.tokens_held_out)
        disk += tokens * (shape.n_layers + 1) * shape.d_model * 4
        for arm, budget in {cell.arm: cell.budget for cell in mains}.items():
            rows += [(f"{name}, {label}", value) for label, value in dictionary_needs(arm, *size, budget)]
    if joints := [cell for cell in cells if cell.other is not None]:
        pair = [shapes[name] for name in ("A", "B")]
        layers, width = sum(shape.n_layers for shape in pair), max(shape.d_model for shape in pair)
        found = dictionary_needs("crosscoder", layers, width, joints[0].budget)
        rows += [(f"A and B, {label}", value) for label, value in found]
    kept = "kept" if config.keep_activations else "removed at the end"
    return [*rows, (f"activations on disk ({kept})", human_bytes(disk))]


def planted_needs(config: PlantedConfig) -> Needs:
    """What a study of planted worlds takes."""
    world, fit = config.world, config.fit
    n_dictionaries = len(config.seeds) * (len(config.sizes) + len(config.bank_sizes)) + len(config.gammas) * len(SIDES)
    largest = max(*config.sizes, *config.bank_sizes, config.pair_size)
    width = world.n_layers * world.d_model
    planted = len(config.verdict.plants)
    return [
        ("world", f"{world.n_features} features, {world.n_layers} layers x {world.d_model}"),
        ("dictionaries", str(n_dictionaries)),
        ("steps of each, and tokens a step", f"{fit.steps} x {fit.batch}"),
        ("largest dictionary: weights, gradients, optimiser", human_bytes(32 * largest * width)),
        ("one batch and its truth", human_bytes(4 * fit.batch * (world.n_features + width))),
        ("verdicts", f"{config.verdicts} seeds of {planted} planted answers, about 5 minutes a seed"),
    ]


def _sites_and_width(subject: str, layers: Layers, reads: str) -> tuple[int, int]:
    n_blocks, width = _blocks_and_width(subject)
    n_sites = len(layers) if layers is not None else n_blocks + (reads == "residual")
    return n_sites * (2 if reads == "mlp" else 1), width


def _blocks_and_width(subject: str) -> tuple[int, int]:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(**locate(subject))
    return config.num_hidden_layers, config.hidden_size
