"""A training step's forward and backward pass where the loss is the reconstruction's error, without autograd.

The forms for a device are called one after the other, with the same numbers as through the differentiable operators,
bit for bit; what is saved is their Python, the larger part of a step of a small dictionary. Sets of dictionaries that
read the same batch run side by side, each dictionary with its own k or thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from triton_kernels import dense
from triton_kernels.arguments import Above, Code, Encoding, Largest
from triton_kernels.cache import codes_unwritten
from triton_kernels.encoders import above_thresholds, pull_on_thresholds, sum_of_rows
from triton_kernels.ops import form_for, implementation, on_device_of
from triton_kernels.reference import starts


class Shards(Protocol):
    """Ranks that hold other features of the same dictionaries, or have other tokens, and what they are asked."""

    def most_of_row(self, k: int) -> int:
        """How many candidates of a row, on average, hold all that a choice of k a row over all tokens may take."""

    def keep_top_k(self, score_RC: Tensor, k: int) -> Tensor:
        """Which of the candidates are among the k largest of their row over all ranks, bool `[R, C]`."""

    def keep_batch_top_k(self, score_P: Tensor, offsets: Tensor, n_groups: int, wanted: int) -> tuple[Tensor, Tensor]:
        """Which candidates are among the largest of their dictionary over all ranks, and the cuts `[G]`; `wanted` is
        summed over the tokens of all ranks."""

    def add_reconstruction(self, part: Tensor) -> Tensor:
        """The sum of all ranks' partial reconstructions."""

    def add_center(self, part: Tensor) -> Tensor:
        """The sum of what all ranks' encoders give to the gradient of the centre."""


class Reconstruction(NamedTuple):
    """The code of a batch, its error, and the gradients of the weighted squared error."""

    code: Code
    cut_G: Tensor | None  # of a choice over the batch
    error_SBGN: Tensor
    squares_GL: Tensor
    d_encoder_GFN: Tensor
    d_decoder_GFN: Tensor
    d_bias_GF: Tensor
    d_center_GN: Tensor
    d_threshold_GF: Tensor | None = None  # of a choice by thresholds


@torch.no_grad()
def reconstruct(
    encoding: Encoding,
    decoder_GFN: Tensor,
    weight_GL: Tensor,
    choice: Largest | Above,
    *,
    sizes: Sequence[int] | None = None,
    shards: Shards | None = None,
) -> Reconstruction:
    """Encode by TopK, BatchTopK or thresholds, decode, and differentiate `sum(weight_GL * squares_GL)`.

    Squares are summed by part of a row as in `decode_loss`. x has fewer inputs than there are dictionaries where S sets
    of them share it. sizes: the features of each set's dictionaries that exist, where they are padded. shards: where
    these are some features of larger dictionaries; gradients are then of these, and of the centre for all; thresholds
    choose without asking others.
    """
    n_sets = len(encoding.encoder_GFN) // encoding.x_BGN.shape[1]
    sizes = sizes or [encoding.encoder_GFN.shape[1]] * n_sets
    with on_device_of(encoding.x_BGN), codes_unwritten():
        if isinstance(choice, Above):
            code, z_P = above_thresholds(encoding, choice)
            found, d_values = _differentiated(encoding, code, None, decoder_GFN, weight_GL, sizes, shards)
            pull = (choice, z_P, code.features_P, encoding.scale_GF, d_values)
            return found._replace(d_threshold_GF=pull_on_thresholds(*pull)) if choice.window > 0 else found
        if shards is None:
            code, cut_G = _encoded(encoding, choice)
        else:
            code, cut_G = _encoded_with_others(encoding, choice, shards)
        return _differentiated(encoding, code, cut_G, decoder_GFN, weight_GL, sizes, shards)[0]


def _encoded_with_others(encoding: Encoding, choice: Largest, shards: Shards) -> tuple[Code, Tensor | None]:
    """The code of these features, chosen by scores in the encoder's dtype among what each rank would choose."""
    (k, *_), by_batch = choice
    own, (n_groups, n_features, _) = implementation(encoding.x_BGN), encoding.encoder_GFN.shape
    own_k = min(shards.most_of_row(k) if by_batch else k, n_features)
    if by_batch:
        pairs, _ = own.encode_batch_top_k(encoding, [own_k] * n_groups)
        score_P = _scores(encoding, pairs.z, pairs.features)
        kept_P, cut_G = shards.keep_batch_top_k(score_P, pairs.offsets, n_groups, k * len(encoding.x_BGN))
        pairs = pairs.only(kept_P.nonzero().squeeze(1))
        return Code(pairs.z.relu(), pairs.features, pairs.offsets), cut_G
    z_P, features_P = own.encode_top_k(encoding, [own_k] * n_groups)
    kept_RC = shards.keep_top_k(_scores(encoding, z_P, features_P).view(-1, own_k), k)
    kept_P = kept_RC.flatten()
    return Code(z_P[kept_P].relu(), features_P[kept_P], starts(kept_RC.sum(1))), None


def _scores(encoding: Encoding, z_P: Tensor, features_P: Tensor) -> Tensor:
    return z_P if encoding.scale_GF is None else z_P * encoding.scale_GF.flatten()[features_P]


def _encoded(encoding: Encoding, choice: Largest) -> tuple[Code, Tensor | None]:
    own, x_BGN, k_G = implementation(encoding.x_BGN), encoding.x_BGN, choice.k_G
    if choice.by_batch:
        pairs, cut_G = own.encode_batch_top_k(encoding, k_G)
        return Code(pairs.z.relu(), pairs.features, pairs.offsets), cut_G
    z_P, features_P = own.encode_top_k(encoding, k_G)
    return Code(z_P.relu(), features_P, _offsets(k_G, x_BGN)), None


def _differentiated(
    encoding: Encoding,
    code: Code,
    cut_G: Tensor | None,
    decoder_GFN: Tensor,
    weight_GL: Tensor,
    sizes: Sequence[int],
    shards: Shards | None,
) -> tuple[Reconstruction, Tensor]:
    """The gradients of the error of a code, and those to the code's values."""
    x_BGN, center_GN, encoder_GFN = encoding[:3]
    n_sets, n_features = len(sizes), encoder_GFN.shape[1]
    # What is written out densely has no sets: a code that is not sparse takes the sparse forms if it has company.
    form = form_for(x_BGN, code, n_features) if n_sets == 1 else implementation(x_BGN)
    if shards is None:
        error_BGN, squares_GL = form.decode_loss(code, decoder_GFN, center_GN, x_BGN, weight_GL.shape[1])
    else:
        part_RN = implementation(x_BGN).gather_sum(code, decoder_GFN.reshape(-1, decoder_GFN.shape[2]))
        error_BGN = shards.add_reconstruction(part_RN.view(x_BGN.shape)).add_(center_GN).sub_(x_BGN)
        squares_GL = dense.squares_of_parts(error_BGN, weight_GL.shape[1])
    d_values, d_decoder = form.backward_decoder(code, error_BGN, weight_GL, decoder_GFN)
    d_z = torch.where(code.values_P > 0, d_values, 0)
    d_encoder, d_bias = form.backward_encoder(code._replace(values_P=d_z), x_BGN, center_GN, n_features)
    error_SBGN = error_BGN.view(n_sets, *x_BGN.shape)
    sets = zip(error_SBGN, *(one.chunk(n_sets) for one in (weight_GL, d_bias, encoder_GFN)), sizes, strict=True)
    of_all = (lambda part: part) if shards is None else shards.add_center
    d_center = [
        dense.reconstruction_gradient(error.sum(0, keepdim=True), weight)[0]
        - of_all(sum_of_rows(bias[:, :n], encoder[:, :n]))
        for error, weight, bias, encoder, n in sets
    ]
    d_center_GN = d_center[0] if n_sets == 1 else torch.cat(d_center)
    return Reconstruction(code, cut_G, error_SBGN, squares_GL, d_encoder, d_decoder, d_bias, d_center_GN), d_values


def _offsets(k_G: Sequence[int], x_BGN: Tensor) -> Tensor:
    """Where the pairs of each row begin, if every row of dictionary g has k_G[g]."""
    n_rows, n_inputs, _ = x_BGN.shape
    if len(set(k_G)) == 1:
        return torch.arange(0, n_rows * sum(k_G) + 1, k_G[0], device=x_BGN.device)
    sets = torch.tensor(k_G, device=x_BGN.device).view(-1, 1, n_inputs)
    return starts(sets.expand(-1, n_rows, -1).flatten())
