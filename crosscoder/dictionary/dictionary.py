"""Sparse dictionaries over the layers of a token: what all of them share, and the two that exist.

`Dictionary` is abstract; `Crosscoder` and `LayerwiseSAE` are its final forms. They differ in how weights are laid out
over layers, and so in what a row of the sparse code is. The rest is here once, on weights seen as `Grouped`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import triton_kernels
from crosscoder.dictionary import codec
from crosscoder.dictionary.codec import DictionaryOutput, Grouped, SparseCode, checked_input, non_finite
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.sparsity import BatchTopK, JumpReLU
from crosscoder.dictionary.structure import Acausal
from crosscoder.foundation.artifact import (
    MANIFEST,
    DamagedArtifactError,
    committed_directory,
    read_json,
    verify_directory,
    write_json,
)
from crosscoder.foundation.config import from_mapping, to_mapping
from crosscoder.foundation.console import say
from crosscoder.foundation.hub import local_folder
from crosscoder.foundation.origin import MismatchError, Reads, require_same

SCHEMA = "crosscoder.dictionary/1"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FILES = (CONFIG, WEIGHTS)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Layout(NamedTuple):
    """How weights `[*groups, F, *row]` lie: `groups` is `()` or `(G,)`, `row` `(L, D)` or `(D,)`.

    `rows_of_token` is `()` where a token is one row of the code, `(L,)` where each of its layers is.
    """

    groups: tuple[int, ...]
    row: tuple[int, ...]
    rows_of_token: tuple[int, ...]


class Weights(nn.Module, ABC):
    """The weights of G dictionaries side by side, and what a training step asks of them."""

    config: DictionaryConfig
    encoder: nn.Parameter
    decoder: nn.Parameter
    encoder_bias: nn.Parameter
    decoder_bias: nn.Parameter
    log_threshold: nn.Parameter | None
    read_mask: Tensor | None
    write_mask: Tensor | None
    threshold: Tensor

    @abstractmethod
    def grouped(self) -> Grouped:
        """The parameters as G dictionaries of width N, with 0 outside the masks."""

    @property
    def n_groups(self) -> int:
        """G, the dictionaries side by side that have weights of their own."""
        return self.threshold.numel()

    @torch.no_grad()
    def follow(self, cut_G: Tensor) -> None:
        """Move the inference threshold towards a training step's cut: the first counts whole, later 1 - momentum."""
        assert isinstance(self.config.sparsity, BatchTopK)
        cut_G = cut_G.to(self.threshold.dtype)
        mean_G = torch.lerp(cut_G, self.threshold, self.config.sparsity.momentum)
        self.threshold.copy_(torch.where(self.threshold.isnan(), cut_G, mean_G))


class Dictionary(Weights):
    """A map `x_BLD -> recon_BLD` through a sparse code. Keyword arguments are those of `DictionaryConfig`.

    Parameters: `encoder`, `decoder`, `encoder_bias`, `decoder_bias`, and with JumpReLU `log_threshold`. Buffers:
    `threshold` `[G]` (BatchTopK at inference; nan until trained) and `input_scale` `[L]` (what raw activations were
    multiplied by to become this dictionary's inputs). `reads` is the record of those activations, kept with the
    weights; None where nobody told it. `frozen` is what of it was not trained (`TrainConfig.frozen`), kept too.

    Raises:
        ValueError: a setting is out of range, does not fit the others, or is for the other form.
    """

    layer_axis: ClassVar[int]
    """The axis of the weights along which layers lie."""
    input_scale: Tensor
    reads: Reads | None = None
    frozen: str = "none"

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.config = config = DictionaryConfig(**settings)
        n_axes, shapes = len(self.layout(config).row), self.tensor_shapes(config)
        read, write = config.masks() or (None, None)
        self.register_buffer("read_mask", read, persistent=False)
        self.register_buffer("write_mask", write, persistent=False)
        drawn = list(shapes["decoder"])
        if config.initial == "same":
            drawn[self.layer_axis] = 1
        rows = torch.randn(drawn, generator=torch.Generator().manual_seed(config.seed)).expand(shapes["decoder"])
        self.encoder = nn.Parameter(_unit_rows(rows, n_axes=n_axes, mask=read))
        self.decoder = nn.Parameter(_unit_rows(rows, n_axes=n_axes, mask=write))
        self.encoder_bias = nn.Parameter(torch.zeros(shapes["encoder_bias"]))
        self.decoder_bias = nn.Parameter(torch.zeros(shapes["decoder_bias"]))
        self.log_threshold: nn.Parameter | None = None
        if isinstance(config.sparsity, JumpReLU):
            start = math.log(config.sparsity.threshold)
            self.log_threshold = nn.Parameter(torch.full(shapes["log_threshold"], start))
        self.register_buffer("threshold", torch.full(shapes["threshold"], float("nan")))
        self.register_buffer("input_scale", torch.ones(shapes["input_scale"]))

    @staticmethod
    @abstractmethod
    def layout(config: DictionaryConfig) -> Layout:
        """How the weights of this config lie; a ValueError where a setting is for the other form."""

    @abstractmethod
    def decoder_FLD(self) -> Tensor:
        """What each feature writes to each layer, without gradient; a bank has L * F features, zero off their layer."""

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

    def set_input(self, scale_L: Tensor, reads: Reads | None) -> None:
        """Take over the scale of the inputs, and the record of what they are; raises as `require_input`."""
        self.require_input(scale_L, reads)
        self.input_scale.copy_(scale_L)
        self.reads = reads or self.reads

    def require_input(self, scale_L: Tensor, reads: Reads | None) -> None:
        """Refuse inputs of another scale or record than were set before.

        Raises:
            MismatchError: as said.
        """
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
        """Refuse a use that needs the scale of the inputs where nobody told it.

        Raises:
            MismatchError: `input_scale` was never set, and nobody says that the inputs were raw activations; or
                somebody says so, and it was set.
        """
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

    def encode(self, x: Tensor) -> SparseCode:
        """The code of `x` `[..., L, D]`; a row is a token, or a (token, layer) of a bank.

        Raises:
            ValueError: `x` does not end in `[L, D]`, or, in evaluation mode, is not finite or finds no threshold.
        """
        x_BLD = checked_input(x, self.config).to(self.encoder.dtype)
        # A selection by threshold would turn NaN into "no active feature" without a word.
        if not self.training and (where := non_finite(x_BLD)):
            raise ValueError(f"input holds NaN or infinity{where}; drop such tokens")
        return self.encode_checked(x_BLD, self.grouped(), batch_shape=tuple(x.shape[:-2]))

    def encode_checked(
        self, x_BLD: Tensor, grouped: Grouped, *, batch_shape: tuple[int, ...], dense: bool = False
    ) -> SparseCode:
        """The code of an input that has been checked, by the parameters at hand; `dense` by the slow, obvious form."""
        values, features, offsets, cut_G = codec.encode_grouped(
            grouped.split(x_BLD), grouped, self.config, threshold_G=self.threshold, training=self.training, dense=dense
        )
        # Without gradient this is no training step.
        if cut_G is not None and torch.is_grad_enabled() and not dense:
            self.follow(cut_G)
        n_features, rows = self.config.n_features, self.layout(self.config).rows_of_token
        local, by_group = (features, None) if self.n_groups == 1 else (features % n_features, features)
        return SparseCode(values, local, offsets, n_features, (*batch_shape, *rows), by_group)

    def decode(self, code: SparseCode) -> Tensor:
        """The reconstruction `[..., L, D]` of a code."""
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
        return DictionaryOutput(self.decode(code), code)

    def encode_dense(self, x: Tensor) -> Tensor:
        """The code of `x` with its zeros, by dense operators that autograd differentiates; for checks and small F."""
        batch_shape = tuple(x.shape[:-2])
        x_BLD = checked_input(x, self.config)
        return self.encode_checked(x_BLD, self.grouped(), batch_shape=batch_shape, dense=True).to_dense()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights to `folder`, whole or not at all; other files there, such as a README, stay, and one
        of the same name that is not an older dictionary's is a FileExistsError."""
        with committed_directory(folder, schema=SCHEMA, files=FILES) as temporary:
            write_dictionary(self, temporary)

    @classmethod
    def from_pretrained(cls, where: str | Path, *, revision: str | None = None) -> Self:
        """The dictionary in a folder or a repository on the Hub, for evaluation; `Dictionary` itself reads both forms.

        where: a folder, or `organisation/repository`, of which the revision (a branch, tag or commit) is read. One
            without our manifest is loaded if its files agree with each other, and it is said that nobody checked them.

        Raises:
            FileNotFoundError: there is no dictionary there.
            DamagedArtifactError: a file fails its check, or a tensor is missing, misshapen or not finite.
            ValueError: the folder holds another class of dictionary.
        """
        folder = local_folder(where, files=(*FILES, MANIFEST), revision=revision)
        if all((folder / name).is_file() for name in FILES) and not (folder / MANIFEST).is_file():
            say(f"note: {where} has no {MANIFEST}, so nobody can tell whether its files are as they were written")
        else:
            verify_directory(folder, schema=SCHEMA, required=FILES)
        saved = read_json(folder / CONFIG)
        if not isinstance(saved, dict) or not isinstance(name := saved.get("class"), str):
            raise DamagedArtifactError(f"{folder / CONFIG} does not name a dictionary class")
        config = from_mapping(DictionaryConfig, saved.get("settings"), where=str(folder / CONFIG))
        form = DICTIONARIES.get(name)
        if form is None or not issubclass(form, cls):
            raise ValueError(f"{folder} holds a {name}, not a {cls.__name__}; load it as a {name}")
        tensors = _read_tensors(folder / WEIGHTS, form.tensor_shapes(config))
        dictionary = form(**config.settings())
        dictionary.load_state_dict(tensors)
        if saved.get("reads") is not None:
            dictionary.reads = from_mapping(Reads, saved["reads"], where=f"{folder / CONFIG}.reads")
        dictionary.frozen = str(saved.get("frozen", "none"))
        return dictionary.eval()


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
            _masked(self.encoder, self.read_mask).flatten(1)[None],
            _masked(self.decoder, self.write_mask).flatten(1)[None],
            self.encoder_bias[None],
            self.decoder_bias.flatten()[None],
            None if self.log_threshold is None else self.log_threshold[None],
        )

    def decoder_FLD(self) -> Tensor:
        return _masked(self.decoder.detach(), self.write_mask)


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


def write_dictionary(dictionary: Dictionary, folder: Path) -> None:
    """Write config and weights as plain files into `folder`, which the caller commits."""
    reads = None if dictionary.reads is None else to_mapping(dictionary.reads)
    config = {"class": type(dictionary).__name__, "settings": to_mapping(dictionary.config), "reads": reads}
    write_json(folder / CONFIG, {**config, "frozen": dictionary.frozen})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in dictionary.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)


def _read_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The file's tensors, after its own table was compared with what is expected.

    Opening checks the table against the file's size, so a shape that passes is one the file really holds.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            parts = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            found = {name: tuple(part.get_shape()) for name, part in parts.items()}
            if differing := sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)):
                details = "; ".join(f"{n}: file {found.get(n)}, config {expected.get(n)}" for n in differing)
                raise DamagedArtifactError(f"{path} does not hold the tensors its config describes: {details}")
            tensors = {name: stream.get_tensor(name) for name in parts}
    except SafetensorError as error:
        raise DamagedArtifactError(f"{path} is not a safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise DamagedArtifactError(f"{path}: {name} is {tensor.dtype}; expected one of {DTYPES}")
        # An untrained BatchTopK threshold is nan by definition; weights never are.
        if name != "threshold" and not bool(torch.isfinite(tensor).all()):
            raise DamagedArtifactError(f"{path}: {name} holds values that are not finite")
    return tensors


def _unit_rows(rows: Tensor, *, n_axes: int, mask: Tensor | None) -> Tensor:
    """The rows, masked, with norm 1 over their last `n_axes` axes together, as a tensor of its own."""
    rows = _masked(rows, mask)
    return rows / rows.norm(dim=tuple(range(-n_axes, 0)), keepdim=True)


def _numbers(scale_L: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in scale_L.tolist())


def _masked(weight_FLD: Tensor, mask: Tensor | None) -> Tensor:
    return weight_FLD if mask is None else weight_FLD * mask
