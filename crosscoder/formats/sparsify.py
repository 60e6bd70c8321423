"""SAEs and transcoders of sparsify (EleutherAI): one folder for each place in a model, named after it.

    topk(relu((x - b_dec) @ encoder.weight^T + encoder.bias), k) @ W_dec + b_dec

A transcoder does not subtract `b_dec`, and writes what a module returns for what it is given.
"""

from __future__ import annotations

from pathlib import Path

from crosscoder.dictionary import Crosscoder
from crosscoder.formats.foreign import open_tensors, read_settings
from crosscoder.formats.imported import About, Flat, require_k, transcoder
from crosscoder.foundation.console import say

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(folder: Path, *, allow_pickle: bool = False) -> Flat | Crosscoder:
    """The SAE of a folder, or its transcoder."""
    settings = read_settings(folder / CONFIG)
    width = settings.count("d_in")
    settings.require(
        "activation", "topk", default="topk", why="of each group the largest is active; no rule here does so"
    )
    settings.require("signed", False, default=False, why="codes may be negative; here they never are")
    skips = "a linear map of the input is added to what features write; no class here has one"
    settings.require("skip_connection", False, default=False, why=skips)
    factor = settings.count("expansion_factor", 32)
    n_features = settings.take("num_latents", int, 0) or width * factor
    k, is_transcoder = settings.take("k", int), settings.take("transcode", bool, False)
    if settings.take("multi_topk", bool, False):
        say(f"note: {settings.where}: multi_topk was a loss of its training; encoding keeps k = {k} all the same")
    settings.ignore("normalize_decoder")
    settings.finish()
    with open_tensors(folder / WEIGHTS, allow_pickle=allow_pickle) as held:
        flat = Flat(
            encoder_FD=held.take("encoder.weight", n_features, width),
            encoder_bias_F=held.take("encoder.bias", n_features),
            decoder_FD=held.take("W_dec", n_features, width),
            center_D=held.take("b_dec", width),
            sparsity=require_k(k, n_features, settings.where),
            about=About(hooks=(folder.name,) * (2 if is_transcoder else 1)),
        )
    return transcoder(flat) if is_transcoder else flat
