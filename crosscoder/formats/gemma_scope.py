"""Gemma Scope 2 (Google DeepMind 2025): weakly causal crosscoders, cross-layer transcoders, per-layer SAEs.

Every file `params_layer_i` holds the F / L features that read layer i alone. As published, with raw activations x:

    f_i = relu(z_i) * (z_i > threshold_i), z_i = x_i @ w_enc_i + b_enc_i
    recon_l = sum over i <= l of f_i @ w_dec_i[:, l] + b_dec_l

Column j of file i becomes our feature j * L + i, which is how `WeaklyCausal` and `Transcoder` deal features out.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from crosscoder.dictionary import Crosscoder, JumpReLU, TargetL0Penalty, Transcoder, WeaklyCausal
from crosscoder.formats.foreign import Settings, Tensors, open_tensors, read_settings
from crosscoder.formats.imported import (
    JUMPRELU,
    About,
    Flat,
    assemble,
    log_thresholds,
    own_matrices,
    transcoder,
    uncentred_bias,
)
from crosscoder.foundation.artifact import DamagedArtifactError

CONFIG = "config.json"
ONE = "params.safetensors"
OF_LAYER = re.compile(r"params_layer_(\d+)\.safetensors")
TYPES = ("sae", "crosscoder", "clt", "transcoder")
AFFINE = "an affine skip connection adds a linear map of the input to what features write, and no class here has one"
BRACES = re.compile(r"(.*)\{([\d, ]+)\}(.*)")


def parameter_files(folder: Path) -> list[Path]:
    """The files of weights, in the order of layers."""
    if (folder / ONE).is_file():
        return [folder / ONE]
    numbers = sorted(int(found[1]) for path in folder.iterdir() if (found := OF_LAYER.fullmatch(path.name)))
    if not numbers or numbers != list(range(len(numbers))):
        raise FileNotFoundError(
            f"{folder} holds params_layer_N for N = {numbers}; expected {ONE}, or every layer from 0 on"
        )
    return [folder / f"params_layer_{number}.safetensors" for number in numbers]


def read(folder: Path, *, allow_pickle: bool = False) -> Flat | Crosscoder:
    """The dictionary of one folder of Gemma Scope 2: an SAE of one layer, or a crosscoder, CLT or transcoder."""
    settings, files = read_settings(folder / CONFIG), parameter_files(folder)
    settings.require("architecture", "jump_relu", default=None, why="expected jump_relu")
    settings.require("affine_connection", False, None, default=None, why=AFFINE)
    kind, l0 = settings.take("type", str, TYPES[0]), settings.take("l0", (int, float), None)
    if not any(known in kind.casefold() for known in TYPES):
        raise ValueError(
            f"{settings.where}: type is {kind!r:.80}: expected one of {', '.join(TYPES)}. It is not imported"
        )
    model = settings.take("model_name", str, "")
    hooks_in = _hooks(settings.take("hf_hook_point_in", str))
    hooks_out = _hooks(settings.take("hf_hook_point_out", str, "")) or hooks_in
    width = settings.count("width", None)
    settings.finish()
    sparsity = JUMPRELU if l0 is None else JumpReLU(penalty=TargetL0Penalty(target=l0))
    is_crosscoder = hooks_in == hooks_out
    about = About(
        model=model,
        hooks=hooks_in,
        convention="" if is_crosscoder else f"{', '.join(hooks_in)} to {', '.join(hooks_out)}",
    )
    if is_crosscoder and any(name in kind.casefold() for name in ("clt", "transcoder")):
        raise ValueError(f"{settings.where}: type is {kind}, but it reads and writes {', '.join(hooks_in)}")
    if files == [folder / ONE]:
        with open_tensors(files[0]) as held:
            _refuse_affine(held)
            # The bias of a transcoder's output is not what its input is centred by.
            flat = own_matrices(held, sparsity, centred=not is_crosscoder, upper=False, about=about)
        _require_width(width, len(flat.encoder_FD), settings)
        return flat if is_crosscoder else transcoder(flat)
    if len(hooks_in) != len(files):
        raise DamagedArtifactError(f"{settings.where} names {len(hooks_in)} places, beside {len(files)} files")
    made = _read_layers(files, sparsity, about, is_crosscoder=is_crosscoder)
    _require_width(width, made.config.n_features, settings)
    return made


def _refuse_affine(held: Tensors) -> None:
    if "affine_skip_connection" in held:
        raise ValueError(f"{held.path} holds affine_skip_connection: {AFFINE}. It is not imported")


def _require_width(said: int | None, held: int, settings: Settings) -> None:
    if said is not None and said != held:
        raise DamagedArtifactError(f"{settings.where}: width is {said}, the files hold {held} features")


def _hooks(pattern: str) -> tuple[str, ...]:
    """`model.layers.{5,9}.output` as two names."""
    found = BRACES.fullmatch(pattern)
    if found is None:
        return (pattern,) if pattern else ()
    return tuple(f"{found[1]}{number.strip()}{found[3]}" for number in found[2].split(","))


def _read_layers(files: list[Path], sparsity: JumpReLU, about: About, *, is_crosscoder: bool) -> Crosscoder:
    """A crosscoder, or a CLT whose layers are inputs and then outputs, filled file by file."""
    n_files = len(files)
    with open_tensors(files[0]) as held:
        width, each = held.shape("w_enc", 2)
        held.ignore(*held.shapes)
    n_layers = n_files if is_crosscoder else 2 * n_files
    shape = (each * n_files, n_layers, width)
    encoder, decoder = torch.zeros(shape), torch.zeros(shape)
    bias_F, threshold_F, bias_LD = torch.zeros(shape[0]), torch.zeros(shape[0]), torch.zeros(n_layers, width)
    for i, file in enumerate(files):
        with open_tensors(file) as held:
            _refuse_affine(held)
            own_F, first = slice(i, None, n_files), n_layers - n_files  # of outputs
            encoder[own_F, i] = held.take("w_enc", width, each).T
            bias_LD[first + i] = center_D = held.take("b_dec", width)
            bias_f = held.take("b_enc", each)
            bias_F[own_F] = uncentred_bias(bias_f, encoder[own_F, i], center_D) if is_crosscoder else bias_f
            threshold_F[own_F] = held.take("threshold", each, finite=False)
            decoder[own_F, first + i :] = held.take("w_dec", each, n_files, width)[:, i:]
    settings = {"n_layers": n_layers, "d_model": width, "n_features": shape[0], "sparsity": sparsity}
    tensors = {"encoder": encoder, "decoder": decoder, "encoder_bias": bias_F, "decoder_bias": bias_LD}
    settings["structure"] = WeaklyCausal() if is_crosscoder else Transcoder()
    tensors["log_threshold"] = log_thresholds(threshold_F)
    return assemble(Crosscoder, settings, tensors, about.reads(n_layers))
