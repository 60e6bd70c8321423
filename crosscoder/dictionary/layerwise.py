"""The bank: a sparse autoencoder for each layer, or one for all, trained in one pass over the same tokens."""

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
from crosscoder.dictionary.structure import Acausal


class LayerwiseSAE(nn.Module):
    """L per-layer SAEs of `n_features` each; the per-layer arm that a crosscoder is compared with.

    At layer l: `z_lf = <encoder[l, f], x_l - decoder_bias_l> + encoder_bias_lf`; the sparsity rule acts within each
    layer, and `recon_l = sum_f code_lf decoder[l, f] + decoder_bias_l`. With L = 1 it equals a one-layer crosscoder.

    `initial="same"` starts all SAEs alike, so that feature f of two layers begins as one. `shared=True` makes them one
    SAE with one set of weights, which reads every layer by itself (the multi-layer SAE of Lawson et al. 2024, arXiv
    2409.04185): `z_lf = <encoder[f], x_l - decoder_bias> + encoder_bias_f`. Its rows are (token, layer) too; a
    BatchTopK batch makes one cut over all layers, and a feature is dead if no layer activates it.

    Keyword arguments are those of `DictionaryConfig`. Parameters, with G = L, or 1 for a shared SAE: `encoder`,
    `decoder` `[G, F, D]`, `encoder_bias` `[G, F]`, `decoder_bias` `[G, D]`, and with JumpReLU `log_threshold` `[G, F]`.
    Buffers: `threshold` `[G]` and `input_scale` `[L]`, as in `Crosscoder`.

    Raises:
        ValueError: a setting is out of range, or k > n_features.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.config = config = DictionaryConfig(**settings)
        if not isinstance(config.structure, Acausal):
            raise ValueError(f"structure {config.structure} is for a Crosscoder; each SAE of a bank has one layer")
        shapes = self.tensor_shapes(config)
        rows_GFD = initial.directions(shapes["decoder"], layer_dim=0, initial=config.initial, seed=config.seed)
        self.encoder = nn.Parameter(initial.unit_rows(rows_GFD, row_dims=1))
        self.decoder = nn.Parameter(initial.unit_rows(rows_GFD, row_dims=1))
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
        n_groups = 1 if config.shared else config.n_layers
        shapes: dict[str, tuple[int, ...]] = {
            "encoder": (n_groups, config.n_features, config.d_model),
            "decoder": (n_groups, config.n_features, config.d_model),
            "encoder_bias": (n_groups, config.n_features),
            "decoder_bias": (n_groups, config.d_model),
            "threshold": (n_groups,),
            "input_scale": (config.n_layers,),
        }
        if isinstance(config.sparsity, JumpReLU):
            shapes["log_threshold"] = (n_groups, config.n_features)
        return shapes

    def grouped(self) -> Grouped:
        """The parameters as they are: L dictionaries of width D, or one that all layers share."""
        biases = self.encoder_bias, self.decoder_bias
        return Grouped(self.encoder, self.decoder, *biases, self.working_encoder, self.log_threshold)

    def decoder_FLD(self) -> Tensor:
        """What each of the L * F features writes to each layer, `[L * F, L, D]`: zero off its own layer."""
        n_layers, n_features, d_model = self.config.n_layers, *self.decoder.shape[1:]
        out = self.decoder.new_zeros(n_layers, n_features, n_layers, d_model)
        index = torch.arange(n_layers, device=out.device)
        out[index, :, index] = self.decoder.detach()
        return out.flatten(0, 1)

    def encode(self, x: Tensor) -> SparseCode:
        """The code of `x` `[..., L, D]`; a row is a (token, layer).

        Raises:
            ValueError: `x` does not end in `[L, D]`, or, in evaluation mode, is not finite or finds no threshold.
        """
        x_BLD = checked_input(x, self.config).to(self.encoder.dtype)
        if not self.training:
            finite_input(x_BLD)
        values, features, offsets, cut = codec.encode_grouped(
            x_BLD.reshape(-1, *self.decoder_bias.shape),
            self.grouped(),
            self.config,
            threshold_G=self.threshold,
            training=self.training,
        )
        initial.update_threshold(self, cut)
        local = codec.to_local(features, self.config.n_features, len(self.decoder))
        by_layer = None if self.config.shared else features
        return SparseCode(values, local, offsets, self.config.n_features, tuple(x.shape[:-1]), by_layer)

    def decode(self, code: SparseCode) -> Tensor:
        """The reconstruction `[..., L, D]` of a code."""
        features = codec.to_global(code, len(self.decoder))
        recon_RD = codec.decode_grouped(code.values, features, code.offsets, self.decoder)
        recon_BGD = recon_RD.unflatten(0, (-1, len(self.decoder))) + self.decoder_bias
        return recon_BGD.view(*code.batch_shape, self.config.d_model)

    def forward(self, x: Tensor) -> DictionaryOutput:
        """`recon` `[..., L, D]` and `code` of `x` `[..., L, D]`."""
        code = self.encode(x)
        return DictionaryOutput(self.decode(code), code)

    def encode_dense(self, x: Tensor) -> Tensor:
        """The code of `x` as `[..., L, F]`, by dense operators that autograd differentiates."""
        x_BLD = checked_input(x, self.config)
        code_BGF = codec.encode_dense_grouped(
            x_BLD.reshape(-1, *self.decoder_bias.shape),
            self.grouped(),
            self.config,
            threshold_G=self.threshold,
            training=self.training,
        )
        return code_BGF.view(*x.shape[:-1], self.config.n_features)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights to `folder`, whole or not at all."""
        pretrained.save_dictionary(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LayerwiseSAE:
        """The bank saved in `folder`, in evaluation mode, after its files are verified."""
        return pretrained.load_dictionary(folder, {cls.__name__: cls})
