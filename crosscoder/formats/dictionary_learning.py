"""SAEs of dictionary_learning (Marks, Karvonen and Mueller), and the crosscoders of its fork (Minder et al. 2025).

An SAE is `config.json` with a table `trainer` beside `ae.pt`. A crosscoder is a state dict with `encoder.weight [L, D,
F]`, `decoder.weight [L, F, D]`, in `model.safetensors` or a pickle:

    f = relu(sum over l of x_l @ encoder_l + bias), recon_l = f @ decoder_l + bias_l

with BatchTopK kept where f times the norm of the decoder row exceeds `threshold`. A normaliser in the file, mean and
one scale a layer, is folded into the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.dictionary import BatchTopK, Crosscoder, JumpReLU, NormPenalty, ReLU, Sparsity, TargetL0Penalty
from crosscoder.dictionary.codec import decoder_norms
from crosscoder.formats.foreign import Settings, Tensors, open_tensors, read_settings
from crosscoder.formats.imported import (
    JUMPRELU,
    About,
    Flat,
    assemble,
    log_thresholds,
    own_matrices,
    require_k,
    uncentred_bias,
)
from crosscoder.foundation.artifact import DamagedArtifactError
from crosscoder.foundation.console import say

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "ae.safetensors", "ae.pt", "model.pt", "model_final.pt")
NORMS: dict[int, tuple[str, Any]] = {1: ("CROSSCODER", "l1"), 2: ("SAE", "l2"), 4: ("NONE", "none")}
"""`code_normalization_id`: what scores are multiplied by, as a selection weight here."""
EPSILON = 1e-8  # what the fork adds to a scale before it divides by it


def weights_file(folder: Path) -> Path:
    """The one file of weights of a folder."""
    found = [name for name in WEIGHTS if (folder / name).is_file()]
    if len(found) > 1 and found[1:] != [Path(found[0]).with_suffix(".pt").name]:
        raise FileNotFoundError(f"{folder} holds {', '.join(found)}; leave one of them")
    if not found:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(WEIGHTS)}; give the folder of one dictionary")
    return folder / found[0]


def read(folder: Path, *, allow_pickle: bool = False) -> Flat | Crosscoder:
    """The SAE or crosscoder of a folder."""
    settings = read_settings(folder / CONFIG) if (folder / CONFIG).is_file() else Settings({}, folder)
    with open_tensors(weights_file(folder), allow_pickle=allow_pickle) as held:
        if len(held.shapes.get("encoder.weight", ())) == 3:
            return _read_crosscoder(held, settings)
        return _read_sae(held, settings.table("trainer") if "trainer" in settings else settings)


def _read_sae(held: Tensors, trainer: Settings) -> Flat:
    name = trainer.take("dict_class", str)
    reader = SAES.get(name)
    if reader is None:
        why = "a gate and a magnitude, each with a bias of its own, decide what is active"
        why = why if name == "GatedAutoEncoder" else f"expected one of {', '.join(SAES)}"
        raise ValueError(f"{trainer.where}: dict_class is {name!r}: {why}. It is not imported")
    flat = reader(held, trainer)
    if _normaliser(held, flat.width)[0] is not None:
        raise ValueError(f"{held.path}: activation_mean is set: inputs are normalised. It is not imported")
    for said, found in (("dict_size", len(flat.encoder_FD)), ("activation_dim", flat.width)):
        if trainer.take(said, int, found) != found:
            raise DamagedArtifactError(f"{trainer.where}: {said} is {trainer.take(said, int)}, the file holds {found}")
    return flat


def _about(trainer: Settings) -> About:
    layer, name = trainer.take("layer", int, None), trainer.take("submodule_name", str, "")
    hook = name if name and "resid_post" not in name else "" if layer is None else f"model.layers.{layer}.output"
    return About(model=trainer.take("lm_name", str, ""), hooks=(hook,) if hook else ())


def _linear(held: Tensors, trainer: Settings, bias: str, sparsity: Sparsity, **more: Any) -> Flat:
    """The SAE with `encoder` and `decoder` as linear layers, which subtracts the bias of that name first."""
    n_features, width = held.shape("encoder.weight", 2)
    return Flat(
        encoder_FD=held.take("encoder.weight", n_features, width),
        encoder_bias_F=held.take("encoder.bias", n_features),
        decoder_FD=held.take("decoder.weight", width, n_features).T.contiguous(),
        center_D=held.take(bias, width),
        sparsity=sparsity,
        about=_about(trainer),
        **more,
    )


def _auto_encoder(held: Tensors, trainer: Settings) -> Flat:
    """Its loader gives decoder rows norm 1, and features the values that go with that; so does this."""
    flat = _linear(held, trainer, "bias", ReLU())
    norm_F = flat.decoder_FD.norm(dim=1)
    return flat if torch.allclose(norm_F, torch.ones_like(norm_F)) else flat.folded()


def _auto_encoder_new(held: Tensors, trainer: Settings) -> Flat:
    flat = _linear(held, trainer, "decoder.bias", ReLU())
    return replace(flat, encoder_bias_F=uncentred_bias(flat.encoder_bias_F, flat.encoder_FD, flat.center_D))


def _top_k(held: Tensors, trainer: Settings) -> Flat:
    held.ignore("threshold")  # its encode keeps the k largest unless asked otherwise
    k = _k(held, trainer)
    return _linear(held, trainer, "b_dec", require_k(k, held.shape("encoder.weight", 2)[0], trainer.where))


def _k(held: Tensors, trainer: Settings) -> int:
    held_k = int(held.number("k")) if "k" in held else None
    said = trainer.take("k", int, held_k)
    if held_k not in (None, said):
        raise DamagedArtifactError(f"{trainer.where}: k is {said}, {held.path} holds {held_k}")
    if said is None:
        raise ValueError(f"{trainer.where}: k is missing; expected int")
    return said


def _batch_top_k(held: Tensors, trainer: Settings) -> Flat:
    sparsity, threshold = _batch_rule(_k(held, trainer), held.shape("encoder.weight", 2)[0], held)
    return _linear(held, trainer, "b_dec", sparsity, threshold=threshold)


def _batch_rule(k: int, n_features: int, held: Tensors) -> tuple[Sparsity, Tensor | None]:
    """BatchTopK at its threshold; ReLU where that was never set: the library then keeps all that is positive."""
    threshold = held.number("threshold")
    if not threshold >= 0 or threshold == float("inf"):
        if threshold < 0:
            say(f"note: {held.path}: threshold is {threshold:g}, never set: every positive feature is active")
            return ReLU(), None
        raise DamagedArtifactError(f"{held.path}: threshold is {threshold}; expected a number")
    return BatchTopK(k=require_k(k, n_features, held.path).k), torch.tensor(threshold)


def _matryoshka(held: Tensors, trainer: Settings) -> Flat:
    held.ignore("group_sizes")  # of the losses; all groups are active
    n_features = held.shape("W_enc", 2)[1]
    sparsity, threshold = _batch_rule(_k(held, trainer), n_features, held)
    return own_matrices(held, sparsity, centred=True, threshold=threshold, about=_about(trainer))


def _jump_relu(held: Tensors, trainer: Settings) -> Flat:
    return own_matrices(held, JUMPRELU, centred=False, about=_about(trainer))


SAES: dict[str, Callable[[Tensors, Settings], Flat]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jump_relu,
}


def _read_crosscoder(held: Tensors, settings: Settings) -> Crosscoder:
    n_layers, width, n_features = held.shape("encoder.weight", 3)
    weight = _selection_weight(held, settings, n_layers, width, n_features)
    decoder = held.take("decoder.weight", n_layers, n_features, width).permute(1, 0, 2).contiguous()
    sparsity, threshold = ReLU(penalty=NormPenalty("l2" if weight == "l2" else "l1")), None
    if "k" in held:
        rule, threshold = _batch_rule(int(held.number("k")), n_features, held)
        sparsity = sparsity if threshold is None else rule
    mean_LD, scale_L, divisor_L = _normaliser(held, n_layers, width)
    kept: dict[str, Tensor] = {}
    if threshold is not None and mean_LD is not None:
        # Norms of decoder rows at their scale choose features; these norms are not those of the folded rows.
        norm_F = torch.ones(n_features)
        if weight != "none":
            norm_F = decoder_norms(decoder.flatten(1)[None], weight, d_model=width)[0]
        kept["log_threshold"] = log_thresholds(torch.where(norm_F > 0, threshold / norm_F, torch.inf))
        sparsity = JumpReLU(penalty=TargetL0Penalty(target=float(held.number("k"))))
        say(f"note: {held.path}: its BatchTopK becomes JumpReLU at the thresholds that it has, inputs being normalised")
    elif threshold is not None:
        kept["threshold"] = threshold.reshape(1)
    encoder = held.take("encoder.weight", n_layers, width, n_features).permute(2, 0, 1).contiguous()
    bias_LD, bias_F = held.take("decoder.bias", n_layers, width), held.take("encoder.bias", n_features)
    if mean_LD is not None:
        scale_L1, divisor_L1 = scale_L[:, None], divisor_L[:, None]
        encoder, decoder, bias_LD = encoder * scale_L1, decoder / divisor_L1, bias_LD / divisor_L1
    # Theirs subtracts the mean alone from what is encoded, ours the whole bias.
    bias_F = uncentred_bias(bias_F, encoder.flatten(1), bias_LD.flatten())
    bias_LD = bias_LD if mean_LD is None else bias_LD + mean_LD
    given: dict[str, Any] = {"n_layers": n_layers, "d_model": width, "n_features": n_features, "sparsity": sparsity}
    if isinstance(sparsity, BatchTopK):
        given["selection_weight"] = weight
    tensors = {"encoder": encoder, "decoder": decoder, "encoder_bias": bias_F, "decoder_bias": bias_LD, **kept}
    return assemble(Crosscoder, given, tensors, About().reads(n_layers))


def _selection_weight(held: Tensors, settings: Settings, n_layers: int, width: int, n_features: int) -> Any:
    """By what scores are multiplied, after all settings were seen to fit."""
    table = settings.table("trainer") if "trainer" in settings else settings
    for name, found in (("activation_dim", width), ("dict_size", n_features), ("num_layers", n_layers)):
        if table.take(name, int, found) != found:
            raise DamagedArtifactError(f"{table.where}: {name} is {table.take(name, int)}, the file holds {found}")
    layers = list(range(n_layers))
    table.require("encoder_layers", None, layers, default=None, why="some layers are not read; here all are")
    table.require("num_decoder_layers", None, n_layers, default=None, why="as many layers are written as are read here")
    table.require("latent_processor", None, default=None, why="a function of its own changes codes")
    if "code_normalization_id" in held:
        norm = held.number("code_normalization_id")
    else:
        norm = 1
        say(f"note: {held.path} does not say how codes are normalised; as its library does, the l1 norm is taken")
    if norm not in NORMS:
        names = ", ".join(f"{number} ({name})" for number, (name, _) in NORMS.items())
        raise ValueError(
            f"{held.path}: code_normalization_id is {norm:g}, expected one of {names}: 3 (MIXED) needs factors that "
            "are not in the file, with 5 (DECOUPLED) each layer has a code of its own. It is not imported"
        )
    name, weight = NORMS[int(norm)]
    why = f"the file of weights says {name}"
    table.require("code_normalization", None, name, name.lower(), default=None, why=why)
    return weight


def _normaliser(held: Tensors, *shape: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Mean, `[L, D]` or of an SAE `[D]`, and what centred inputs are multiplied and outputs divided by, `[L]` or `[]`;
    no mean: neither."""
    held.ignore("target_rms", "activation_global_scale")
    scale = torch.ones(shape[:-1])
    if "activation_mean" not in held and "activation_std" not in held:
        return None, scale, scale
    mean, std = (held.take(f"activation_{name}", *shape, finite=False) for name in ("mean", "std"))
    if bool(mean.isnan().any() or std.isnan().any()):  # how the library says that there is none
        return None, scale, scale
    if not bool(mean.isfinite().all()):
        raise DamagedArtifactError(f"{held.path}: activation_mean holds infinite values")
    scale = held.take("activation_global_scale", *shape[:-1])
    return mean, scale, scale + EPSILON
