"""What every dictionary is: the sparse code it speaks in, its settings, and the protocol that the floors above use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from crosscoder.dictionary import structure as layers
from crosscoder.dictionary.sparsity import BatchTopK, Sparsity, TopK
from crosscoder.dictionary.structure import Acausal, Structure


@dataclass(frozen=True, eq=False)
class SparseCode:
    """The active features of a batch, as CSR.

    Row r owns pairs `offsets[r] : offsets[r + 1]`; within a row features ascend. For a crosscoder a row is a token
    and `batch_shape` is the input's leading shape; for a bank a row is a (token, layer), `batch_shape` ends in L, and
    `features` count from 0 within each layer. Values are >= 0; codes of TopK, and of JumpReLU in training, may hold
    zeros, which are not active.
    """

    values: Tensor  # [P]
    features: Tensor  # [P], int32, 0 <= feature < n_features
    offsets: Tensor  # [R + 1], int64
    n_features: int
    batch_shape: tuple[int, ...]
    global_features: Tensor | None = None
    """Features counted over all layers of a bank, `layer * F + feature`, where the encoder had them at hand."""

    @property
    def n_pairs(self) -> int:
        """P, the stored pairs."""
        return self.values.numel()

    @property
    def n_rows(self) -> int:
        """R, the product of `batch_shape`."""
        return self.offsets.numel() - 1

    def rows(self) -> Tensor:
        """The row of each pair, as int64 `[P]`."""
        rows = torch.arange(self.n_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.n_pairs)

    def l0(self) -> Tensor:
        """Active features of each row, as int64 in `batch_shape`."""
        counts = torch.zeros(self.n_rows, dtype=torch.int64, device=self.offsets.device)
        counts.index_add_(0, self.rows(), (self.values > 0).long())
        return counts.view(self.batch_shape)

    def prefix(self, size: int) -> SparseCode:
        """The code of the first `size` features alone, in a bank of each layer's; the same rows and `n_features`."""
        kept_P = self.features < size
        ends = torch.nn.functional.pad(kept_P.cumsum(0), (1, 0))
        return replace(
            self,
            values=self.values[kept_P],
            features=self.features[kept_P],
            offsets=ends[self.offsets],
            global_features=None if self.global_features is None else self.global_features[kept_P],
        )

    def to_dense(self) -> Tensor:
        """The code with its zeros, `[*batch_shape, F]`; differentiable in `values`. Costs R * F numbers."""
        flat = self.values.new_zeros(self.n_rows * self.n_features)
        position = self.rows() * self.n_features + self.features
        return flat.index_put((position,), self.values).view(*self.batch_shape, self.n_features)


class DictionaryOutput(NamedTuple):
    """What a forward pass gives: the reconstruction `[..., L, D]` and the code it was made from."""

    recon: Tensor
    code: SparseCode


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """Shape and behaviour of a dictionary. `n_features` is per layer for a bank.

    decoder: `unit` keeps every feature's whole decoder row (all its layers together) at norm 1; `free` leaves it.
    selection_weight: what scores are multiplied by when choosing the active features: nothing, the norm of the
        feature's whole decoder row (`l2`), or the sum over layers of its norms (`l1`, Lindsey et al. 2024).
    aux_k: dead features asked to reconstruct the residual (AuxK, Gao et al. 2024, section A.2); None chooses half the
        width that one feature reads, at most 512; 0 turns the term off.
    prefixes: fractions of the features, ascending, that must also reconstruct alone: the first ones by index
        (Matryoshka, Bussmann et al. 2025); with any sparsity rule. None by default.
    seed: of the initial decoder directions.
    structure: which layers each feature of a crosscoder reads and writes, see `structure`. A bank takes the default.
    initial: `independent` draws a direction for each layer of a feature; `same` draws one for all of its layers, so
        that a bank's SAEs all start alike.
    shared: a bank whose layers are one and the same SAE (MLSAE); a crosscoder takes the default.
    """

    n_layers: int
    d_model: int
    n_features: int
    sparsity: Sparsity = field(default_factory=TopK)
    decoder: Literal["unit", "free"] = "unit"
    selection_weight: Literal["none", "l2", "l1"] = "none"
    aux_k: int | None = None
    prefixes: tuple[float, ...] = ()
    seed: int = 0
    structure: Structure = field(default_factory=Acausal)
    initial: Literal["independent", "same"] = "independent"
    shared: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_features"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        if isinstance(self.sparsity, TopK | BatchTopK) and self.sparsity.k > self.n_features:
            raise ValueError(
                f"k = {self.sparsity.k} active features cannot come from n_features = {self.n_features}; "
                "lower k or raise n_features"
            )
        if self.decoder not in ("unit", "free"):
            raise ValueError(f"decoder is {self.decoder!r}; expected 'unit' or 'free'")
        if self.selection_weight not in ("none", "l2", "l1"):
            raise ValueError(f"selection_weight is {self.selection_weight!r}; expected 'none', 'l2' or 'l1'")
        if self.selection_weight != "none" and not isinstance(self.sparsity, TopK | BatchTopK):
            raise ValueError(
                f"selection_weight is {self.selection_weight!r}, but {type(self.sparsity).__name__} does not rank "
                "features; use 'none'"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}; expected a whole number from 0 to 2**63 - 1")
        if self.aux_k is not None and self.aux_k < 0:
            raise ValueError(f"aux_k is {self.aux_k}; expected 0 (off), a positive number, or None for the default")
        sizes = (0, *self.prefix_sizes(), self.n_features)
        if not isinstance(self.prefixes, tuple) or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(
                f"prefixes are {self.prefixes!r}, which are {sizes[1:-1]} of {self.n_features} features; expected a "
                "tuple of rising fractions between 0 and 1, such as (0.125, 0.25, 0.5)"
            )
        if self.initial not in ("independent", "same"):
            raise ValueError(f"initial is {self.initial!r}; expected 'independent' or 'same'")
        if not isinstance(self.structure, Structure):
            raise ValueError(f"structure is {self.structure!r}; expected one such as Acausal() or LocalWindow(2)")
        shape = {"n_features": self.n_features, "n_layers": self.n_layers, "d_model": self.d_model}
        layers.check_structure(self.structure, **shape)

    def prefix_sizes(self) -> tuple[int, ...]:
        """How many features each of `prefixes` holds, at each layer in a bank."""
        return tuple(round(fraction * self.n_features) for fraction in self.prefixes)

    def masks(self) -> layers.Masks | None:
        """Which weights of a crosscoder exist; None where all do."""
        shape = {"n_features": self.n_features, "n_layers": self.n_layers, "d_model": self.d_model}
        return layers.feature_masks(self.structure, **shape)

    def written(self) -> slice:
        """The layers that are reconstructed; the others count in no error."""
        return slice(layers.first_written(self.structure, self.n_layers), None)

    def n_written(self) -> int:
        """How many numbers of a token are reconstructed: L * D, without padding and layers that nobody writes."""
        widths = layers.layer_widths(self.structure, n_layers=self.n_layers, d_model=self.d_model)
        return sum(widths[self.written()])

    def n_read(self) -> int:
        """The most numbers of a token that one feature of a crosscoder reads."""
        return layers.read_width(self.structure, n_layers=self.n_layers, d_model=self.d_model)


class Grouped(NamedTuple):
    """A dictionary's parameters as G independent dictionaries side by side, each reading N numbers.

    A crosscoder is G = 1, N = L * D; a bank is G = L, N = D; an SAE that all layers share is G = 1, N = D, and has L
    rows a token. `x.reshape(-1, G, N)` is what they read of `x_BLD`. The centre is a view: writing to it writes to the
    dictionary; weights are views too where no structure masks them.
    """

    encoder_GFN: Tensor
    decoder_GFN: Tensor
    encoder_bias_GF: Tensor
    center_GN: Tensor
    working_GFN: Tensor | None = None
    """The encoder rounded for its product, where a trainer keeps one beside it."""
    log_threshold_GF: Tensor | None = None
    """Of a JumpReLU dictionary."""


class Dictionary(Protocol):
    """A map `x_BLD -> recon_BLD` through a sparse code. `Crosscoder` and `LayerwiseSAE` are the two that exist."""

    config: DictionaryConfig
    threshold: Tensor
    input_scale: Tensor
    working_encoder: Tensor | None
    training: bool

    def __call__(self, x: Tensor) -> DictionaryOutput: ...
    def encode(self, x: Tensor) -> SparseCode: ...
    def decode(self, code: SparseCode) -> Tensor: ...
    def grouped(self) -> Grouped: ...
    def decoder_FLD(self) -> Tensor: ...
    def parameters(self) -> Any: ...
    def named_parameters(self) -> Any: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


def checked_input(x: Tensor, config: DictionaryConfig) -> Tensor:
    """`x` flattened to `[B, L, D]`.

    Raises:
        ValueError: `x` does not end in `[n_layers, d_model]`, or is not floating point.
    """
    expected = (config.n_layers, config.d_model)
    if not isinstance(x, Tensor):
        raise ValueError(f"input is a {type(x).__name__}; expected a tensor, as from torch.as_tensor(x)")
    if x.ndim < 2 or tuple(x.shape[-2:]) != expected:
        hint = ""
        if x.ndim >= 2 and tuple(x.shape[-2:]) == expected[::-1]:
            hint = " The last two axes look swapped: use x.transpose(-1, -2)."
        elif x.shape[-1] == config.d_model:
            hint = " All layers of a token are needed together, stacked on the axis before the last."
        raise ValueError(
            f"input has shape {tuple(x.shape)}; expected [..., n_layers={expected[0]}, d_model={expected[1]}].{hint}"
        )
    if not x.is_floating_point():
        raise ValueError(f"input has dtype {x.dtype}; expected floating-point activations, not token ids")
    return x.reshape(-1, *expected)


def finite_input(x_BLD: Tensor) -> Tensor:
    """`x_BLD`, after checking it: a selection by threshold would turn NaN into "no active feature" without a word.

    Raises:
        ValueError: some number is NaN or infinite; names the first token and layer.
    """
    if x_BLD.numel() and not bool(torch.isfinite(x_BLD.abs().amax())):
        token, layer, _ = (~torch.isfinite(x_BLD)).nonzero()[0].tolist()
        raise ValueError(f"input holds NaN or infinity, first at token {token}, layer {layer}; drop such tokens")
    return x_BLD
