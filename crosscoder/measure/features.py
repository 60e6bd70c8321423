"""What each feature does: when it is active on a held-out text, and on which layers it writes.

The activity of a dictionary on T tokens is one sparse matrix `[T, G * F]`; every count, correlation and match is a
function of it and of the decoder. For a bank the columns of layer l are `l * F : (l + 1) * F`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from crosscoder.dictionary import Dictionary, SparseCode
from crosscoder.dictionary.codec import to_global


@dataclass(frozen=True)
class Activity:
    """Activations of all features on the same T tokens, in the text's order."""

    code: sparse.csr_array  # [T, G * F], float32, no stored zeros
    n_groups: int

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.code.shape[0]

    @property
    def n_features(self) -> int:
        """F, the features of one group."""
        return self.code.shape[1] // self.n_groups

    def firing_probability(self) -> np.ndarray:
        """Share of tokens on which each feature is active, `p` `[G * F]`."""
        return np.bincount(self.code.indices, minlength=self.code.shape[1]) / self.n_tokens

    def group(self, index: int) -> sparse.csc_array:
        """The columns of one group, `[T, F]`."""
        return self.code[:, index * self.n_features : (index + 1) * self.n_features].tocsc()


@dataclass(frozen=True)
class Measured:
    """One pass of a dictionary over held-out tokens."""

    activity: Activity
    explained_variance_L: np.ndarray  # each layer: 1 - squared error / variance; nan where nobody writes
    explained_variance: float  # the same ratio of sums over all layers of the scaled activations


@torch.no_grad()
def measure_dictionary(dictionary: Dictionary, batches: Iterable[Tensor]) -> Measured:
    """Activity and explained variance of `dictionary` on `batches` `[B, L, D]`, in evaluation mode.

    Sums are float64 over all tokens, so the batch size does not matter. Layers that the dictionary's structure leaves
    unwritten count in no sum. Groups are what has a row of its own for every token: the layers of a bank, also of one
    whose layers share their weights.

    Raises:
        ValueError: there is no token, or a layer is constant.
    """
    n_layers, n_features = dictionary.config.n_layers, dictionary.config.n_features
    written, n_groups = dictionary.config.written(), 1
    was_training = dictionary.training
    dictionary.eval()
    error_L, square_L = torch.zeros(n_layers, dtype=torch.float64), torch.zeros(n_layers, dtype=torch.float64)
    sum_LD = torch.zeros(n_layers, dictionary.config.d_model, dtype=torch.float64)
    parts, n_tokens = [], 0
    for x_BLD in batches:
        out = dictionary(x_BLD)
        n_groups = math.prod(out.code.batch_shape[1:])
        parts.append(sparse_rows(out.code, x_BLD.shape[0], n_groups, n_features))
        error_L += (x_BLD - out.recon).double().square().sum((0, 2)).cpu()
        square_L += x_BLD.double().square().sum((0, 2)).cpu()
        sum_LD += x_BLD.double().sum(0).cpu()
        n_tokens += x_BLD.shape[0]
    dictionary.train(was_training)
    if n_tokens == 0:
        raise ValueError("no tokens to measure the dictionary on; the held-out activations are empty")
    variance_L = square_L - sum_LD.square().sum(1) / n_tokens
    if not bool((variance_L[written] > 0).all()):
        raise ValueError(f"a layer is constant over the {n_tokens} held-out tokens: no variance to explain")
    code = sparse.csr_array(sparse.vstack(parts, format="csr"))
    explained_L = torch.full_like(error_L, torch.nan)
    explained_L[written] = 1 - error_L[written] / variance_L[written]
    return Measured(
        Activity(code, n_groups),
        explained_L.numpy(),
        float(1 - error_L[written].sum() / variance_L[written].sum()),
    )


def sparse_rows(code: SparseCode, n_tokens: int, n_groups: int, n_features: int) -> sparse.csr_array:
    """The active features of a batch's code as one matrix `[T, G * F]`, float32, without stored zeros."""
    values = code.values.float().cpu().numpy()
    columns = to_global(code, n_groups).cpu().numpy()
    starts = code.offsets[::n_groups].cpu().numpy()  # rows of one token are neighbours
    rows = sparse.csr_array((values, columns, starts), shape=(n_tokens, n_groups * n_features))
    rows.eliminate_zeros()
    return rows


def layer_profile(decoder_FLD: np.ndarray) -> np.ndarray:
    """Share of each feature's squared decoder norm on each layer, `e[i, l] = |W_il|^2 / sum_l |W_il|^2`, `[F, L]`.

    A feature whose decoder is zero has no profile; its row is zero.
    """
    energy_FL = np.square(decoder_FLD.astype(np.float64)).sum(2)
    total_F = energy_FL.sum(1, keepdims=True)
    return np.divide(energy_FL, total_F, out=np.zeros_like(energy_FL), where=total_F > 0)


def participation_ratio(profile_FL: np.ndarray) -> np.ndarray:
    """How many layers a feature occupies, `rho_i = 1 / sum_l e_il^2`, from 1 (one layer) to L (evenly spread)."""
    square_F = np.square(profile_FL).sum(1)
    return np.divide(1.0, square_F, out=np.zeros_like(square_F), where=square_F > 0)


def lifespan(profile_FL: np.ndarray) -> np.ndarray:
    """Number of layers whose share is at least half the feature's largest share."""
    return (occupied_layers(profile_FL)).sum(1)


def occupied_layers(profile_FL: np.ndarray) -> np.ndarray:
    """True where a layer holds at least half the feature's largest share, `[F, L]`."""
    peak_F1 = profile_FL.max(1, keepdims=True)
    return (profile_FL >= 0.5 * peak_F1) & (peak_F1 > 0)


def profile_entropy(profile_FL: np.ndarray) -> np.ndarray:
    """exp of the Shannon entropy of the profile: another count of occupied layers, from 1 to L."""
    logs = np.log(profile_FL, out=np.zeros_like(profile_FL), where=profile_FL > 0)
    return np.exp(-(profile_FL * logs).sum(1))


def center_of_mass(profile_FL: np.ndarray) -> np.ndarray:
    """Mean layer of each feature, counted from 0, weighted by its profile."""
    return profile_FL @ np.arange(profile_FL.shape[1])


def adjacent_cosine(decoder_FLD: np.ndarray, profile_FL: np.ndarray) -> np.ndarray:
    """Mean cosine between a feature's decoder rows at neighbouring layers that it occupies both; nan if none.

    1: the feature keeps its direction. Lower: it drifts as it passes through the blocks.
    """
    rows = decoder_FLD.astype(np.float64)
    norm_FL = np.linalg.norm(rows, axis=2)
    dot = np.einsum("fld,fld->fl", rows[:, :-1], rows[:, 1:])
    both = occupied_layers(profile_FL)
    both = both[:, :-1] & both[:, 1:]
    scale = np.where(both, norm_FL[:, :-1] * norm_FL[:, 1:], 1.0)
    count_F = both.sum(1)
    total_F = np.where(both, dot / scale, 0.0).sum(1)
    return np.divide(total_F, count_F, out=np.full(len(total_F), np.nan), where=count_F > 0)
