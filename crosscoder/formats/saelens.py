"""Dictionaries in the format of SAELens 6 (checked against 6.54), written and read; the library is not needed for it.

One folder holds one flat SAE: a layer of a bank, or a whole crosscoder over all its layers laid side by side. The
file reads raw activations: input scales, and the weights by which a selection rule ranks features, are folded into
the tensors. With activations a, scales c (one number for each of the N inputs) and weights s of the score:

    W_enc = c * encoder^T * s, b_enc = encoder_bias * s, W_dec = decoder / (s * c), b_dec = decoder_bias / c.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crosscoder.dictionary import Crosscoder, Dictionary, Sparsity
from crosscoder.dictionary.codec import selection_scale, thresholds
from crosscoder.dictionary.sparsity import ReLU, TopK
from crosscoder.dictionary.structure import Acausal, AnyStructure
from crosscoder.formats.foreign import Settings, open_tensors, read_settings
from crosscoder.formats.imported import (
    JUMPRELU,
    About,
    Flat,
    assemble,
    own_matrices,
    require_k,
    rule_tensors,
    transcoder,
)
from crosscoder.foundation.artifact import DamagedArtifactError, committed_directory, write_json
from crosscoder.foundation.config import config, from_mapping, to_mapping
from crosscoder.foundation.console import say
from crosscoder.foundation.origin import Reads

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCHEMA = "saelens/6"
WRITTEN_FOR = "6.54.12"


@config
class Shape:
    """What the metadata of a crosscoder say of its layers; other libraries pass it by."""

    structure: AnyStructure = Acausal()


@torch.no_grad()
def saelens_tensors(dictionary: Dictionary, group: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `cfg.json` and the tensors of one flat SAE with N inputs: `W_enc [N, F]`, `W_dec [F, N]`, biases, threshold.

    group: the layer of a bank, counted from 0; 0 for a crosscoder, whose N = L * D inputs are its layers in order.

    A TopK rule becomes `topk`, ReLU `standard`; JumpReLU, and BatchTopK with its inference threshold, become
    `jumprelu`. A feature with score weight 0 (a decoder row of zeros) becomes one that is never active.

    Raises:
        ValueError: there is no such group, or a BatchTopK dictionary has no inference threshold yet.
    """
    of, grouped = dictionary.config, dictionary.grouped()
    width, n_flat = grouped.center_GN.shape[1], n_flat_dictionaries(dictionary)
    if not 0 <= group < n_flat:
        raise ValueError(f"group is {group}; expected 0 to {n_flat - 1}, the flat dictionaries side by side here")
    input_N = dictionary.input_scale.repeat_interleave(of.d_model).view(n_flat, width)[group].float().cpu()
    group = 0 if of.shared else group  # one set of weights, which reads every layer at its own scale
    scale_GF = selection_scale(grouped, of)
    weight_F = torch.ones(of.n_features) if scale_GF is None else scale_GF[group].float().cpu()
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
        "d_sae": of.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    match of.sparsity:
        case TopK(k=k):
            return {**cfg, "architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}, tensors
        case ReLU():
            return {**cfg, "architecture": "standard"}, tensors
        case _:
            tensors["threshold"] = thresholds(grouped, of, dictionary.threshold)[group].float().cpu().clone()
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
    is_flat = cfg["d_in"] != dictionary.config.d_model
    own = recorded(dictionary.reads, None if is_flat else group)
    known = {"sae_lens_version": WRITTEN_FOR, **own, **(metadata or {})}
    if is_flat:
        if (metadata or {}).get("hook_name") is not None:
            raise ValueError(
                f"hook_name is {known['hook_name']!r}, but this crosscoder reads {dictionary.config.n_layers} layers; "
                "name them in metadata['hook_names']"
            )
        known |= {"crosscoder": True, "hook_name": None, "n_layers": dictionary.config.n_layers}
        known |= to_mapping(Shape(structure=dictionary.config.structure))
        sites = () if dictionary.reads is None else dictionary.reads.sites
        known |= {"layers": list(sites) or None}
        if dictionary.reads is not None and dictionary.reads.site == "residual" and 0 not in sites:
            known |= {"hook_names": [f"blocks.{site - 1}.hook_resid_post" for site in sites]}
    if wrong := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(
            f"{wrong[0]} would hold NaN or infinity in the export: input_scale {dictionary.input_scale.tolist()} or "
            "the weights are out of float32's range; nothing was written"
        )
    with committed_directory(folder, schema=SCHEMA) as temporary:
        write_json(temporary / CONFIG, {**cfg, "metadata": known})
        save_file(tensors, temporary / WEIGHTS)


def recorded(reads: Reads | None, group: int | None) -> dict[str, Any]:
    """What a dictionary's record says of a layer, or of all (None): in SAELens' words, where only a residual stream has
    a hook and a null no model, and whole, as `record`: SAELens 6 keeps what it does not know, and we read it back."""
    if reads is None:
        return {}
    if group is not None:
        reads = replace(reads, sites=reads.sites[group : group + 1], scale=reads.scale[group : group + 1])
    ours = {"reads": str(reads), "record": to_mapping(reads)}
    if reads.null is not None:
        return ours
    known = {
        "model_name": reads.model.name,
        "context_size": reads.tokens.context or None,
        "prepend_bos": None if reads.published else reads.tokens.bos is not None,
        "dataset_path": None if reads.tokens.text is None else reads.tokens.text.source,
    }
    if group is not None and reads.site == "residual" and reads.sites and reads.sites[0] > 0:
        known["hook_name"] = f"blocks.{reads.sites[0] - 1}.hook_resid_post"
    return known | ours


ARCHITECTURES = ("standard", "topk", "jumprelu", "transcoder", "jumprelu_transcoder")
WHY_NOT = {
    "gated": "a gate and a magnitude, each with a bias of its own, decide what is active; no rule here has both",
    "abstopk": "features may be active with negative values; codes here are never negative",
    "skip_transcoder": "a linear map of the input is added to what features write; no class here has one",
    "jumprelu_skip_transcoder": "a linear map of the input is added to what features write; no class here has one",
    "temporal": "a token's code depends on earlier tokens; here each token is encoded by itself",
    "matching_pursuit": "features are chosen one after another, each on what is left; no rule here does so",
}
NORMALISED = "inputs are normalised by what is not in the file; SAELens folds it where it saves a finished SAE"
RESHAPED = "it reads attention heads side by side, which no harvest here gives"


def read(folder: Path, *, allow_pickle: bool = False) -> Flat | Crosscoder:
    """The SAE of a folder, or the crosscoder or transcoder that it holds."""
    settings = read_settings(folder / CONFIG)
    metadata = settings.table("metadata")
    if not re.match(r"([6-9]|\d\d+)\.", str(metadata.take("sae_lens_version", str, ""))):
        settings, metadata = _before_6(settings)
    kind = settings.take("architecture", str)
    why = WHY_NOT.get(kind, f"expected one of {', '.join(ARCHITECTURES)}")
    settings.require("architecture", *ARCHITECTURES, default=None, why=why)
    settings.require("normalize_activations", "none", default="none", why=NORMALISED)
    settings.require("reshape_activations", "none", default="none", why=RESHAPED)
    width, n_features = settings.count("d_in"), settings.count("d_sae")
    is_transcoder = "transcoder" in kind
    subtracts = settings.take("apply_b_dec_to_input", bool, not is_transcoder)
    settings.ignore("dtype", "device")
    sparsity: Sparsity = JUMPRELU if kind.startswith("jumprelu") else ReLU()
    is_rescaled = False
    if kind == "topk":
        sparsity = require_k(settings.take("k", int), n_features, settings.where)
        is_rescaled = settings.take("rescale_acts_by_decoder_norm", bool, False)
    if is_transcoder:
        settings.require("apply_b_dec_to_input", False, default=False, why="SAELens lets no transcoder do so")
        settings.require("d_out", width, default=None, why=f"it reads {width} numbers, and writes as many here")
    settings.finish()
    with open_tensors(folder / WEIGHTS, allow_pickle=allow_pickle) as held:
        if (shape := held.shape("W_enc", 2)) != (width, n_features):
            raise DamagedArtifactError(f"{held.path}: W_enc is of shape {list(shape)}; expected {[width, n_features]}")
        if "scaling_factor" in held and not bool((held.take("scaling_factor", n_features) == 1).all()):
            raise ValueError(f"{held.path}: scaling_factor is not 1: SAELens 6 does not apply it. It is not imported")
        flat = own_matrices(held, sparsity, centred=subtracts or is_transcoder)
    flat = flat.folded() if is_rescaled else flat
    is_crosscoder = metadata.take("crosscoder", bool, False)
    flat = replace(flat, about=_about(metadata, is_crosscoder=is_crosscoder, is_transcoder=is_transcoder))
    if is_transcoder:
        return transcoder(flat)
    return _crosscoder(flat, metadata, settings) if is_crosscoder else flat


def _before_6(settings: Settings) -> tuple[Settings, Settings]:
    """Settings and metadata of a file of SAELens before version 6, by the rules with which version 6 reads them; what
    else such a file says is of its training."""
    settings.require("finetuning_scaling_factor", False, None, default=None, why="SAELens 6 does not apply it")
    name = "activation_fn" if "activation_fn" in settings else "activation_fn_str"
    function = settings.require(name, "relu", "topk", default="relu", why="SAELens 6 would take it as relu")
    new = {"d_in": settings.count("d_in"), "d_sae": settings.count("d_sae")}
    kind = "topk" if function == "topk" else settings.take("architecture", str, "standard")
    new |= {"architecture": kind, "apply_b_dec_to_input": settings.take("apply_b_dec_to_input", bool, True)}
    if kind == "topk":
        new["k"] = settings.table("activation_fn_kwargs").take("k", int, settings.take("k", int, 0))
    hook = settings.take("hook_name" if "hook_name" in settings else "hook_point", str, "")
    new["reshape_activations"] = settings.take("reshape_activations", str, "hook_z" if "hook_z" in hook else "none")
    normalised = settings.take("normalize_activations", (str, bool), "none")
    new["normalize_activations"] = {True: "expected_average_only_in", False: "none"}.get(normalised, normalised)
    said = {"hook_name": hook, "model_name": settings.take("model_name", str, "")}
    said["context_size"] = settings.take("context_size", int, 0)
    say(f"note: {settings.where} is of SAELens before version 6, and is read as version 6 reads it")
    return Settings(new, settings.where), Settings(said, settings.where)


def _about(metadata: Settings, *, is_crosscoder: bool, is_transcoder: bool) -> About:
    """What the metadata say; names of TransformerLens or of `transformers`."""
    hook = metadata.take("hook_name", str, "")
    hooks = metadata.take("hook_names", list, []) if is_crosscoder else [hook] if hook else []
    out, record = metadata.take("hook_name_out", str, "a place that is not said"), metadata.take("record", dict, None)
    return About(
        record=None if record is None else from_mapping(Reads, record, where=f"{metadata.where}.record"),
        model=metadata.take("model_name", str, ""),
        hooks=tuple(map(str, hooks)),
        context=max(0, metadata.take("context_size", int, 0)),
        convention=f"{hook} to {out}" if is_transcoder else "",
    )


def _crosscoder(flat: Flat, metadata: Settings, settings: Settings) -> Crosscoder:
    """The crosscoder that was written as one flat SAE over its layers side by side."""
    n_layers, named = metadata.count("n_layers"), metadata.take("structure", dict, {"kind": "Acausal"})
    structure = from_mapping(Shape, {"structure": named}, where=str(metadata.where)).structure
    n_features, n_inputs = flat.encoder_FD.shape
    if n_inputs % n_layers:
        raise DamagedArtifactError(f"{settings.where}: d_in is {n_inputs}, which is not {n_layers} layers of one width")
    kept = {} if flat.threshold is None else rule_tensors(flat.sparsity, [flat.threshold])
    shape = (n_features, n_layers, n_inputs // n_layers)
    tensors = {
        "encoder": flat.encoder_FD.view(shape),
        "decoder": flat.decoder_FD.view(shape),
        "encoder_bias": flat.encoder_bias_F,
        "decoder_bias": flat.center_D.view(shape[1:]),
        **{name: tensor[0] for name, tensor in kept.items()},
    }
    given = {"n_layers": n_layers, "d_model": shape[2], "n_features": n_features, "sparsity": flat.sparsity}
    made = assemble(Crosscoder, {**given, "structure": structure}, tensors, flat.about.reads(n_layers))
    for weight, mask in ((made.encoder, made.read_mask), (made.decoder, made.write_mask)):
        if mask is not None and bool((weight * ~mask).any()):
            raise DamagedArtifactError(f"{settings.where}: weights are not those of {structure}, which it names")
    return made
