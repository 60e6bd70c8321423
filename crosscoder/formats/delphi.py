"""The cache of latents that delphi (EleutherAI) explains: `<module>/{start}_{end}.safetensors` and `config.json`.

A file holds the latents from start to end, the end included: `locations` (sequence, position, latent - start), uint16
where they fit and uint32 else, `activations` as float16, kept above 1e-5, and `tokens`, the same in all files.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from crosscoder.formats.activity import Activity
from crosscoder.foundation.artifact import committed_directory, write_json
from crosscoder.foundation.console import say
from crosscoder.foundation.origin import Reads

SCHEMA = "delphi/0.1"
SMALLEST = 1e-5
LARGEST = float(np.finfo(np.float16).max)


def save_delphi(
    activity: Activity, folder: str | Path, *, model_name: str, reads: Reads | None = None, n_splits: int = 5
) -> None:
    """Write one module's cache to `folder`/<name of the module>, whole or not at all.

    Give delphi `folder` as its directory of latents. model_name: where it finds the tokenizer.
    """
    if not 1 <= n_splits <= activity.n_features:
        raise ValueError(f"n_splits is {n_splits}; expected 1 to the {activity.n_features} features")
    text = None if reads is None else reads.tokens.text
    n_tokens = activity.tokens_BS.numel()
    config: dict[str, Any] = {
        "dataset_repo": "" if text is None else text.source,
        "dataset_split": "held_out",
        "dataset_name": (text and text.config_name) or "",
        "dataset_column": (text and text.column) or "text",
        "batch_size": len(activity.tokens_BS),
        "cache_ctx_len": activity.tokens_BS.shape[1],
        "n_tokens": n_tokens,
        "n_splits": n_splits,
        "model_name": model_name,
    }
    kept_P = activity.value_P > SMALLEST
    if clipped := int((activity.value_P > LARGEST).sum()):
        say(f"note: {activity.name}: {clipped} activations above {LARGEST:g}, the largest of float16, become that")
    columns = (activity.sequence_P, activity.position_P, activity.feature_P)
    location_P3 = np.stack([column[kept_P] for column in columns], axis=1)
    value_P = np.minimum(activity.value_P[kept_P], LARGEST).astype(np.float16)
    ends = torch.linspace(0, activity.n_features, n_splits + 1).long().tolist()  # as delphi divides them
    with committed_directory(Path(folder) / activity.name, schema=SCHEMA) as temporary:
        for start, stop in pairwise(ends):
            mine = (location_P3[:, 2] >= start) & (location_P3[:, 2] < stop)
            part_P3 = location_P3[mine] - np.array([0, 0, start], dtype=np.int32)
            fits = not len(part_P3) or int(part_P3.max()) < 2**16
            tensors = {
                "locations": part_P3.astype(np.uint16 if fits else np.uint32),
                "activations": value_P[mine],
                "tokens": activity.tokens_BS.numpy(),
            }
            save_file(tensors, temporary / f"{start}_{stop - 1}.safetensors")
        write_json(temporary / "config.json", config)
