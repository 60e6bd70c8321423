"""Sparse dictionaries over the layers of a token: what all of them share, and the two that exist.

`Dictionary` is abstract; `Crosscoder` and `LayerwiseSAE` are its final forms. They differ in how weights are laid out
over layers, and so in what a row of the sparse code is. The rest is here once, on weights seen as `Grouped`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn

import triton_kernels
from crosscoder.dictionary import codec
from crosscoder.dictionary.codec import DictionaryOutput, Grouped, SparseCode, checked_input, non_finite
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.kept import Kept
from crosscoder.dictionary.shard import Shard
from crosscoder.dictionary.sparsity import JumpReLU, Sparsity, TopK
from crosscoder.dictionary.structure import Acausal, AnyStructure
from crosscoder.dictionary.weights import OF_FEATURES, Layout, masked, unit_rows
from crosscoder.foundation.origin import MismatchError, Reads, require_same


class Dictionary(Kept):
    """A map `x_BLD -> recon_BLD` through a sparse code. What the keyword arguments mean `DictionaryConfig` says.

    Parameters: `encoder`, `decoder`, `encoder_bias`, `decoder_bias`, and with JumpReLU `log_threshold`. Buffers:
    `threshold` `[G]` (BatchTopK at inference; nan until trained) and `input_scale` `[L]` (what raw activations were
    multiplied by to become this dictionary's inputs). `reads` is the record of those activations, kept with the
    weights; None where nobody told it. `frozen` is what of it was not trained (`TrainConfig.frozen`), kept too.

    shard: a `Shard`: hold its features, or its layers of a bank, alone, as they begin in the whole dictionary; `train`
        trains all parts together.

    Raises:
        ValueError: a setting is out of range, does not fit the others, or is for the other form.
    """

    input_scale: Tensor
    _most: tuple[tuple[int, int] | None, float] = None, 0.0

    @torch.inference_mode(False)  # parameters that were made in it could never be trained
    def __init__(
        self,
        *,
        n_layers: int,
        d_model: int,
        n_features: int,
        sparsity: Sparsity = TopK(),  # noqa: B008  (frozen)
        decoder: Literal["unit", "free"] = "unit",
        selection_weight: Literal["none", "l2", "l1"] = "none",
        aux_k: int | None = None,
        prefixes: tuple[float, ...] = (),
        seed: int = 0,
        structure: AnyStructure = Acausal(),  # noqa: B008  (frozen)
        initial: Literal["independent", "same"] = "independent",
        shared: bool = False,
        shard: Shard | None = None,
    ) -> None:
        super().__init__()
        self.config = config = DictionaryConfig(
            n_layers=n_layers, d_model=d_model, n_features=n_features, sparsity=sparsity, decoder=decoder,
            selection_weight=selection_weight, aux_k=aux_k, prefixes=prefixes, seed=seed, structure=structure,
            initial=initial, shared=shared,
        )  # fmt: skip
        n_axes, shapes = len(self.layout(config).row), self.tensor_shapes(config)
        read, write = config.masks() or (None, None)
        self.shard = shard
        if shard is not None:
            shard.require(config.n_features, self.layout(config).groups)
            read, write = (None if mask is None else shard.part(mask, 0) for mask in (read, write))
            axes = {name: self.axis_of(name) for name in shapes}
            shapes = {n: s if (axis := axes[n]) is None else shard.own_shape(s, axis) for n, s in shapes.items()}
        self.register_buffer("read_mask", read, persistent=False)
        self.register_buffer("write_mask", write, persistent=False)
        drawn = list(self.tensor_shapes(config)["decoder"])
        if config.initial == "same":
            drawn[self.layer_axis] = 1
        generator = torch.Generator().manual_seed(config.seed)
        axis = self.axis_of("decoder")
        if shard is None or axis is None or drawn[axis] == 1:  # one for all layers
            rows = torch.randn(drawn, generator=generator)
        else:
            rows = shard.drawn(drawn, axis, generator)
        rows = rows.expand(shapes["decoder"])
        self.encoder = nn.Parameter(unit_rows(rows, n_axes=n_axes, mask=read))
        self.decoder = nn.Parameter(unit_rows(rows, n_axes=n_axes, mask=write))
        self.encoder_bias = nn.Parameter(torch.zeros(shapes["encoder_bias"]))
        self.decoder_bias = nn.Parameter(torch.zeros(shapes["decoder_bias"]))
        self.log_threshold: nn.Parameter | None = None
        if isinstance(config.sparsity, JumpReLU):
            start = math.log(config.sparsity.threshold)
            self.log_threshold = nn.Parameter(torch.full(shapes["log_threshold"], start))
        self.register_buffer("threshold", torch.full(shapes["threshold"], float("nan")))
        self.register_buffer("input_scale", torch.ones(shapes["input_scale"]))

    @staticmethod
    def forms() -> dict[str, type[Dictionary]]:
        return DICTIONARIES

    @staticmethod
    @abstractmethod
    def layout(config: DictionaryConfig) -> Layout:
        """How the weights of this config lie; a ValueError where a setting is for the other form."""

    @abstractmethod
    def decoder_FLD(self) -> Tensor:
        """What each feature writes to each layer, without gradient; a bank has L * F features, zero off their layer."""

    @property
    def is_bank(self) -> bool:
        """Whether each feature has one layer of several."""
        return self.grouped().encoder_GFN.shape[2] < self.config.n_layers * self.config.d_model

    @property
    def rows_of_token(self) -> int:
        """The rows that a token has in the code, with those of layers that other ranks hold."""
        return math.prod(self.layout(self.config).rows_of_token)

    @classmethod
    def tensor_shapes(cls, config: DictionaryConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a dictionary of this config holds, without making one."""
        groups, row, _ = cls.layout(config)
        shapes = {
            "encoder": (*groups, config.n_features, *row),
            "decoder": (*groups, config.n_features, *row),
            "encoder_bias": (*groups, config.n_features),
            "decoder_bias": (*groups, *row),
            "threshold": groups or (1,),
            "input_scale": (config.n_layers,),
        }
        if isinstance(config.sparsity, JumpReLU):
            shapes["log_threshold"] = (*groups, config.n_features)
        return shapes

    def axis_of(self, name: str) -> int | None:
        """The axis along which ranks divide the named tensor; None where each of them holds it whole."""
        if self.shard is None or name == "input_scale" or (self.shard.along == "features" and name not in OF_FEATURES):
            return None
        return self.shard.axis(len(self.layout(self.config).groups))

    def set_input(self, scale_L: Tensor, reads: Reads | None) -> None:
        """Take over the scale of the inputs, and the record of what they are; raises as `require_input`."""
        self.require_input(scale_L, reads)
        self.input_scale.copy_(scale_L)
        self.reads = reads or self.reads

    def require_input(self, scale_L: Tensor, reads: Reads | None) -> None:
        """Refuse inputs of another scale or record than were set before."""
        if scale_L.shape != self.input_scale.shape or not bool((scale_L > 0).all()):
            raise ValueError(f"scales are {scale_L.tolist()}; expected {len(self.input_scale)} positive numbers")
        require_same(self.reads, reads, owner="the dictionary", given="its batches")
        was_set = self.reads is not None or bool((self.input_scale != 1).any())
        if was_set and not torch.allclose(self.input_scale.cpu(), scale_L.cpu(), rtol=1e-5):
            raise MismatchError(
                f"the batches were multiplied by {_numbers(scale_L)}, the dictionary's input_scale is "
                f"{_numbers(self.input_scale)}; give the scale of the batches, or batches of the dictionary's"
            )

    def require_input_scale(self, use: str, *, raw_inputs: bool = False) -> None:
        """Refuse a use that needs the scale of the inputs where nobody told it, or where raw inputs contradict it."""
        if not bool((self.input_scale > 0).all() and torch.isfinite(self.input_scale).all()):
            raise ValueError(f"input_scale is {_numbers(self.input_scale)}; {use} divides by it: set positive numbers")
        known = self.reads is not None or bool((self.input_scale != 1).any())
        if known and raw_inputs:
            raise MismatchError(
                f"this dictionary keeps the scale of its inputs; {use} takes that: leave out raw_inputs"
            )
        if not known and not raw_inputs:
            raise MismatchError(
                f"{use} needs the scale of this dictionary's inputs, and it keeps none: give it that of its batches by "
                "dictionary.set_input(source.scale_L, source.reads); if it was trained on raw activations, say so by "
                "raw_inputs=True or --raw-inputs"
            )

    def extra_repr(self) -> str:
        c = self.config
        size = f"{c.n_layers} layers x {c.d_model}, {c.n_features} features, {c.sparsity}"
        frozen = "" if self.frozen == "none" else f", {self.frozen} frozen at its start"
        return f"{size}{frozen}\nreads {self.reads or 'no record of what'}"

    @torch.no_grad()
    def project_(self) -> Self:
        """Puts right, in place, what a step of any optimiser undoes, and returns the dictionary: rows of a `unit`
        decoder have norm 1 over all their layers again, and weights outside the structure are 0. `train` does so by
        itself. A row of 0 has no direction and stays. Nothing is done to biases and thresholds.
        """
        n_axes = len(self.layout(self.config).row)
        for weight, mask in ((self.encoder, self.read_mask), (self.decoder, self.write_mask)):
            if mask is not None:
                weight.mul_(mask)
        if self.config.decoder == "unit":
            norm = self.decoder.norm(dim=tuple(range(-n_axes, 0)), keepdim=True)
            self.decoder.div_(torch.where(norm > 0, norm, 1))
        return self

    def encode(self, x: Tensor) -> SparseCode:
        """The code of `x` `[..., L, D]`; a row is a token, or a (token, layer) of a bank.

        Raises:
            ValueError: `x` does not end in `[L, D]`, or, in evaluation mode, is not finite or finds no threshold; or
                other ranks hold a part of the features.
        """
        self.require_whole()
        x_BLD = checked_input(x, self.config).to(self.encoder.dtype)
        # A selection by threshold would turn NaN into "no active feature" without a word.
        if not self.training and (where := non_finite(x_BLD)):
            raise ValueError(f"input holds NaN or infinity{where}; drop such tokens")
        if not self.training:
            codec.require_scores_in_range(x_BLD, self.grouped(), self._most_weight())
        code = self.encode_checked(x_BLD, self.grouped(), batch_shape=tuple(x.shape[:-2]))
        if not self.training and not bool(torch.isfinite(code.values).all()):
            raise ValueError("the code holds values that are not finite: the weights are too large for their dtype")
        return code

    @torch.no_grad()
    def _most_weight(self) -> float:
        """The encoder's largest number, kept until somebody writes to it."""
        encoder = self.encoder
        version = None if encoder.is_inference() else (encoder.data_ptr(), encoder._version)
        if version is None or self._most[0] != version:
            self._most = version, float(encoder.abs().amax())
        return self._most[1]

    def encode_checked(
        self, x_BLD: Tensor, grouped: Grouped, *, batch_shape: tuple[int, ...], dense: bool = False
    ) -> SparseCode:
        """The code of an input that has been checked, by the parameters at hand; `dense` by the slow, obvious form."""
        values, features, offsets, cut_G = codec.encode_grouped(
            grouped.split(x_BLD),
            grouped,
            self.config,
            threshold_G=self.threshold,
            training=self.training,
            dense=dense,
            shard=self.others,
        )
        # Without gradient this is no training step.
        if cut_G is not None and torch.is_grad_enabled() and not dense:
            self.follow(cut_G)
        n_features, rows = self.n_held, x_BLD.shape[1:2] if self.layout(self.config).rows_of_token else ()
        local, by_group = (features, None) if self.n_groups == 1 else (features % n_features, features)
        return SparseCode(values, local, offsets, n_features, (*batch_shape, *rows), by_group)

    def decode(self, code: SparseCode) -> Tensor:
        """The reconstruction `[..., L, D]` of a code; of features that other ranks hold nothing is in it."""
        grouped, config = self.grouped(), self.config
        table_FN = rearrange(grouped.decoder_GFN, "g f n -> (g f) n")
        features, values = codec.to_global(code, self.n_groups), code.values.to(table_FN.dtype)
        recon_RN = triton_kernels.gather_sum(values, features, code.offsets, table_FN)
        recon_BGN = grouped.split(recon_RN) + grouped.center_GN
        n_axes = len(code.batch_shape) - len(self.layout(config).rows_of_token)
        return recon_BGN.view(*code.batch_shape[:n_axes], config.n_layers, config.d_model)

    def forward(self, x: Tensor) -> DictionaryOutput:
        """`recon` `[..., L, D]` and `code` of `x` `[..., L, D]`."""
        code = self.encode(x)
        recon = self.decode(code)
        if not self.training and not bool(torch.isfinite(recon).all()):
            raise ValueError("the reconstruction is not finite: values and decoder are too large for their dtype")
        return DictionaryOutput(recon, code)

    def encode_dense(self, x: Tensor) -> Tensor:
        """The code of `x` with its zeros, by dense operators that autograd differentiates; for checks and small F."""
        x_BLD = checked_input(x, self.config)
        batch_shape = tuple(x.shape[:-2])
        return self.encode_checked(x_BLD, self.grouped(), batch_shape=batch_shape, dense=True).to_dense()


class Crosscoder(Dictionary):
    """Crosscoder (Lindsey et al. 2024): one code for all L layers of a token.

    `z_f = sum_l <encoder[f, l], x_l - decoder_bias_l> + encoder_bias_f`; the sparsity rule keeps some z, the code is
    their relu, and `recon_l = sum_f code_f decoder[f, l] + decoder_bias_l`. With L = 1 it is an ordinary SAE. Both sums
    run over the layers that `structure` gives each feature: all by default; causal, local, transcoding and diffing
    crosscoders are this class with other masks.

    Shapes: `encoder`, `decoder` `[F, L, D]`, `encoder_bias`, `log_threshold` `[F]`, `decoder_bias` `[L, D]`; G = 1.
    """

    layer_axis = 1

    @staticmethod
    def layout(config: DictionaryConfig) -> Layout:
        if config.shared:
            raise ValueError("shared=True is for a LayerwiseSAE; a Crosscoder is one dictionary already")
        return Layout((), (config.n_layers, config.d_model), ())

    def grouped(self) -> Grouped:
        return Grouped(
            masked(self.encoder, self.read_mask).flatten(1)[None],
            masked(self.decoder, self.write_mask).flatten(1)[None],
            self.encoder_bias[None],
            self.decoder_bias.flatten()[None],
            None if self.log_threshold is None else self.log_threshold[None],
        )

    def decoder_FLD(self) -> Tensor:
        return masked(self.decoder.detach(), self.write_mask)


class LayerwiseSAE(Dictionary):
    """L per-layer SAEs of `n_features` each; the per-layer arm that a crosscoder is compared with.

    At layer l: `z_lf = <encoder[l, f], x_l - decoder_bias_l> + encoder_bias_lf`; the sparsity rule acts within each
    layer, and `recon_l = sum_f code_lf decoder[l, f] + decoder_bias_l`. With L = 1 it equals a one-layer crosscoder.

    `initial="same"` starts all SAEs alike, so that feature f of two layers begins as one. `shared=True` makes them one
    SAE with one set of weights, which reads every layer by itself (the multi-layer SAE of Lawson et al. 2024, arXiv
    2409.04185): `z_lf = <encoder[f], x_l - decoder_bias> + encoder_bias_f`. Its rows are (token, layer) too; a
    BatchTopK batch makes one cut over all layers, and a feature is dead if no layer activates it.

    Shapes, with G = L, or 1 for a shared SAE: `encoder`, `decoder` `[G, F, D]`, `encoder_bias`, `log_threshold`
    `[G, F]`, `decoder_bias` `[G, D]`.
    """

    layer_axis = 0

    @staticmethod
    def layout(config: DictionaryConfig) -> Layout:
        if not isinstance(config.structure, Acausal):
            raise ValueError(f"structure {config.structure} is for a Crosscoder; each SAE of a bank has one layer")
        return Layout((1 if config.shared else config.n_layers,), (config.d_model,), (config.n_layers,))

    def grouped(self) -> Grouped:
        return Grouped(self.encoder, self.decoder, self.encoder_bias, self.decoder_bias, self.log_threshold)

    def decoder_FLD(self) -> Tensor:
        n_layers, n_features, d_model = self.config.n_layers, *self.decoder.shape[1:]
        out = self.decoder.new_zeros(n_layers, n_features, n_layers, d_model)
        index = torch.arange(n_layers, device=out.device)
        out[index, :, index] = self.decoder.detach()
        return out.flatten(0, 1)


DICTIONARIES: dict[str, type[Dictionary]] = {form.__name__: form for form in (Crosscoder, LayerwiseSAE)}


def _numbers(scale_L: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in scale_L.tolist())
