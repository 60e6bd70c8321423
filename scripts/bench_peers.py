"""Steps of published trainers on the same job, where they are installed: a TopK SAE of width N = L * D.

Each function gives a step that takes x `[B, N]` through the peer's own model, loss and optimiser (Adam, rate 1e-3, no
auxiliary loss), or raises `UnavailableError` with the reason. What their step does beyond that is left as published:
`dictionary-learning` keeps decoder rows at norm 1 and clips, SAELens clips and counts firings. Nothing of theirs is
copied here. `scripts/install_peers.sh` makes an environment that has them; run as a program, this file says which
are found.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_common import Problem, Shape, Step, UnavailableError, random_x

RATE = 1e-3
MANY_STEPS = 10**9


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{package} is not installed (scripts/install_peers.sh): {error}") from error


def sparsify_step(shape: Shape, x_BN: torch.Tensor, dtype: str) -> Step:
    """EleutherAI's sparsify; on the CPU with its eager decoder, since its Triton one needs a GPU."""
    if x_BN.device.type == "cpu":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    elif dtype == "fp32":
        raise UnavailableError("sparsify runs its forward pass under bf16 autocast on a GPU: see its bf16 arm")
    sparsify = _import("sparsify", "eai-sparsify")
    config = sparsify.SparseCoderConfig(num_latents=shape.n_features, k=shape.k, normalize_decoder=False)
    model = sparsify.SparseCoder(shape.width, config, device=x_BN.device, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def step() -> None:
        with torch.autocast(x_BN.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(x_BN).fvu
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def dictionary_learning_step(shape: Shape, x_BN: torch.Tensor, dtype: str) -> Step:
    """The TopK trainer of saprmarks/dictionary_learning, by its own `update`."""
    top_k = _import("dictionary_learning.trainers.top_k", "dictionary-learning")
    trainer = top_k.TopKTrainer(
        steps=MANY_STEPS,
        activation_dim=shape.width,
        dict_size=shape.n_features,
        k=shape.k,
        layer=0,
        lm_name="none",
        lr=RATE,
        auxk_alpha=0,
        warmup_steps=0,
        device=str(x_BN.device),
    )
    taken = [0]

    def step() -> None:
        with torch.autocast(x_BN.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            trainer.update(taken[0], x_BN)
        taken[0] += 1

    return step


def saelens_step(shape: Shape, x_BN: torch.Tensor, dtype: str) -> Step:
    """SAELens's TopK training SAE, by its trainer's own `step`."""
    sae_lens = _import("sae_lens", "sae-lens")
    device = str(x_BN.device)
    settings: dict[str, Any] = {
        "d_in": shape.width,
        "d_sae": shape.n_features,
        "k": shape.k,
        "aux_loss_coefficient": 0.0,
        "rescale_acts_by_decoder_norm": False,
        "device": device,
        "dtype": "float32",
    }
    config = sae_lens.config.SAETrainerConfig(
        total_training_samples=MANY_STEPS * shape.batch,
        train_batch_size_samples=shape.batch,
        lr=RATE,
        lr_end=RATE,
        device=device,
        autocast=dtype == "bf16",
    )
    model = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**settings))
    trainer = sae_lens.SAETrainer(config, model, iter(()))

    def step() -> None:
        trainer.step(x_BN)
        trainer.n_training_steps += 1

    return step


class _WholeRowEncoder(torch.autograd.Function):
    """Scores of whole rows in memory, `torch.topk`, and an encoder gradient by index_add over the chosen pairs."""

    @staticmethod
    def forward(ctx: Any, x_BN: torch.Tensor, encoder_FN: torch.Tensor, bias_F: torch.Tensor, k: int) -> Any:
        z_BF = F.linear(x_BN, encoder_FN.to(x_BN.dtype), bias_F.to(x_BN.dtype)).relu_()
        values_BK, features_BK = z_BF.topk(k, dim=1, sorted=False)
        ctx.save_for_backward(x_BN, values_BK, features_BK)
        ctx.n_features = encoder_FN.shape[0]
        ctx.mark_non_differentiable(features_BK)
        return values_BK, features_BK

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x_BN, values_BK, features_BK = ctx.saved_tensors
        d_z_BK = torch.where(values_BK > 0, grads[0], 0)
        flat = features_BK.flatten()
        pairs_PN = (d_z_BK[:, :, None] * x_BN[:, None]).flatten(0, 1)
        d_encoder = pairs_PN.new_zeros(ctx.n_features, x_BN.shape[1], dtype=torch.float32)
        d_encoder.index_add_(0, flat, pairs_PN.float())
        d_bias = d_encoder.new_zeros(ctx.n_features).index_add_(0, flat, d_z_BK.flatten().float())
        return None, d_encoder, d_bias, None


def whole_row_step(shape: Shape, x_BN: torch.Tensor, dtype: str) -> Step:
    """A step built the way published sparse kernels build it, from stock operators.

    Whole `[B, F]` scores, whole-row top-k, an encoder gradient over the chosen pairs, and a decoder that gathers
    (`embedding_bag`), whose backward pass gives the pairs' gradients and a dense table gradient. Fused Adam.
    """
    generator = torch.Generator(x_BN.device).manual_seed(0)
    table = torch.randn(shape.n_features, shape.width, device=x_BN.device, generator=generator) / shape.width**0.5
    encoder, decoder = torch.nn.Parameter(table), torch.nn.Parameter(table.clone())
    biases = [torch.nn.Parameter(torch.zeros(size, device=x_BN.device)) for size in (shape.n_features, shape.width)]
    optimizer = torch.optim.Adam([encoder, decoder, *biases], lr=RATE, fused=True)
    low = torch.bfloat16 if dtype == "bf16" else torch.float32

    def step() -> None:
        x = (x_BN - biases[1].detach()).to(low)
        values_BK, features_BK = _WholeRowEncoder.apply(x, encoder, biases[0], shape.k)
        recon = F.embedding_bag(features_BK, decoder.to(low), mode="sum", per_sample_weights=values_BK)
        loss = F.mse_loss(recon.float() + biases[1], x_BN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def stock_forms(problem: Problem, k: int) -> dict[str, Step]:
    """Stock torch's way of doing single passes of one dictionary, by the name of what is measured."""
    x_RN, table_FN, code = problem.x_BGN.flatten(0, 1), problem.table_FN, problem.code
    encoder, bias = problem.encoder_GFN[0], problem.bias_GF[0]
    z_RF = torch.empty(x_RN.shape[0], encoder.shape[0], dtype=x_RN.dtype, device=x_RN.device)
    leaves = [code[0].detach().requires_grad_(), table_FN.detach().requires_grad_()]
    parameters = [torch.nn.Parameter(table_FN.float()) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter)
    foreach, fused = torch.optim.Adam(parameters, foreach=True), torch.optim.Adam(parameters, fused=True)

    def bags() -> torch.Tensor:
        weighted = functools.partial(F.embedding_bag, mode="sum", include_last_offset=True)
        return weighted(code[1].long(), leaves[1], code[2], per_sample_weights=leaves[0])

    def multiply(rows: int) -> None:
        for part, out in zip(x_RN.split(rows), z_RF.split(rows), strict=True):
            torch.addmm(bias, part, encoder.t(), out=out)

    recon = bags()
    return {
        "encode GEMM, whole, bf16": lambda: multiply(x_RN.shape[0]),
        "encode GEMM, chunks of 1,024 rows, bf16": lambda: multiply(1024),
        "torch.topk, bf16": lambda: z_RF.topk(k, dim=1),
        "embedding_bag + bias - x, bf16": lambda: bags() + problem.center_GN - x_RN,
        "embedding_bag's backward, bf16": lambda: torch.autograd.grad(recon, leaves, x_RN, retain_graph=True),
        "Adam, torch foreach": foreach.step,
        "Adam, torch fused": fused.step,
    }


PREDICTED_SHAPE = Shape(8192, 12, 768, 32768, 32)
PREDICTIONS = {
    "encode GEMM, whole, bf16": "6.3",
    "encode GEMM, chunks of 1,024 rows, bf16": "6.3",
    "torch.topk, bf16": "0.4-0.8",
    "selection by groups, bf16": "0.2-0.25",
    "embedding_bag + bias - x, bf16": "1.2-1.5 times decode_loss",
    "decode_loss, bf16": "-",
    "embedding_bag's backward, bf16": "3, and 2.2 GB more memory",
    "backward_decoder, bf16": "1.5",
    "Adam, torch foreach": "10",
    "Adam, torch fused": "4.3-4.7",
    "adam_rows": "4.3-4.7",
}
"""Milliseconds at `PREDICTED_SHAPE` on an H200, written down before any was measured; `embedding_bag` stands for a
decoder that goes token by token."""


STEPS: dict[str, Callable[[Shape, torch.Tensor, str], Step]] = {
    "sparsify": sparsify_step,
    "dictionary_learning": dictionary_learning_step,
    "SAELens": saelens_step,
    "whole-row kernels": whole_row_step,
}


def main() -> None:
    """Takes two tiny steps with each peer and prints which ones can be compared with."""
    shape = Shape(batch=64, n_layers=2, d_model=16, n_features=512, k=8)
    x_BN = random_x(shape, "cpu").flatten(1)
    for name, make in STEPS.items():
        try:
            step = make(shape, x_BN, "fp32")
            step()
            step()
            print(f"{name}: runs")
        except UnavailableError as error:
            print(f"{name}: {error}")


if __name__ == "__main__":
    main()
