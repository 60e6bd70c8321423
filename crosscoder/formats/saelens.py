"""Dictionaries written in the format of SAELens 6 (checked against 6.54), which is not needed for it.

One folder holds one flat SAE: a layer of a bank, or a whole crosscoder over all its layers laid side by side. The
file reads raw activations: input scales, and the weights by which a selection rule ranks features, are folded into
the tensors. With activations a, scales c (one number for each of the N inputs) and weights s of the score:

    W_enc = c * encoder^T * s, b_enc = encoder_bias * s, W_dec = decoder / (s * c), b_dec = decoder_bias / c.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crosscoder.dictionary import Dictionary
from crosscoder.dictionary.codec import selection_scale, thresholds
from crosscoder.dictionary.sparsity import ReLU, TopK
from crosscoder.foundation.artifact import committed_directory, write_json
from crosscoder.foundation.origin import Reads

SCHEMA = "saelens/6"
WRITTEN_FOR = "6.54.12"


@torch.no_grad()
def saelens_tensors(dictionary: Dictionary, group: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `cfg.json` and the tensors of one flat SAE with N inputs: `W_enc [N, F]`, `W_dec [F, N]`, biases, threshold.

    group: the layer of a bank, counted from 0; 0 for a crosscoder, whose N = L * D inputs are its layers in order.

    A TopK rule becomes `topk`, ReLU `standard`; JumpReLU, and BatchTopK with its inference threshold, become
    `jumprelu`. A feature with score weight 0 (a decoder row of zeros) becomes one that is never active.

    Raises:
        ValueError: there is no such group, or a BatchTopK dictionary has no inference threshold yet.
    """
    config, grouped = dictionary.config, dictionary.grouped()
    width, n_flat = grouped.center_GN.shape[1], n_flat_dictionaries(dictionary)
    if not 0 <= group < n_flat:
        raise ValueError(f"group is {group}; expected 0 to {n_flat - 1}, the flat dictionaries side by side here")
    input_N = dictionary.input_scale.repeat_interleave(config.d_model).view(n_flat, width)[group].float().cpu()
    group = 0 if config.shared else group  # one set of weights, which reads every layer at its own scale
    scale_GF = selection_scale(grouped, config)
    weight_F = torch.ones(config.n_features) if scale_GF is None else scale_GF[group].float().cpu()
    divisor_F = torch.where(weight_F > 0, weight_F, torch.ones_like(weight_F))
    encoder_FN, decoder_FN = (table[group].float().cpu() for table in (grouped.encoder_GFN, grouped.decoder_GFN))
    tensors = {
        "W_enc": (encoder_FN * input_N * weight_F[:, None]).T.contiguous(),
        "b_enc": grouped.encoder_bias_GF[group].float().cpu() * weight_F,
        "W_dec": decoder_FN / input_N / divisor_F[:, None],
        "b_dec": grouped.center_GN[group].float().cpu() / input_N,
    }
    cfg: dict[str, Any] = {
        "d_in": width,
        "d_sae": config.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    match config.sparsity:
        case TopK(k=k):
            return {**cfg, "architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}, tensors
        case ReLU():
            return {**cfg, "architecture": "standard"}, tensors
        case _:
            tensors["threshold"] = thresholds(grouped, config, dictionary.threshold)[group].float().cpu().clone()
            return {**cfg, "architecture": "jumprelu"}, tensors


def n_flat_dictionaries(dictionary: Dictionary) -> int:
    """How many flat SAEs a dictionary is: the layers of a bank, also where they share their weights, or 1."""
    return dictionary.config.n_layers * dictionary.config.d_model // dictionary.grouped().center_GN.shape[1]


def save_saelens(
    dictionary: Dictionary,
    folder: str | Path,
    *,
    group: int = 0,
    metadata: dict[str, Any] | None = None,
    raw_inputs: bool = False,
) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` to `folder`, whole or not at all.

    metadata: what SAELens should know of the activations, such as `hook_name`, `model_name`, `context_size`, beside
        what the dictionary's own record says. A crosscoder of several layers is marked as one and has no hook, so that
        tools for one site refuse it.
    raw_inputs: a dictionary without a scale or record of its inputs was trained on raw activations.

    Raises:
        MismatchError: a dictionary without a scale or record of its inputs, unless `raw_inputs`.
        ValueError: see `saelens_tensors`; or a hook is named for a crosscoder of several layers.
    """
    dictionary.require_input_scale("the export", raw_inputs=raw_inputs)
    cfg, tensors = saelens_tensors(dictionary, group)
    known = {"sae_lens_version": WRITTEN_FOR, **_recorded(dictionary.reads, group), **(metadata or {})}
    if cfg["d_in"] != dictionary.config.d_model:
        if (metadata or {}).get("hook_name") is not None:
            raise ValueError(
                f"hook_name is {known['hook_name']!r}, but this crosscoder reads {dictionary.config.n_layers} layers; "
                "name them in metadata['hook_names']"
            )
        known |= {"crosscoder": True, "hook_name": None}
        known |= {"layers": None if dictionary.reads is None else list(dictionary.reads.sites)}
    with committed_directory(folder, schema=SCHEMA) as temporary:
        write_json(temporary / "cfg.json", {**cfg, "metadata": known})
        save_file(tensors, temporary / "sae_weights.safetensors")


def _recorded(reads: Reads | None, group: int) -> dict[str, Any]:
    """What a dictionary's record says, in SAELens' words; only a residual stream has a hook there, a null no model."""
    if reads is None:
        return {}
    if reads.null is not None:
        return {"reads": str(reads)}
    known = {
        "model_name": reads.model.name,
        "context_size": reads.tokens.context,
        "prepend_bos": reads.tokens.bos is not None,
        "dataset_path": None if reads.tokens.text is None else reads.tokens.text.source,
        "reads": str(reads),
    }
    if reads.site == "residual" and group < len(reads.sites) and reads.sites[group] > 0:
        known["hook_name"] = f"blocks.{reads.sites[group] - 1}.hook_resid_post"
    return known
