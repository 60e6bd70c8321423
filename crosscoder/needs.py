"""What a config would take before any work is done: parameters, bytes of memory and disk. For `--dry-run`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crosscoder.data.nulls import covariance_bytes
from crosscoder.data.order import SPREAD
from crosscoder.data.stream import HARVEST_TOKENS
from crosscoder.data.subject import load_config
from crosscoder.data.subject_training import SubjectConfig
from crosscoder.data.tokens import TokenBlocks
from crosscoder.data.world_pair import SIDES
from crosscoder.dictionary import DICTIONARIES, DictionaryConfig
from crosscoder.foundation.console import human_bytes, human_seconds
from crosscoder.studies.budget import CLASSES, HAS_PENALTY, Arm, DictionaryBudget
from triton_kernels.cpu.encode import SLAB_ELEMENTS

if TYPE_CHECKING:  # slow to import, and `--help` needs none of them
    from crosscoder.data.residuals import ResidualHarvester
    from crosscoder.studies.planted import PlantedConfig
    from crosscoder.studies.presets import StudyConfig
    from crosscoder.studies.single import SubjectStudyConfig

Needs = list[tuple[str, str]]
NOT_TIMED = ("time of all else (models, harvests, measuring)", "not estimated; a study tells it as it goes")
Layers = tuple[int, ...] | None
MEASURED_SECONDS = 2.0
"""What a dry run may take to time steps."""
MOST_PARAMETERS = 2**25
"""Of a dictionary that a dry run makes: with gradients and moments 512 MiB."""
MOST_PRODUCTS = 2e10
"""Of tokens and parameters, in a step that a dry run takes: about half a second of two cores."""
MOST_BYTES = 2**26
"""Of the weights of a model that a dry run loads."""
VOCAB_SIZE = 512  # assumed for the embedding where no tokenizer is known yet


def dictionary_needs(arm: Arm, n_layers: int, d_model: int, budget: DictionaryBudget, *, of: str = "") -> Needs:
    """What training one dictionary takes; `of` stands before each label."""
    batch, n_features = budget.batch, budget.n_features
    config = DictionaryConfig(n_layers=n_layers, d_model=d_model, **budget.settings(arm))
    form = DICTIONARIES[CLASSES[arm]]
    shapes, rows_of_token = form.tensor_shapes(config), math.prod(form.layout(config).rows_of_token)
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if name not in ("threshold", "input_scale")}
    parameters = sum(sizes.values())
    # Before a penalty has had its effect about half of all features are active.
    active = n_features // 2 if budget.selection in HAS_PENALTY else budget.k(arm)
    takes = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimiser (Adam moments)": 8 * parameters,
        "batch, reconstruction, gradient": 3 * 4 * batch * n_layers * d_model,
        "score slab (never all of [B, F])": 4 * min(SLAB_ELEMENTS, batch * n_features),
        "encoder rounded to bf16, where that is fast": 2 * sizes["encoder"],
        "active pairs": 12 * batch * active * rows_of_token,
        "one checkpoint on disk": 12 * parameters,
    }
    rows = [("parameters", f"{parameters:,}"), *((label, human_bytes(size)) for label, size in takes.items())]
    return [(f"{of}{arm}: {label}", value) for label, value in rows]


class Job(NamedTuple):
    """Dictionaries of one kind that are trained, `n` of them."""

    arm: Arm
    n_layers: int
    d_model: int
    budget: DictionaryBudget
    n: int = 1


def time_needs(jobs: Iterable[Job], *, workers: int | None = None, device: str = "cpu") -> Needs:
    """About how long training takes, by a few real steps of each kind on drawn numbers, of two seconds in all.

    workers: processes of one thread each, where a study has them. Dictionaries that read the same batches share work,
    and those with features to revive have more, so that it is no more than an estimate.
    """
    import torch

    kinds: dict[tuple[Arm, int, int, int], tuple[Job, int]] = {}
    for job in jobs:
        key = (job.arm, job.n_layers, job.d_model, job.budget.n(job.arm))
        first, steps = kinds.get(key, (job, 0))
        kinds[key] = first, steps + job.n * job.budget.steps
    total, threads = 0.0, torch.get_num_threads()
    label = f"time of {sum(steps for _, steps in kinds.values()):,} training steps of dictionaries"
    try:
        torch.set_num_threads(1 if workers else threads)
        for first, steps in kinds.values():
            seconds = step_seconds(first, MEASURED_SECONDS / len(kinds), device)
            if seconds is None:
                return [(label, f"not measured: that would take longer than {MEASURED_SECONDS:g} s")]
            total += steps * seconds / (workers or 1)
    finally:
        torch.set_num_threads(threads)
    return [(label, f"about {human_seconds(total)} (an estimate: a few real steps were timed)")]


def harvest_time(subject: str, load: Callable[[str], ResidualHarvester], tokens: TokenBlocks, n_tokens: int) -> Needs:
    """About how long a model takes to read so many tokens, by one call of it; of one that loads in a moment."""
    label, files = f"time of the harvest of {n_tokens:,} tokens", [*Path(subject).glob("*.safetensors")]
    if not files or sum(one.stat().st_size for one in files) > MOST_BYTES:
        return [(label, f"not measured: loading the model takes longer than {MEASURED_SECONDS:g} s")]
    harvester, ids_BS = load(subject), tokens[: max(1, HARVEST_TOKENS // tokens.sequence_length)]
    harvester.harvest(ids_BS[:1])
    started = time.perf_counter()
    harvester.harvest(ids_BS)
    rate = ids_BS.numel() / (time.perf_counter() - started)
    took = f"about {human_seconds(n_tokens / rate)} (an estimate: one call was timed, {rate:,.0f} tokens/s)"
    return [(label, took)]


def step_seconds(job: Job, most: float, device: str) -> float | None:
    """Seconds of a training step, the median of up to five in `most` seconds; None for one too large to try."""
    import torch

    from crosscoder.training.state import TrainState
    from crosscoder.training.step import take_step

    settings, batch = job.budget.settings(job.arm), job.budget.batch
    form: Any = DICTIONARIES[CLASSES[job.arm]]
    shapes = form.tensor_shapes(DictionaryConfig(n_layers=job.n_layers, d_model=job.d_model, **settings))
    n_parameters = sum(math.prod(shape) for shape in shapes.values())
    if n_parameters > MOST_PARAMETERS or batch * n_parameters > MOST_PRODUCTS:
        return None
    dictionary = form(n_layers=job.n_layers, d_model=job.d_model, **settings).to(device).train()
    state = TrainState.start(dictionary, precision=job.budget.precision, frozen=job.budget.frozen)
    x_BLD, config = torch.randn(batch, job.n_layers, job.d_model, device=device), job.budget.train_config()
    take_step(state, x_BLD[: max(1, batch // 16)], config, None)()  # the first compiles
    taken = list[float]()
    while len(taken) < 5 and sum(taken) < most:
        started = time.perf_counter()
        take_step(state, x_BLD, config, None)()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def subject_needs(name: str, config: SubjectConfig, vocab_size: int = VOCAB_SIZE) -> Needs:
    """What training one subject takes; the initial weights are kept beside the checkpoints."""
    matrices, kept = 12 * config.n_layers * config.d_model**2, config.n_checkpoints + 1
    total = matrices + vocab_size * config.d_model
    return [
        (f"{name}: parameters outside the embedding", f"about {matrices:,}"),
        (f"{name}: weights, gradients, optimiser", human_bytes(16 * total)),
        (f"{name}: {kept} checkpoints on disk", human_bytes(4 * total * kept)),
    ]


def harvest_needs(
    subject: str, layers: Layers, reads: str, tokens: int, itemsize: int, revision: str | None = None
) -> Needs:
    """What storing a subject's activations takes; of the subject only the configuration is read."""
    n_sites, width = _sites_and_width(subject, layers, reads, revision)
    disk = human_bytes(tokens * n_sites * width * itemsize)
    return [("sites", str(n_sites)), ("width", str(width)), ("tokens, at most", f"{tokens:,}"), ("disk, at most", disk)]


def stream_needs(
    subject: str, layers: Layers, reads: str, tokens: TokenBlocks, window_tokens: int, revision: str | None = None
) -> tuple[Needs, int, int]:
    """What harvesting activations as training goes takes beside the dictionary, the number of sites and their width."""
    n_sites, width = _sites_and_width(subject, layers, reads, revision)
    blocks = min(max(1, window_tokens // tokens.sequence_length), len(tokens))
    window = 4 * blocks * tokens.sequence_length * n_sites * width
    call = 4 * max(HARVEST_TOKENS, tokens.sequence_length) * n_sites * width
    rows = [
        ("activations in memory, at most", human_bytes(window + 3 * window // SPREAD)),
        ("one call of the model, all sites", human_bytes(call)),
        ("activations on disk", "none"),
    ]
    return rows, n_sites, width


def gaussian_needs(n_layers: int, d_model: int) -> Needs:
    """What a Gaussian in the place of the activations takes, once; a ValueError where that is too much."""
    return [("covariance and its root, at most", human_bytes(covariance_bytes(n_layers, d_model)))]


def single_needs(config: SubjectStudyConfig, workers: int, device: str) -> Needs:
    """What a study of one model takes; of the model only the configuration is read."""
    n_sites, width = _sites_and_width(config.subject, config.layers, revision=config.loading.revision)
    n_layers = n_sites - (config.layers is None)  # all blocks, without the embedding
    tokens, states = config.tokens_train + config.tokens_held_out, 1 + ("untrained" in config.nulls)
    rows: Needs = [
        ("subject", config.subject),
        ("layers x width", f"{n_layers} x {width}"),
        ("tokens run through the subject", f"{tokens:,}"),
        ("activations on disk", "none" if config.stream else human_bytes(4 * tokens * n_layers * width * states)),
        ("dictionaries, at most", str(2 * 2 * states * len(config.seeds))),
    ]
    for arm in CLASSES:
        rows += dictionary_needs(arm, n_layers, width, config.dictionaries)
    jobs = [Job(arm, n_layers, width, config.dictionaries, 2 * states * len(config.seeds)) for arm in CLASSES]
    return [*rows, *time_needs(jobs, workers=workers, device=device), NOT_TIMED]


def study_needs(config: StudyConfig, workers: int, device: str) -> Needs:
    """What a study of several shapes takes."""
    from crosscoder.studies.shapes import dictionary_cells

    cells = dictionary_cells(config)
    rows: Needs = [
        ("text", config.subjects.text),
        ("training runs", str(len(config.subjects.runs()))),
        ("cells", str(len(cells))),
        ("dictionaries", str(sum(cell.n_dictionaries for cell in cells))),
        ("steps of each, and tokens a step", f"{config.dictionaries.steps} x {config.dictionaries.batch}"),
    ]
    disk, shapes = 0, config.subjects.shapes()
    for name, shape in shapes.items():
        rows += subject_needs(f"subject {name}", config.subjects.runs()[name, 0], config.subjects.vocab_size)
        mains = [cell for cell in cells if cell.subject == name and cell.role == "main"]
        runs = sum(run == name for run, _ in config.subjects.runs())
        stores = {cell.read for cell in mains} or range(runs)
        tokens = len(stores) * (config.tokens_train + config.tokens_held_out)
        disk += 4 * tokens * (shape.n_layers + 1) * shape.d_model
        for arm, budget in {cell.arm: cell.budget for cell in mains}.items():
            rows += dictionary_needs(arm, shape.n_layers, shape.d_model, budget, of=f"{name}, ")
    kept = "kept" if config.keep_activations else "removed at the end"
    rows.append(("activations on disk", "none" if config.stream else f"{human_bytes(disk)}, {kept}"))
    parts = [(part, shapes[part.subject]) for cell in cells for part in cell.sweep]
    jobs = [Job(part.arm, of.n_layers, of.d_model, part.budget, len(part.seeds)) for part, of in parts]
    return [*rows, *time_needs(jobs, workers=workers, device=device), NOT_TIMED]


def planted_needs(config: PlantedConfig) -> Needs:
    """What a study of planted worlds takes."""
    world, fit = config.world, config.fit
    n_dictionaries = len(config.seeds) * (len(config.sizes) + len(config.bank_sizes)) + len(config.gammas) * len(SIDES)
    largest = max(*config.sizes, *config.bank_sizes, config.pair_size)
    width = world.n_layers * world.d_model
    return [
        ("world", f"{world.n_features} features, {world.n_layers} layers x {world.d_model}"),
        ("dictionaries", str(n_dictionaries)),
        ("steps of each, and tokens a step", f"{fit.steps} x {fit.batch}"),
        ("largest dictionary: weights, gradients, optimiser", human_bytes(32 * largest * width)),
        ("one batch and its truth", human_bytes(4 * fit.batch * (world.n_features + width))),
    ]


def _sites_and_width(
    subject: str, layers: Layers, reads: str = "residual", revision: str | None = None
) -> tuple[int, int]:
    config = load_config(subject, revision).get_text_config(decoder=True)
    n_sites = len(layers) if layers is not None else config.num_hidden_layers + (reads == "residual")
    return n_sites * (2 if reads == "mlp" else 1), config.hidden_size
