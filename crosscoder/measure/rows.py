"""The weights of single features, one row for each layer that a feature can read or write, of banks and crosscoders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import triton_kernels
from crosscoder.dictionary import Dictionary

PRODUCTS = 2**22
"""Of a row and a token, that are worked out at once."""


@dataclass(frozen=True)
class FeatureRows:
    """Encoder and decoder of F features in the scale of the dictionary's inputs, each with K rows.

    Features of a crosscoder have a row for each layer (K = L), those of a bank one, on their own layer (K = 1), and are
    numbered `layer * F + feature`. `layer_FK` is the layer of each row, `center_LD` what inputs are taken relative to.
    """

    encoder_FKD: Tensor
    decoder_FKD: Tensor
    layer_FK: Tensor
    center_LD: Tensor

    @classmethod
    def of(cls, dictionary: Dictionary) -> FeatureRows:
        """Those of a dictionary, as views of its weights where that can be."""
        grouped, n_layers, d_model = dictionary.grouped(), dictionary.config.n_layers, dictionary.config.d_model
        layers = torch.arange(n_layers, device=grouped.encoder_GFN.device)
        n_features = grouped.encoder_GFN.shape[1]
        both = [one.detach() for one in (grouped.encoder_GFN, grouped.decoder_GFN)]
        center_LD = grouped.center_GN.detach().reshape(-1, d_model).expand(n_layers, d_model)
        if not dictionary.is_bank:
            encoder, decoder = (one.view(n_features, n_layers, d_model) for one in both)
            return cls(encoder, decoder, layers.expand(n_features, n_layers), center_LD)
        encoder, decoder = (one.expand(n_layers, -1, -1).reshape(-1, 1, d_model) for one in both)
        return cls(encoder, decoder, layers.repeat_interleave(n_features)[:, None], center_LD)

    @property
    def is_bank(self) -> bool:
        return self.layer_FK.shape[1] < len(self.center_LD)

    def scaled(self, factor_L: Tensor) -> FeatureRows:
        """The same features in another scale of inputs, of which each layer's is so many times as large."""
        factor_L = factor_L.to(self.decoder_FKD)
        if bool((factor_L == 1).all()):
            return self
        factor_FK1 = factor_L[self.layer_FK][..., None]
        return replace(
            self,
            encoder_FKD=self.encoder_FKD / factor_FK1,
            decoder_FKD=self.decoder_FKD * factor_FK1,
            center_LD=self.center_LD * factor_L[:, None],
        )

    def __len__(self) -> int:
        return len(self.encoder_FKD)

    def on_layers(self, values_FK: Tensor) -> Tensor:
        """What rows hold, by layer, zero where a feature has none, `[F, L]`."""
        out_FL = values_FK.new_zeros(len(values_FK), len(self.center_LD))
        return out_FL.scatter_(1, self.layer_FK.to(values_FK.device), values_FK)

    def norm_FL(self) -> np.ndarray:
        """Norms of what features write, by layer, in the scale of the inputs."""
        return self.on_layers(self.decoder_FKD.float().norm(dim=2)).cpu().numpy()

    def parts(self, x_BLD: Tensor, token_P: Tensor, feature_P: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What each layer adds to the pre-activation of features at tokens, `<encoder_l, x_l - center_l>`, some pairs
        at a time: which, and their parts `[p, K]`."""
        x_BLD = x_BLD - self.center_LD
        return self._products(self.encoder_FKD, x_BLD, token_P, feature_P)

    def readings(self, x_BLD: Tensor, token_P: Tensor, feature_P: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What the decoder's row reads on each layer, `<decoder_l, x_l>` as in `measure.labels`, and all together,
        `[p, K + 1]`; some pairs at a time, as `parts`."""
        for here, each_pK in self._products(self.decoder_FKD, x_BLD, token_P, feature_P):
            yield here, torch.cat([each_pK, each_pK.sum(1, keepdim=True)], dim=1)

    def _products(
        self, rows_FKD: Tensor, x_BLD: Tensor, token_P: Tensor, feature_P: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        n_layers, (_, n_rows, d_model) = len(self.center_LD), rows_FKD.shape
        x_RD, table_ND = x_BLD.to(rows_FKD).reshape(-1, d_model), rows_FKD.reshape(-1, d_model)
        own_K = torch.arange(n_rows, device=x_BLD.device)
        n_each = max(1, PRODUCTS // n_rows)
        for start in range(0, len(token_P), n_each):
            here = slice(start, start + n_each)
            row_pK = token_P[here, None] * n_layers + self.layer_FK[feature_P[here]]
            order = row_pK.flatten().argsort(stable=True)  # the operator takes pairs row by row
            of_row = row_pK.flatten().bincount(minlength=len(x_RD))
            offsets = torch.nn.functional.pad(of_row.cumsum(0), (1, 0))
            column_pK = (feature_P[here, None] * n_rows + own_K).flatten()[order]
            out = torch.empty(len(order), device=x_BLD.device)
            out[order] = triton_kernels.gather_dot(x_RD, column_pK.int(), offsets, table_ND).float()
            yield here, out.view(-1, n_rows)
