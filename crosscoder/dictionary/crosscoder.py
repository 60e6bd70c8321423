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
    """Crosscoder (Lindsey et al. 2024): one code for all L layers of a token.

    `z_f = sum_l <encoder[f, l], x_l - decoder_bias_l> + encoder_bias_f`; the sparsity rule keeps some z, the code is
    their relu, and `recon_l = sum_f code_f decoder[f, l] + decoder_bias_l`. With L = 1 it is an ordinary SAE. Both sums
    run over the layers that `structure` gives each feature: all by default; causal, local, transcoding and diffing
    crosscoders are this class with other masks.

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
        if config.shared:
            raise ValueError("shared=True is for a LayerwiseSAE; a Crosscoder is one dictionary already")
        shapes = self.tensor_shapes(config)
        read, write = config.masks() or (None, None)
        self.register_buffer("read_mask", read, persistent=False)
        self.register_buffer("write_mask", write, persistent=False)
        rows_FLD = initial.directions(shapes["decoder"], layer_dim=1, initial=config.initial, seed=config.seed)
        self.encoder = nn.Parameter(initial.unit_rows(rows_FLD, row_dims=2, mask=read))
        self.decoder = nn.Parameter(initial.unit_rows(rows_FLD, row_dims=2, mask=write))
        self.encoder_bias = nn.Parameter(torch.zeros(shapes["encoder_bias"]))
        self.decoder_bias = nn.Parameter(torch.zeros(shapes["decoder_bias"]))
        self.register_parameter("log_threshold", initial.log_threshold(shapes, config.sparsity))
        self.register_buffer("threshold", torch.full(shapes["threshold"], float("nan")))
        self.register_buffer("input_scale", torch.ones(shapes["input_scale"]))
        self.read_mask: Tensor | None
        self.write_mask: Tensor | None
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
        """The parameters with L and D flattened, as one dictionary of width N = L * D, and 0 outside the masks."""
        return Grouped(
            _masked(self.encoder, self.read_mask).flatten(1)[None],
            _masked(self.decoder, self.write_mask).flatten(1)[None],
            self.encoder_bias[None],
            self.decoder_bias.flatten()[None],
            None if self.working_encoder is None else self.working_encoder.flatten(1)[None],
            None if self.log_threshold is None else self.log_threshold[None],
        )

    def decoder_FLD(self) -> Tensor:
        """What each feature writes to each layer, `[F, L, D]`, without gradient."""
        return _masked(self.decoder.detach(), self.write_mask)

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
        recon_RN = codec.decode_grouped(code.values, code.features, code.offsets, self.grouped().decoder_GFN)
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


def _masked(weight_FLD: Tensor, mask: Tensor | None) -> Tensor:
    return weight_FLD if mask is None else weight_FLD * mask
