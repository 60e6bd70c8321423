"""What importers have in common: one SAE in one form, a bank of several, and a dictionary made of given tensors.

Dictionaries of other libraries read raw activations here: whatever scales their inputs is folded into the weights, so
that `input_scale` is 1. An SAE that does not subtract its decoder bias from its input gets the bias that makes up for
it, `encoder_bias = b + <encoder, decoder_bias>`, summed in float64.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from crosscoder.dictionary import (
    Acausal,
    BatchTopK,
    Crosscoder,
    Dictionary,
    DictionaryConfig,
    JumpReLU,
    LayerwiseSAE,
    Sparsity,
    TopK,
    Transcoder,
)
from crosscoder.dictionary.sparsity import L0Penalty
from crosscoder.formats.foreign import Tensors
from crosscoder.foundation.artifact import DamagedArtifactError
from crosscoder.foundation.console import say
from crosscoder.foundation.origin import Kind, ModelOrigin, Reads, TokenOrigin

FLOAT = torch.finfo(torch.float32)
JUMPRELU = JumpReLU(penalty=L0Penalty())
"""The rule of thresholds that others set: it aims at no L0, so that none is held against it."""
LARGEST = 1e30  # scale of a layer
AFTER, BEFORE = ("output", "hook_resid_post", "hook_out"), ("hook_resid_pre", "hook_in")
RESIDUAL = re.compile(rf"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.({'|'.join((*AFTER, *BEFORE))}))?")
MLP = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.mlp")
EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|embed_in|hook_embed)")
UNSAID = "places that its publisher does not say"
Form = TypeVar("Form", bound=Dictionary)


def printable(text: str) -> str:
    """Names out of other people's files, without what moves a terminal's cursor or turns text around; not too long."""
    return "".join(one if one.isprintable() else "?" for one in text[:500])


@dataclass(frozen=True, kw_only=True)
class About:
    """What a publisher says of a dictionary; `hooks` are the places it reads, one for each layer, empty if unsaid.

    record: what a dictionary of ours kept of what it reads, where the files are of our own export.
    """

    model: str = ""
    hooks: tuple[str, ...] = ()
    context: int = 0
    bos: bool | None = None
    convention: str = ""
    """Of what no harvest here reads."""
    record: Reads | None = None

    def reads(self, n_layers: int) -> Reads:
        """The record of a dictionary of so many layers; a place that is not a residual stream or an MLP is `other`."""
        if self.record is not None:
            sites, scale = self.record.sites, self.record.scale
            if len(sites) != n_layers or len(scale) not in (0, n_layers) or not all(0 < one < LARGEST for one in scale):
                raise DamagedArtifactError(
                    f"the record names sites {list(sites)} at scales {list(scale)}; expected one of each of the "
                    f"{n_layers} layers"
                )
            return self.record
        kind, sites = self.place(n_layers)
        hooks = ", ".join(self.hooks) or UNSAID
        return Reads(
            model=ModelOrigin(name=printable(self.model), weights=""),
            tokens=TokenOrigin(tokenizer="", context=self.context),
            site=kind,
            sites=sites,
            convention=printable(self.convention or ("" if kind != "other" else hooks)),
            published="published by somebody else",
        )

    def place(self, n_layers: int) -> tuple[Kind, tuple[int, ...]]:
        """Which kind of sites the hooks are, and their numbers as ours: 0 the embedding, l the output of block l."""
        for kind, find in (("residual", residual_site), ("mlp", mlp_site)):
            sites = [find(hook) for hook in self.hooks]
            if len(sites) == n_layers and not self.convention and None not in sites:
                return kind, tuple(site for site in sites if site is not None)
        return "other", tuple(range(1, n_layers + 1))


def residual_site(hook: str) -> int | None:
    """The site of a residual stream by a name of TransformerLens, `transformers` or sparsify; None for other places."""
    if EMBEDDING.fullmatch(hook):
        return 0
    found = RESIDUAL.fullmatch(hook)
    return None if found is None else int(found[1]) + (found[2] not in BEFORE)


def mlp_site(hook: str) -> int | None:
    """The block, counted from 1, whose MLP a name is of."""
    found = MLP.fullmatch(hook)
    return None if found is None else int(found[1]) + 1


@dataclass(frozen=True, kw_only=True)
class Flat:
    """One SAE: `code = rule((x - center) @ encoder^T + bias)`, `recon = code @ decoder + center`.

    threshold: of JumpReLU, of each feature; of BatchTopK one number.
    """

    encoder_FD: Tensor
    encoder_bias_F: Tensor
    decoder_FD: Tensor
    center_D: Tensor
    sparsity: Sparsity
    threshold: Tensor | None = None
    about: About = field(default_factory=About)

    @property
    def width(self) -> int:
        return self.encoder_FD.shape[1]

    def folded(self) -> Flat:
        """Encoder and bias times the norms of decoder rows, and unit rows; one of zeros has a feature without value."""
        norm_F = self.decoder_FD.norm(dim=1)
        own = {"encoder_FD": self.encoder_FD * norm_F[:, None], "encoder_bias_F": self.encoder_bias_F * norm_F}
        return replace(self, **own, decoder_FD=self.decoder_FD / torch.where(norm_F > 0, norm_F, 1)[:, None])


def own_matrices(held: Tensors, sparsity: Sparsity, *, centred: bool, upper: bool = True, **more: Any) -> Flat:
    """The SAE with matrices `W_enc [D, F]` and `W_dec [F, D]`, `b_enc`, `b_dec` (not `upper`: in small letters).

    centred: whether it subtracts `b_dec` from its input; else its bias is made to fit. JumpReLU has a `threshold` of
    each feature. more: of `Flat`.
    """
    enc, dec = ("W_enc", "W_dec") if upper else ("w_enc", "w_dec")
    width, n_features = held.shape(enc, 2)
    encoder_FD, center_D = held.take(enc, width, n_features).T.contiguous(), held.take("b_dec", width)
    bias_F = held.take("b_enc", n_features)
    if isinstance(sparsity, JumpReLU):
        more["threshold"] = held.take("threshold", n_features, finite=False)
    return Flat(
        encoder_FD=encoder_FD,
        encoder_bias_F=bias_F if centred else uncentred_bias(bias_F, encoder_FD, center_D),
        decoder_FD=held.take(dec, n_features, width),
        center_D=center_D,
        sparsity=sparsity,
        **more,
    )


def uncentred_bias(bias_F: Tensor, encoder_FD: Tensor, center_D: Tensor) -> Tensor:
    """The bias for centred inputs that does what `bias_F` does for those that are not: `b + <encoder, center>`."""
    blocks = zip(bias_F.split(8192), encoder_FD.split(8192), strict=True)  # in float64 the whole is twice the weights
    return torch.cat([bias.double() + rows.double() @ center_D.double() for bias, rows in blocks]).float()


def log_thresholds(threshold_F: Tensor) -> Tensor:
    """Logarithms of thresholds; those of 0 or less become the smallest normal number, infinite ones the largest.

    A feature is active where `z > threshold` and `z > 0`: for a negative one too, that is where z is positive.
    """
    if bool(threshold_F.isnan().any()):
        raise ValueError("a threshold is NaN; expected numbers")
    below, above = int((threshold_F < FLOAT.tiny).sum()), int((threshold_F > FLOAT.max / 2).sum())
    if below:
        say(f"note: {below} of {threshold_F.numel()} thresholds are below {FLOAT.tiny:.1e}, and become that")
    if above:
        say(f"note: {above} of {threshold_F.numel()} features have thresholds above {FLOAT.max / 2:.1e}: never active")
    return threshold_F.double().clamp(FLOAT.tiny, FLOAT.max / 2).log().float()


def assemble(form: type[Form], settings: dict[str, Any], tensors: dict[str, Tensor], reads: Reads) -> Form:
    """A dictionary for evaluation that owns the given tensors, without drawing a start for it first."""
    config = DictionaryConfig(decoder="free", **settings)
    with torch.device("meta"):  # without a structure: its masks are tables that have to be computed
        plain: dict[str, Any] = {**config.settings(), "structure": Acausal()}
        dictionary = form(**plain)
    dictionary.config, shapes = config, form.tensor_shapes(config)
    tensors.setdefault("threshold", torch.full(shapes["threshold"], float("nan")))
    tensors.setdefault("input_scale", torch.ones(shapes["input_scale"]))
    dictionary.load_state_dict(tensors, assign=True)
    dictionary.read_mask, dictionary.write_mask = config.masks() or (None, None)
    dictionary.reads = reads
    return dictionary.eval()


def bank(flats: Sequence[Flat]) -> LayerwiseSAE:
    """SAEs of several layers side by side, in their order."""
    first = flats[0]
    records = [flat.about.record for flat in flats if flat.about.record is not None]
    for name, of in (
        ("the width", lambda one: one.width),
        ("the number of features", lambda one: len(one.encoder_FD)),
        ("the rule", lambda one: one.sparsity),
        ("the model", lambda one: one.about.model),
        ("the record", lambda one: one.about.record and str(replace(one.about.record, sites=()))),
        ("the tokens", lambda one: one.about.record and (one.about.record.skip_positions, one.about.record.tokens)),
    ):
        found = [of(flat) for flat in flats]  # records have no hash
        if len(seen := [one for number, one in enumerate(found) if one not in found[:number]]) > 1:
            raise ValueError(f"SAEs of one bank share {name}; here are {', '.join(map(str, seen)):.300}")
    tensors = {
        "encoder": torch.stack([flat.encoder_FD for flat in flats]),
        "decoder": torch.stack([flat.decoder_FD for flat in flats]),
        "encoder_bias": torch.stack([flat.encoder_bias_F for flat in flats]),
        "decoder_bias": torch.stack([flat.center_D for flat in flats]),
        **rule_tensors(first.sparsity, [flat.threshold for flat in flats if flat.threshold is not None]),
    }
    about = About(
        model=first.about.model,
        hooks=tuple(hook for flat in flats for hook in flat.about.hooks),
        context=first.about.context,
        record=_joined(records) if records else None,
    )
    shape = {"n_layers": len(flats), "d_model": first.width, "n_features": len(first.encoder_FD)}
    return assemble(LayerwiseSAE, {**shape, "sparsity": first.sparsity}, tensors, about.reads(len(flats)))


def _joined(records: Sequence[Reads]) -> Reads:
    """The record of a bank, of those of its layers."""
    sites, scale = ([each for one in records for each in getattr(one, name)] for name in ("sites", "scale"))
    return replace(records[0], sites=tuple(sites), scale=tuple(scale))


def rule_tensors(sparsity: Sparsity, thresholds: Sequence[Tensor]) -> dict[str, Tensor]:
    """The thresholds of G dictionaries under the names that a bank gives them."""
    match sparsity:
        case JumpReLU():
            return {"log_threshold": torch.stack([log_thresholds(one) for one in thresholds])}
        case BatchTopK():
            return {"threshold": torch.stack([one.reshape(()).float() for one in thresholds])}
        case _:
            return {}


def transcoder(flat: Flat) -> Crosscoder:
    """An SAE that reads one place and writes another: layers [input, output]; its input is not centred.

    flat: `center_D` is the bias of the output.
    """
    n_features, width = flat.encoder_FD.shape
    encoder, decoder = (torch.zeros(n_features, 2, width) for _ in range(2))
    encoder[:, 0], decoder[:, 1] = flat.encoder_FD, flat.decoder_FD
    bias_LD = torch.stack([torch.zeros(width), flat.center_D])
    tensors = {"encoder": encoder, "decoder": decoder, "encoder_bias": flat.encoder_bias_F, "decoder_bias": bias_LD}
    kept = {} if flat.threshold is None else rule_tensors(flat.sparsity, [flat.threshold])
    tensors |= {name: one[0] if name == "log_threshold" else one for name, one in kept.items()}
    settings = {"n_layers": 2, "d_model": width, "n_features": n_features, "structure": Transcoder()}
    return assemble(Crosscoder, {**settings, "sparsity": flat.sparsity}, tensors, flat.about.reads(2))


def require_k(k: int, n_features: int, where: Any) -> TopK:
    """TopK with a k that fits."""
    if not 1 <= k <= n_features:
        raise ValueError(f"{where}: k is {k}; expected 1 to the {n_features} features")
    return TopK(k=k)
