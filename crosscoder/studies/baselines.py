"""What each subject of a study has to beat, measured at the checkpoint that the study uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.data.residuals import find_blocks
from crosscoder.data.subject_training import SubjectConfig, SubjectRun, load_checkpoint
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.measure.baselines import ngram_losses, seen_blocks, token_lookup
from crosscoder.measure.welch import FEWEST_DOCUMENTS
from crosscoder.results.table import Place, Row
from crosscoder.studies.folder import StudyFolder
from crosscoder.studies.presets import Run

LOSS_BLOCKS = 256  # held-out blocks on which losses are compared, about
LOOKUP_BLOCKS = (512, 128)  # of training, for the means of each token, and held out: so many are of most documents


def evenly(blocks: TokenBlocks, most: int) -> TokenBlocks:
    """Evenly spread blocks, at least `most` where there are as many."""
    each = slice(None, None, max(1, len(blocks) // most))
    known: dict[str, Any] = {"vocab_size": blocks.vocab_size, "tokenizer_hash": blocks.tokenizer_hash}
    return TokenBlocks(blocks[each], documents=blocks.documents[each], **known)


def loss_values(key: str, loss_B: np.ndarray, blocks: TokenBlocks) -> dict[str, Any]:
    """The mean of losses of blocks, and without each of their documents where these are enough."""
    values: dict[str, Any] = {key: float(loss_B.mean())}
    if blocks.n_documents >= FEWEST_DOCUMENTS:
        values[f"{key}_left"] = without_each(loss_B, blocks).tolist()
    return values


def without_each(loss_B: np.ndarray, blocks: TokenBlocks) -> np.ndarray:
    """The mean of losses of blocks without each of their documents, or groups of them, `[documents]`."""
    sums_E, blocks_E = (np.bincount(blocks.document_groups, weights=one) for one in (loss_B, np.ones(len(loss_B))))
    return (sums_E.sum() - sums_E) / (len(loss_B) - blocks_E)


def baseline_rows(study: StudyFolder, runs: Mapping[Run, SubjectRun], index: Mapping[Run, int]) -> list[Row]:
    """N-gram tables counted on what each run had read at its checkpoint, and its writes as a table of tokens."""
    jobs = {}
    for (name, t), run in runs.items():
        checkpoint = run.checkpoints[index[name, t]]
        at, folder = Place(subject=name, training_seed=t), run.folder / checkpoint.folder
        job = partial(_measure, at, run.config, checkpoint.step, folder, study.root / "tokens", study.device)
        jobs[study.root / "baselines" / f"{name}{t}.json"] = job
    return [row for rows in study.measure(jobs, "baselines").values() for row in rows]


def _measure(at: Place, config: SubjectConfig, steps: int, checkpoint: Path, tokens: Path, device: str) -> list[Row]:
    prepared = PreparedTokens.load(tokens)
    train, held_out = prepared.train, prepared.held_out
    seen = seen_blocks(len(train), batch=config.batch, seed=config.seed, steps=steps)

    def losses() -> dict[str, Any]:
        found = ngram_losses(train, compared := evenly(held_out, LOSS_BLOCKS), seen=seen)
        of_trigrams = loss_values("trigram_loss", found["trigram"], compared)
        return {"bigram_loss": float(found["bigram"].mean()), **of_trigrams}

    def lookup() -> dict[str, Any]:
        model, some = load_checkpoint(checkpoint, device=device), seen[:: max(1, len(seen) // LOOKUP_BLOCKS[0])]
        blocks = list(find_blocks(model))
        compared = evenly(held_out, LOOKUP_BLOCKS[1])
        found = token_lookup(model, blocks, train, compared, seen=some)
        if isinstance(found.share_kept, str) or compared.n_documents < FEWEST_DOCUMENTS:
            return {"lookup_share": found.share_kept}
        clean_E, lookup_E, ablated_E = (
            without_each(one, compared) for one in (found.clean_B, found.lookup_B, found.ablated_B)
        )
        return {
            "lookup_share": found.share_kept,
            "lookup_share_left": ((ablated_E - lookup_E) / (ablated_E - clean_E)).tolist(),
        }

    values = _known(losses, "bigram_loss", "trigram_loss") | _known(lookup, "lookup_share")
    return [
        Row(at, key, None, value) if isinstance(value, str) else Row(at, key, value) for key, value in values.items()
    ]


def _known(measure: Callable[[], dict[str, Any]], *keys: str) -> dict[str, Any]:
    """What is measured, or why it cannot be: a vocabulary or a model that is too large must not end a whole study."""
    try:
        return measure()
    except ValueError as error:
        return dict.fromkeys(keys, str(error))
