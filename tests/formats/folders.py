"""Folders of other libraries' layouts with random numbers, and golden ones written by those libraries' own code."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    """The largest difference over the largest number expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def write(folder, config, tensors, *, name="config.json", weights="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / name).write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / weights)
    return folder


def gemma_config(layers, width, *, kind="crosscoder", ends=(".output", ".output"), **more):
    inside = str(layers[0]) if len(layers) == 1 else "{" + ",".join(map(str, layers)) + "}"
    config = {
        "hf_hook_point_in": f"model.layers.{inside}{ends[0]}",
        "hf_hook_point_out": f"model.layers.{inside}{ends[1]}",
        "width": width,
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": 150,
        "affine_connection": False,
        "type": kind,
    }
    return {**config, **more}


def gemma_layers(n_layers, each, width, *, seed=0, scale=1.0):
    """The tensors of each `params_layer_i`; the decoder is dense over all layers, of which some are not used."""
    return [
        {
            "w_enc": numbers(width, each, seed=seed + 10 * i) / width**0.5,
            "b_enc": numbers(each, seed=seed + 10 * i + 1),
            "threshold": numbers(each, seed=seed + 10 * i + 2).abs(),
            "w_dec": numbers(each, n_layers, width, seed=seed + 10 * i + 3),
            "b_dec": scale * numbers(width, seed=seed + 10 * i + 4),
        }
        for i in range(n_layers)
    ]


def write_gemma(folder, layers, held, **more):
    """A folder of a multi-layer dictionary."""
    config = gemma_config(layers, **{"width": sum(len(one["threshold"]) for one in held), **more})
    for i, tensors in enumerate(held):
        write(folder, config, tensors, weights=f"params_layer_{i}.safetensors")
    return folder


def gemma_output(held, x_BLD):
    """Codes `[B, L, F / L]` and reconstructions by the published formula, in float64."""
    codes, recon = [], [0] * len(held)
    for i, one in enumerate(held):
        one = {name: tensor.double() for name, tensor in one.items()}
        score = x_BLD[:, i].double() @ one["w_enc"] + one["b_enc"]
        codes.append(torch.clamp(score, min=0) * (score > one["threshold"]))
        for layer in range(i, len(held)):
            recon[layer] = recon[layer] + codes[-1] @ one["w_dec"][:, layer]
    recon = torch.stack([recon[i] + held[i]["b_dec"].double() for i in range(len(held))], dim=1)
    return torch.stack(codes, dim=1), recon
