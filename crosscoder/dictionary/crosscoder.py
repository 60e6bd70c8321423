"""The crosscoder: every feature reads all layers of a token and writes to all layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosscoder.dictionary import codec, initial, pretrained
from crosscoder.dictionary.interface import (
    DictionaryConfig,
    DictionaryOutput,
    Grouped,
    SparseCode,
    checked_input,
    finite_input,
)
from crosscoder.dictionary.sparsity import JumpReLU


class Crosscoder(nn.Module):
    """Acausal crosscoder (Lindsey et al. 2024): one code for all L layers of a token.

    `z_f = sum_l <encoder[f, l], x_l - decoder_bias_l> + encoder_bias_f`; the sparsity rule keeps some z, the code is
    their relu, and `recon_l = sum_f code_f decoder[f, l] + decoder_bias_l`. With L = 1 it is an ordinary SAE.

    Keyword arguments are those of `DictionaryConfig`. Parameters: `encoder`, `decoder` `[F, L, D]`, `encoder_bias`
    `[F]`, `decoder_bias` `[L, D]`, and with JumpReLU `log_threshold` `[F]`. Buffers: `threshold` `[1]` (BatchTopK at
    inference; nan until trained) and `input_scale` `[L]` (what raw activations were multiplied by to become this
    dictionary's inputs).

    Raises:
        ValueError: a setting is out of range, or k > n_features.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.config = config = DictionaryConfig(**settings)
        shapes = self.tensor_shapes(config)
        decoder_FLD = initial.unit_rows(shapes["decoder"], row_dims=2, seed=config.seed)
        self.encoder = nn.Parameter(decoder_FLD.clone())
        self.decoder = nn.Parameter(decoder_FLD)
        self.encoder_bias = nn.Parameter(torch.zeros(shapes["encoder_bias"]))
        self.decoder_bias = nn.Parameter(torch.zeros(shapes["decoder_bias"]))
        self.register_parameter("log_threshold", initial.log_threshold(shapes, config.sparsity))
        self.register_buffer("threshold", torch.full(shapes["threshold"], float("nan")))
        self.register_buffer("input_scale", torch.ones(shapes["input_scale"]))
        self.log_threshold: nn.Parameter | None
        self.threshold: Tensor
        self.input_scale: Tensor
        self.working_encoder: Tensor | None = None  # the trainer's, between two of its steps

    @staticmethod
    def tensor_shapes(config: DictionaryConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a dictionary of this config holds, without making one."""
        shapes: dict[str, tuple[int, ...]] = {
            "encoder": (config.n_features, config.n_layers, config.d_model),
            "decoder": (config.n_features, config.n_layers, config.d_model),
            "encoder_bias": (config.n_features,),
            "decoder_bias": (config.n_layers, config.d_model),
            "threshold": (1,),
            "input_scale": (config.n_layers,),
        }
        if isinstance(config.sparsity, JumpReLU):
            shapes["log_threshold"] = (config.n_features,)
        return shapes

    def grouped(self) -> Grouped:
        """The parameters with L and D flattened, as one dictionary of width N = L * D."""
        return Grouped(
            self.encoder.flatten(1)[None],
            self.decoder.flatten(1)[None],
            self.encoder_bias[None],
            self.decoder_bias.flatten()[None],
            None if self.working_encoder is None else self.working_encoder.flatten(1)[None],
            None if self.log_threshold is None else self.log_threshold[None],
        )

    def decoder_FLD(self) -> Tensor:
        """What each feature writes to each layer, `[F, L, D]`, without gradient."""
        return self.decoder.detach()

    def encode(self, x: Tensor) -> SparseCode:
        """The code of `x` `[..., L, D]`; a row is a token.

        Raises:
            ValueError: `x` does not end in `[L, D]`, or, in evaluation mode, is not finite or finds no threshold.
        """
        x_BLD = checked_input(x, self.config).to(self.encoder.dtype)
        if not self.training:
            finite_input(x_BLD)
        values, features, offsets, cut = codec.encode_grouped(
            x_BLD.flatten(1)[:, None],
            self.grouped(),
            self.config,
            threshold_G=self.threshold,
            training=self.training,
        )
        initial.update_threshold(self, cut)
        return SparseCode(values, features, offsets, self.config.n_features, tuple(x.shape[:-2]))

    def decode(self, code: SparseCode) -> Tensor:
        """The reconstruction `[..., L, D]` of a code."""
        recon_RN = codec.decode_grouped(code.values, code.features, code.offsets, self.decoder.flatten(1)[None])
        recon_BLD = recon_RN.unflatten(1, self.decoder_bias.shape) + self.decoder_bias
        return recon_BLD.view(*code.batch_shape, *self.decoder_bias.shape)

    def forward(self, x: Tensor) -> DictionaryOutput:
        """`recon` `[..., L, D]` and `code` of `x` `[..., L, D]`."""
        code = self.encode(x)
        return DictionaryOutput(self.decode(code), code)

    def encode_dense(self, x: Tensor) -> Tensor:
        """The code of `x` as `[..., F]`, by dense operators that autograd differentiates; for checks and small F."""
        x_BLD = checked_input(x, self.config)
        code_BGF = codec.encode_dense_grouped(
            x_BLD.flatten(1)[:, None],
            self.grouped(),
            self.config,
            threshold_G=self.threshold,
            training=self.training,
        )
        return code_BGF.view(*x.shape[:-2], self.config.n_features)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights to `folder`, whole or not at all."""
        pretrained.save_dictionary(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Crosscoder:
        """The crosscoder saved in `folder`, in evaluation mode, after its files are verified."""
        return pretrained.load_dictionary(folder, {cls.__name__: cls})
