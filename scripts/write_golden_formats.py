"""Tiny folders written by other libraries' own code, with what their encode and decode give on fixed inputs.

    python -m venv VENV
    VENV/bin/pip install torch==2.13.0 numpy sae-lens==6.54.12 eai-sparsify==1.3.3
    VENV/bin/pip install --no-deps dictionary-learning==0.1.0 nnsight==0.3.7 circuit-tracer==0.5.0 eai-delphi==0.1.3
    VENV/bin/pip install "python-socketio[client]" zstandard asyncer orjson faiss-cpu sentence-transformers
    VENV/bin/python scripts/write_golden_formats.py tests/formats/golden

Needs nothing of this library. Every folder holds their files, and `expected.safetensors`: inputs `x`, codes and
reconstructions. Cases named `adversarial` have a decoder row of zeros, norms over four orders of magnitude, biases
larger than inputs, and thresholds of 0 and below. Gemma Scope 2 has no code of its publisher to write folders: those
here have its layout and random numbers, and are read by the loaders of SAELens and circuit-tracer.
"""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, N, L, K = 6, 16, 12, 3, 3


def theirs(module: str) -> Any:
    """A module of one of the libraries."""
    return importlib.import_module(module)


def numbers(*shape: int, seed: int) -> Tensor:
    """Random numbers that are the same in every version of torch."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def spoil(decoder: Tensor, features: int, seed: int) -> Tensor:
    """A decoder with norms from 0.01 to 100 along its axis of features, and one of zero."""
    factors = torch.logspace(-2, 2, decoder.shape[features])
    factors[seed % decoder.shape[features]] = 0
    shape = [1] * decoder.ndim
    shape[features] = -1
    return decoder * factors.view(shape)


def fill(module: torch.nn.Module, *, adversarial: bool, decoders: tuple[str, ...], features: int, seed: int) -> None:
    """Random parameters."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(module.named_parameters())):
            new = numbers(*parameter.shape, seed=seed + number)
            if adversarial and name in decoders:
                new = spoil(new, features, seed)
            elif adversarial and parameter.ndim == 1:
                new = 5 * new
            parameter.copy_(new)


def expect(folder: Path, x: Tensor, code: Tensor, recon: Tensor) -> None:
    """Write what their code gives."""
    tensors = {"x": x, "code": code, "recon": recon}
    save_file(
        {name: one.detach().float().contiguous() for name, one in tensors.items()}, folder / "expected.safetensors"
    )


def write_saelens(root: Path) -> None:
    """Every architecture with and without subtracting the decoder's bias, and one that is to be refused."""
    sae_lens, transcoders = theirs("sae_lens"), theirs("sae_lens.saes.transcoder")
    metadata = {"model_name": "tiny", "hook_name": "blocks.4.hook_resid_post", "context_size": 64, "prepend_bos": True}
    out = {**metadata, "hook_name": "blocks.4.hook_mlp_in", "hook_name_out": "blocks.4.hook_mlp_out"}
    top_k = (sae_lens.TopKSAE, sae_lens.TopKSAEConfig)
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
        "standard_uncentred": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {"apply_b_dec_to_input": False}),
        "topk": (*top_k, {"k": K}),
        "topk_rescaled": (*top_k, {"k": K, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
        "jumprelu_adversarial": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {"apply_b_dec_to_input": False}),
        "topk_adversarial": (*top_k, {"k": F}),
        "jumprelu_bfloat16": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {"dtype": "bfloat16"}),
        "transcoder": (
            transcoders.Transcoder, transcoders.TranscoderConfig, {"d_out": D, "apply_b_dec_to_input": False}
        ),
        "jumprelu_transcoder": (
            transcoders.JumpReLUTranscoder, transcoders.JumpReLUTranscoderConfig,
            {"d_out": D, "apply_b_dec_to_input": False},
        ),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
    }  # fmt: skip
    for seed, (name, (form, config, more)) in enumerate(cases.items()):
        known = sae_lens.saes.sae.SAEMetadata(**(out if "transcoder" in name else metadata))
        sae = form(config(d_in=D, d_sae=F, metadata=known, **more))
        fill(sae, adversarial="adversarial" in name, decoders=("W_dec",), features=0, seed=100 * seed)
        folder, x = root / name, numbers(N, D, seed=7)
        sae.save_model(folder)
        sae = sae_lens.SAE.load_from_disk(folder, dtype="float32")  # arithmetic of bfloat16 would be another thing
        code = sae.encode(x)
        expect(folder, x, code, sae.decode(code))
    of_training = {"lr": 4e-4, "l1_coefficient": 8e-5, "hook_point_layer": 4, "dataset_path": "text", "seed": 42}
    before = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "model_name": "tiny", "context_size": 64, **of_training}
    for name, weights, more in (
        ("before_6", "standard", {"hook_point": "blocks.4.hook_resid_pre"}),
        ("before_6_topk", "topk", {
            "hook_name": "blocks.4.hook_resid_post", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
            "normalize_activations": False, "apply_b_dec_to_input": False, "sae_lens_version": "5.11.0",
        }),
        ("before_6_normalised", "standard", {"hook_name": "blocks.4.hook_resid_post", "normalize_activations": True}),
    ):  # fmt: skip
        folder, x = root / name, numbers(N, D, seed=7)
        folder.mkdir(exist_ok=True)
        shutil.copy(root / weights / "sae_weights.safetensors", folder)
        (folder / "cfg.json").write_text(json.dumps({**before, **more}))
        sae = sae_lens.SAE.load_from_disk(folder)
        code = sae.encode(x)
        expect(folder, x, code, sae.decode(code))


def write_sparsify(root: Path) -> None:
    """SAEs of two places, an adversarial one, a transcoder, and settings that are to be refused."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # asked for where there is no GPU too
    sparsify = theirs("sparsify")
    cases: dict[str, dict[str, Any]] = {
        "layers.2": {},
        "layers.10": {},
        "adversarial": {"normalize_decoder": False, "multi_topk": True},
        "layers.3.mlp": {"transcode": True},
        "skip": {"transcode": True, "skip_connection": True},
        "groupmax": {"activation": "groupmax"},
    }
    for seed, (name, more) in enumerate(cases.items()):
        k = 4 if name == "groupmax" else K
        coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=k, **more))
        fill(coder, adversarial=name == "adversarial", decoders=("W_dec",), features=0, seed=100 * seed)
        folder, x = root / name, numbers(N, D, seed=7)
        coder.save_to_disk(folder)
        acts, indices, _ = coder.encode(x)
        expect(folder, x, torch.zeros(N, F).scatter(1, indices, acts), coder.decode(acts, indices))


def write_dictionary_learning(root: Path) -> None:
    """Every class, as its trainers write them, and as `load_dictionary` reads them."""
    kinds = theirs("dictionary_learning.dictionary")
    names = ("batch_top_k", "matryoshka_batch_top_k", "top_k")
    batch_top_k, matryoshka_batch_top_k, top_k = (theirs(f"dictionary_learning.trainers.{name}") for name in names)
    load_dictionary = theirs("dictionary_learning.utils").load_dictionary
    cases: dict[str, tuple[Any, str]] = {
        "AutoEncoder": (lambda: kinds.AutoEncoder(D, F), "StandardTrainer"),
        "AutoEncoderNew": (lambda: kinds.AutoEncoderNew(D, F), "PAnnealTrainer"),
        "AutoEncoderTopK": (lambda: top_k.AutoEncoderTopK(D, F, K), "TopKTrainer"),
        "BatchTopKSAE": (lambda: batch_top_k.BatchTopKSAE(D, F, K), "BatchTopKTrainer"),
        "MatryoshkaBatchTopKSAE": (
            lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D, F, K, [4, F - 4]), "MatryoshkaBatchTopKTrainer"
        ),
        "JumpReluAutoEncoder": (lambda: kinds.JumpReluAutoEncoder(D, F), "JumpReluTrainer"),
        "GatedAutoEncoder": (lambda: kinds.GatedAutoEncoder(D, F), "GatedSAETrainer"),
    }  # fmt: skip
    for seed, (name, (make, trainer)) in enumerate(cases.items()):
        for variant in ("", "_adversarial"):
            ae, folder = make(), root / f"{name}{variant}"
            decoders = ("decoder.weight", "W_dec")
            axis = 1 if hasattr(ae, "decoder") else 0
            fill(ae, adversarial=bool(variant), decoders=decoders, features=axis, seed=100 * seed)
            if name == "AutoEncoder" and variant:  # its loader divides by norms
                ae.decoder.weight.data[:, (100 * seed) % F] = 1e-3
            if "BatchTopK" in name:
                ae.threshold.fill_(-1.0 if variant else 0.7)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({key: value.cpu() for key, value in ae.state_dict().items()}, folder / "ae.pt")
            config = {
                "trainer_class": trainer, "dict_class": name, "activation_dim": D, "dict_size": F, "k": K, "layer": 4,
                "lm_name": "tiny", "submodule_name": "resid_post_layer_4", "lr": 1e-3, "seed": 0, "device": "cpu",
            }  # fmt: skip
            (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"ctx_len": 64}}, indent=4))
            loaded, _ = load_dictionary(str(folder), "cpu")
            x = numbers(N, D, seed=7)
            code = loaded.encode(x)
            expect(folder, x, code, loaded.decode(code))


def layer_file(n_layers: int, seed: int) -> dict[str, Tensor]:
    """The tensors of one layer of a multi-layer dictionary of Gemma Scope 2."""
    return {
        "w_enc": numbers(D, F, seed=seed), "b_enc": numbers(F, seed=seed + 1),
        "threshold": numbers(F, seed=seed + 2).abs() * 0.5, "b_dec": numbers(D, seed=seed + 3),
        "w_dec": numbers(F, n_layers, D, seed=seed + 4),
    }  # fmt: skip


def write_gemma_scope(root: Path) -> None:
    """One SAE and one transcoder by SAELens' loader, a crosscoder and a CLT by that of circuit-tracer."""
    sae_lens, loaders = theirs("sae_lens"), theirs("sae_lens.loading.pretrained_sae_loaders")
    load_clt = theirs("circuit_tracer.transcoder.cross_layer_transcoder").load_gemma_scope_2_clt
    model = {"model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu", "affine_connection": False}
    cases = {
        "resid_post/layer_5_width_16k_l0_small": ("sae", "model.layers.5.output", "model.layers.5.output"),
        "transcoder/layer_5_width_16k_l0_small": (
            "transcoder", "model.layers.5.pre_feedforward_layernorm.output",
            "model.layers.5.post_feedforward_layernorm.output",
        ),
    }  # fmt: skip
    for seed, (name, (kind, hook_in, hook_out)) in enumerate(cases.items()):
        folder, x = root / name, numbers(N, D, seed=7)
        folder.mkdir(parents=True, exist_ok=True)
        held = layer_file(1, 1000 + 10 * seed)
        save_file({**held, "w_dec": held["w_dec"][:, 0].contiguous()}, folder / "params.safetensors")
        said = {"hf_hook_point_in": hook_in, "hf_hook_point_out": hook_out, "width": F, "l0": 20, "type": kind, **model}
        (folder / "config.json").write_text(json.dumps(said, indent=2))
        loaders.hf_hub_download = lambda repo_id, filename, subfolder="", force_download=False: str(
            root / subfolder / filename
        )
        loaders.get_safetensors_tensor_shapes = lambda repo_id, filename: {"w_enc": [D, F], "w_dec": [F, D]}
        config, state, _ = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-270m-pt", name)
        form = sae_lens.registry.get_sae_class(config["architecture"])
        sae = form[0](form[1].from_dict({**loaders.handle_config_defaulting(config)}))
        sae.load_state_dict(state)
        code = sae.encode(x)
        expect(folder, x, code, sae.decode(code))
    places = {
        "crosscoder/layer_5_9_12_width_16k_l0_medium": ("crosscoder", ".output", ".output"),
        "clt/width_16k_l0_medium": (
            "clt", ".pre_feedforward_layernorm.output", ".post_feedforward_layernorm.output"
        ),
    }  # fmt: skip
    for seed, (name, (kind, end_in, end_out)) in enumerate(places.items()):
        folder, x = root / name, numbers(N, L, D, seed=7)
        folder.mkdir(parents=True, exist_ok=True)
        paths = {}
        for i in range(L):
            paths[i] = str(folder / f"params_layer_{i}.safetensors")
            save_file(layer_file(L, 2000 + 100 * seed + 10 * i), paths[i])
        layers = "5,9,12" if kind == "crosscoder" else "0,1,2"
        hooks = (f"model.layers.{{{layers}}}{end}" for end in (end_in, end_out))
        said: dict[str, Any] = dict(zip(("hf_hook_point_in", "hf_hook_point_out"), hooks))
        said |= {"width": L * F, "l0": 150, "type": kind, **model}
        (folder / "config.json").write_text(json.dumps(said, indent=2))
        # It reads all paths but the last.
        clt = load_clt({**paths, L: ""}, device=torch.device("cpu"), dtype=torch.float32)
        code_LNF = clt.encode(x.transpose(0, 1))
        recon = clt.decode(code_LNF.to_sparse()).transpose(0, 1)
        expect(folder, x, code_LNF.transpose(0, 1), recon)


def write_delphi(root: Path) -> None:
    """A cache of given latents of one module, in two parts."""
    CacheConfig = theirs("delphi.config").CacheConfig
    LatentCache = theirs("delphi.latents.cache").LatentCache
    latents = numbers(5, 8, F, seed=3).relu() * (numbers(5, 8, F, seed=4) > 0.8)
    latents[..., 5] = 0  # a latent that is never active
    latents[0, 0, 0], latents[0, 0, 1] = 5e-6, 2e-5  # below and above what is kept
    tokens = torch.arange(40).view(5, 8)
    cache: Any = LatentCache(None, {"layers.4": lambda x: x}, batch_size=5)
    cache.width = F
    cache.cache.add(latents, tokens, 0, "layers.4")
    cache.cache.save()
    cache.save_splits(2, root / "latents")
    config = CacheConfig(
        dataset_repo="text", dataset_split="held_out", batch_size=5, cache_ctx_len=8, n_tokens=40, n_splits=2
    )
    cache.save_config(root / "latents", config, "tiny")
    save_file({"latents": latents, "tokens": tokens}, root / "expected.safetensors")


LIBRARIES: dict[str, Callable[[Path], None]] = {
    "saelens": write_saelens,
    "sparsify": write_sparsify,
    "dictionary_learning": write_dictionary_learning,
    "gemma-scope-2": write_gemma_scope,
    "delphi": write_delphi,
}

if __name__ == "__main__":
    for library in sys.argv[2:] or LIBRARIES:
        LIBRARIES[library](Path(sys.argv[1]) / library)
        print(library, flush=True)
