"""Neuronpedia's bulk files: features and examples as gzipped JSON lines, a folder for each source.

    {model}/{layer}-{set}/{release,model,sourceset,source}.jsonl
    {model}/{layer}-{set}/{features,activations}/batch-N.jsonl.gz

A source is one layer. A crosscoder's layers are sources that share their features' numbers and examples, each with its
own decoder row. Tokens that a row promotes are those of `row @ unembedding`, as SAEDashboard has them: without the gain
of the final norm.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from crosscoder.dictionary import Dictionary
from crosscoder.formats.activity import Activity
from crosscoder.foundation.console import Progress
from crosscoder.measure.labels import decode
from crosscoder.measure.rows import FeatureRows

BATCH = 256
"""Features of a file."""
WIDEST = 128
"""Tokens of an example, at most."""
N_EXAMPLES, N_TOKENS, BINS = 20, 10, 40
"""Strongest examples of a feature, of different blocks; tokens that it promotes, and suppresses; of histograms."""
LOGIT_BYTES = 2**26
TOP = (-1, -1)
"""`binMin` and `binContains` of examples that are the strongest, not of a band of activations."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
UNKNOWN: dict[str, Any] = {
    f"{group}_{name}": []
    for group, names in {
        "neuron_alignment": ("indices", "values", "l1"),
        "correlated_neurons": ("indices", "pearson", "l1"),
        "correlated_features": ("indices", "pearson", "l1"),
    }.items()
    for name in names
}


@dataclass(frozen=True, kw_only=True)
class Release:
    """How it is called there. model: Neuronpedia's name of it; set_name: of these sources, without a layer."""

    model: str
    set_name: str = "crosscoder"
    creator: str = ""
    creator_id: str = ""
    """Of the account that imports it; can be filled in later."""
    dataset: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "set_name"):
            if not NAME.fullmatch(value := getattr(self, name)):
                raise ValueError(f"{name} is {value!r}; expected letters, digits, '.', '_' and '-'")


@dataclass(frozen=True)
class _Source:
    """One layer: its block, what its features write in the model's units, and where they are active."""

    block: int
    rows_FD: Tensor
    activity: Activity


def unembedding(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a model's output head makes of rows `[n, D]`, without its bias: `[n, V]`."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(head, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} has no output head, so features promote no tokens")
    return lambda rows_nD: (rows_nD.to(head.weight.device).float() @ head.weight.float().T).cpu()


@torch.no_grad()
def save_neuronpedia(
    dictionary: Dictionary,
    activities: Sequence[Activity],
    folder: str | Path,
    release: Release,
    *,
    tokenizer: Any,
    unembed: Callable[[Tensor], Tensor],
) -> list[Path]:
    """Write the folder of every source to `folder`/<model>/, each whole or not at all, and say where they are.

    activities: as `collect_activity` gives them.

    Raises:
        ValueError: the dictionary does not read a residual stream behind blocks.
        FileExistsError: such a source is there already.
    """
    reads = dictionary.reads
    if reads is None or reads.site != "residual" or 0 in reads.sites:
        raise ValueError(
            f"Neuronpedia's sources are of residual streams behind blocks; this reads {reads or 'no record'}"
        )
    rows_LFD = _rows(dictionary)
    own = activities if len(activities) > 1 else list(activities) * len(rows_LFD)
    parts = zip(reads.sites, rows_LFD, own, strict=True)
    sources = [_Source(site - 1, rows_FD, activity) for site, rows_FD, activity in parts]
    parent = Path(folder) / release.model
    finals = [parent / f"{source.block}-{release.set_name}" for source in sources]
    if there := next((final for final in finals if final.exists()), None):
        raise FileExistsError(f"{there} exists; choose another folder or name, or move it away")
    parent.mkdir(parents=True, exist_ok=True)
    texts = _Texts(len(tokenizer), functools.cache(lambda one: decode(tokenizer, [one])))
    for source, final in zip(sources, finals, strict=True):
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{final.name}-", dir=parent))
        try:
            _write(source, temporary, release, texts, unembed)
            temporary.chmod(0o755)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return finals


def _rows(dictionary: Dictionary) -> Tensor:
    """What each feature writes to each layer, or of a bank to its own, in the model's units, `[L, F, D]`."""
    rows_FKD = FeatureRows.of(dictionary).decoder_FKD
    _, n_rows, width = rows_FKD.shape
    rows_LFD = rows_FKD.transpose(0, 1) if n_rows > 1 else rows_FKD.view(dictionary.config.n_layers, -1, width)
    return rows_LFD / dictionary.input_scale.view(-1, 1, 1)


class _Texts(NamedTuple):
    n_vocabulary: int
    one: Callable[[int], str]

    def of(self, ids: Sequence[int]) -> list[str]:
        return [self.one(number) for number in ids]


def _write(source: _Source, folder: Path, release: Release, texts: _Texts, unembed: Any) -> None:
    source_id, activity = f"{source.block}-{release.set_name}", source.activity
    now = time.strftime("%Y-%m-%dT%H:%M:%S")
    common = {"creatorId": release.creator_id, "createdAt": now}
    for name, table in _tables(source, release, source_id, now).items():
        (folder / f"{name}.jsonl").write_text(json.dumps({**table, **common}) + "\n")
    examples = _examples(activity)
    with Progress(f"source {source_id}", activity.n_features, unit="features") as progress:
        for number, start in enumerate(range(0, activity.n_features, BATCH)):
            rows_nD = source.rows_FD[start : start + BATCH]
            features, activations = list[dict[str, Any]](), list[dict[str, Any]]()
            for index, (row_D, effect_V) in enumerate(_effects(rows_nD, unembed, texts.n_vocabulary), start):
                values, chosen = next(examples)
                feature = {"modelId": release.model, "layer": source_id, "index": str(index), **common}
                features.append({**feature, **_feature(source, row_D, effect_V, values, texts)})
                activations += [{**feature, **_activation(*one, texts, (source_id, index))} for one in chosen]
            for name, lines in (("features", features), ("activations", activations)):
                (folder / name).mkdir(exist_ok=True)
                content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
                (folder / name / f"batch-{number}.jsonl.gz").write_bytes(gzip.compress(content, 5, mtime=0))
            progress.advance(len(rows_nD))


def _tables(source: _Source, release: Release, source_id: str, now: str) -> dict[str, dict[str, Any]]:
    """The single lines that say what the release, the model, the set and the source are."""
    tokens_BS, name = source.activity.tokens_BS, release.set_name
    tables: dict[str, dict[str, Any]] = {
        "release": {
            "name": name,
            "description": name,
            "descriptionShort": name,
            "urls": [],
            "creatorName": release.creator,
            "creatorNameShort": release.creator,
        },
        "model": {
            "id": release.model,
            "displayName": release.model,
            "displayNameShort": release.model,
            "instruct": release.model.endswith("-it"),
            "updatedAt": now,
        },
        "sourceset": {
            "modelId": release.model,
            "name": name,
            "releaseName": name,
            "description": name,
            "hasDashboards": True,
            "creatorName": release.creator,
        },
        "source": {
            "id": source_id,
            "modelId": release.model,
            "setName": name,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "num_prompts": len(tokens_BS),
            "num_tokens_in_prompt": tokens_BS.shape[1],
            "dataset": release.dataset,
        },
    }
    return {name: {**table, "visibility": "PUBLIC"} for name, table in tables.items()}


def _effects(rows_nD: Tensor, unembed: Any, n_vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each row with what it adds to the logits of the tokens that are text."""
    step = max(1, LOGIT_BYTES // (4 * n_vocabulary))
    for part_nD in rows_nD.split(step):
        yield from zip(part_nD.float().cpu(), unembed(part_nD)[:, :n_vocabulary], strict=True)


def _feature(source: _Source, row_D: Tensor, effect_V: Tensor, values: np.ndarray, texts: _Texts) -> dict[str, Any]:
    largest, n_read = float(values.max(initial=0)), max(1, int(source.activity.read_BS.sum()))
    up, down = (effect_V.topk(min(N_TOKENS, len(effect_V)), largest=most) for most in (True, False))
    logits, frequencies = _histogram(effect_V.numpy()), _histogram(values)
    return {
        "maxActApprox": largest,
        "hasVector": bool(row_D.any()),  # a causal crosscoder's features leave layers out
        "vector": _rounded(row_D.numpy()) if bool(row_D.any()) else [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": largest,
        "hookName": f"blocks.{source.block}.hook_resid_post",
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
        **UNKNOWN,
        "neg_str": texts.of(down.indices.tolist()),
        "neg_values": _rounded(down.values.numpy()),
        "pos_str": texts.of(up.indices.tolist()),
        "pos_values": _rounded(up.values.numpy()),
        "frac_nonzero": len(values) / n_read,
        "freq_hist_data_bar_heights": frequencies[0],
        "freq_hist_data_bar_values": frequencies[1],
        "logits_hist_data_bar_heights": logits[0],
        "logits_hist_data_bar_values": logits[1],
        "decoder_weights_dist": [],
    }


def _histogram(values: np.ndarray) -> tuple[list[int], list[float]]:
    """Counts, and the middle of each bin; empty where there is nothing to count."""
    if not len(values):
        return [], []
    counts, edges = np.histogram(values, bins=BINS)
    return counts.tolist(), _rounded((edges[:-1] + edges[1:]) / 2)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


Example = tuple[list[int], list[float], int, int]
"""Tokens around the place where a feature is strongest in a block, its activation at each, that place, the block."""


def _examples(activity: Activity) -> Iterator[tuple[np.ndarray, list[Example]]]:
    """All activations of each feature, and its strongest examples, the strongest first, in the order of features."""
    order = np.argsort(activity.feature_P, kind="stable")
    ends = np.searchsorted(activity.feature_P[order], np.arange(activity.n_features + 1))
    ids_BS = activity.tokens_BS.numpy()
    width = min(WIDEST, ids_BS.shape[1])
    for start, stop in pairwise(ends):
        mine = order[start:stop]
        sequence, position, value = activity.sequence_P[mine], activity.position_P[mine], activity.value_P[mine]
        strongest = np.lexsort((position, sequence, -value))
        _, first = np.unique(sequence[strongest], return_index=True)
        found = []
        for peak in strongest[np.sort(first)[:N_EXAMPLES]]:
            block = int(sequence[peak])
            begin = int(np.clip(position[peak] - width // 2, 0, ids_BS.shape[1] - width))
            inside = np.zeros(width, dtype=np.float32)
            here = (sequence == block) & (position >= begin) & (position < begin + width)
            inside[position[here] - begin] = value[here]
            ids = ids_BS[block, begin : begin + width].tolist()
            found.append((ids, _rounded(inside), int(position[peak]) - begin, block))
        yield value, found


def _activation(
    ids: list[int], values: list[float], peak: int, block: int, texts: _Texts, of: tuple[str, int]
) -> dict[str, Any]:
    digest = hashlib.sha256(f"{of} {block} {peak}".encode()).hexdigest()
    return {
        "id": f"c{digest[:24]}",
        "tokens": texts.of(ids),
        "maxValue": max(values),
        "maxValueTokenIndex": peak,
        "minValue": min(values),
        "values": values,
        "dataIndex": None,
        "dataSource": None,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": [],
        "logitContributions": None,
        "binMin": TOP[0],
        "binMax": max(values),
        "binContains": TOP[1],
        "qualifyingTokenIndex": peak,
    }
