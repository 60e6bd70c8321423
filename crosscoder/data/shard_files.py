"""One file of a store of activations: harvested call of the model by call, and kept half-done where work is stopped."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from crosscoder.data.stream import ActivationStream
from crosscoder.foundation.console import Progress
from crosscoder.foundation.failpoints import failpoint
from crosscoder.foundation.signals import Stopped

ORIGINS = ("document_T", "sequence_T", "position_T")
UNFINISHED, KEPT = ".part", ".kept"
"""Of a file that is being written, and of what there is of a shard so far."""
KEEP_SECONDS = 30.0
"""Work on one shard after which what there is of it is kept."""


def blocks_of_shard(stream: ActivationStream, n_tokens: int) -> int:
    """Blocks that hold about so many tokens: whole calls of the model, so that a resumed harvest makes the same."""
    blocks, call = max(1, n_tokens // stream.context), len(stream.parts()[0])
    return blocks if blocks < call else blocks // call * call


def write_shard(
    stream: ActivationStream,
    first: int,
    blocks: Tensor,
    dtype: torch.dtype,
    progress: Progress,
    path: Path,
) -> int:
    """A shard's file, whose blocks start at number `first` of the stream's; one that is there is left. How many tokens
    it holds."""
    if path.is_file():
        with safe_open(path, framework="pt") as stored:
            n_tokens = stored.get_slice("x_TLD").get_shape()[0]
        progress.advance(n_tokens)
    else:
        tensors = _harvest_shard(stream, first, blocks, dtype, progress, path.with_suffix(KEPT))
        _save_whole(tensors, path)
        n_tokens = len(tensors["x_TLD"])
    path.with_suffix(KEPT).unlink(missing_ok=True)
    failpoint("shard.end")
    return n_tokens


def _save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path.with_suffix(UNFINISHED))
    failpoint("shard.rename")
    path.with_suffix(UNFINISHED).rename(path)


def _harvest_shard(
    stream: ActivationStream, first: int, blocks: Tensor, dtype: torch.dtype, progress: Progress, kept: Path
) -> dict[str, Tensor]:
    """The tensors of the shard whose blocks start at number `first` of the stream's; what a stop leaves of it is in
    `kept`, call of the model by call."""
    count_b = stream.order.count_B[first : first + len(blocks)]
    start = int(stream.order.first_B[first])
    token_T = stream.token_T[start : start + int(count_b.sum())]
    sequence_T, position_T = token_T // stream.context, token_T % stream.context
    x_TLD = torch.empty(len(token_T), len(stream.sites), stream.d_model, dtype=dtype)
    n_calls, filled = _read_kept(kept, x_TLD)
    progress.advance(filled)

    def keep() -> None:
        _save_whole({"x_TLD": x_TLD[:filled], "n_calls": torch.tensor([n_calls])}, kept)
        failpoint("shard.part")

    kept_at = time.monotonic()
    try:
        for call in stream.parts(blocks)[n_calls:]:
            for part_TLD in stream.harvest(call):
                _require_finite(part_TLD, stream, token_T[filled:])
                x_TLD[filled : filled + len(part_TLD)] = part_TLD
                filled += len(part_TLD)
                progress.advance(len(part_TLD))
            n_calls += 1
            failpoint("shard.batch")
            if time.monotonic() - kept_at > KEEP_SECONDS:
                keep()
                kept_at = time.monotonic()
    except Stopped:
        keep()
        raise
    document_T = torch.from_numpy(stream.tokens.documents[blocks.numpy()]).repeat_interleave(count_b)
    numbers = zip(ORIGINS, (document_T, sequence_T, position_T), strict=True)
    return {"x_TLD": x_TLD, **{name: number_T.int() for name, number_T in numbers}}


def _read_kept(kept: Path, x_TLD: Tensor) -> tuple[int, int]:
    """Fills the start of a shard with what there is of it; how many calls of the model that was, and tokens."""
    if not kept.is_file():
        return 0, 0
    from safetensors.torch import load_file

    tensors = load_file(kept)
    filled = len(tensors["x_TLD"])
    x_TLD[:filled] = tensors["x_TLD"]
    return int(tensors["n_calls"]), filled


def _require_finite(x_TLD: Tensor, stream: ActivationStream, token_T: Tensor) -> None:
    bad = (~x_TLD.isfinite()).any(-1).T.nonzero()  # lowest site first: attention spreads what is not finite
    if len(bad):
        slot, token = bad[0].tolist()
        block, position = divmod(int(token_T[token]), stream.context)
        raise ValueError(
            f"the activation at site {stream.sites[slot]}, block {block}, position {position} is not finite; check the "
            "model's weights, or load it in float32"
        )
