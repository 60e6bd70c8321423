"""What a dictionary's features do to a model that runs: add them, take them off, or put reconstructions in place.

Context managers over any `transformers` model whose blocks are found; generation works, with and without a cache:

    with steer(model, dictionary, {123: 8.0}):
        model.generate(**tokenizer("The president", return_tensors="pt"))

What a feature of activation 1 writes at layer l is `W_l / scale_l`, in the model's own units. At sites of kind `write`
that is added to what block l adds. A residual stream carries on what earlier blocks wrote, so there a layer's share is
what its row gains since the dictionary's layer before; with all layers moved, every stream has moved by `W_l /
scale_l`. A feature of a bank has one layer, and adds there what it writes. Tokens that the dictionary was not made to
read stay as they are: first positions and special tokens, and, where activations are read, outliers.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from crosscoder.data.hooks import replacing
from crosscoder.data.residuals import find_blocks
from crosscoder.data.sources import is_outlier
from crosscoder.data.subject import model_origin
from crosscoder.dictionary import Dictionary
from crosscoder.dictionary.codec import to_global
from crosscoder.foundation.origin import require_same
from crosscoder.measure.splice import feature_shares, recording_sites

CACHE_CHANGES = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")
"""What generation does to a cache between calls, and so to the clean one beside it."""


_LOOKING: ContextVar[bool] = ContextVar("looking", default=False)
"""Whether a model is run to find its blocks, which are then to run once, within other interventions too."""


class Where(NamedTuple):
    """Sites of a dictionary that keeps no record of them: block numbers from 1, one for each of its layers."""

    kind: Literal["residual", "write"]
    sites: Sequence[int]


@contextlib.contextmanager
def steer(
    model: nn.Module,
    dictionary: Dictionary,
    features: Mapping[int, float],
    *,
    layers: Sequence[int] | None = None,
    where: Where | None = None,
    blocks_path: str | None = None,
) -> Generator[None]:
    """Add `scale` times what a feature writes, for each `{feature: scale}`, at every token that the dictionary reads.

    A scale is in units of the feature's activation: that of its strongest examples makes the model go on as if they
    were everywhere. Features of a bank are numbered `layer * F + feature`.

    layers: block numbers on which to add; None: all of the dictionary's.
    where: for a dictionary without a record. blocks_path: for a model whose blocks are not found.

    Raises:
        MismatchError: the dictionary was trained on another model, or on a null.
        ValueError: there is no such feature or layer, or nothing says which sites the dictionary reads.
    """
    sites = _Sites.of(model, dictionary, where, blocks_path)
    share_nLD = sites.shares(features)
    scale_n = torch.tensor([float(scale) for scale in features.values()], device=share_nLD.device)
    moved_LD = torch.einsum("n,nld->ld", scale_n, share_nLD)

    def put(site: int, call: _Call, given: Tensor, returned: Tensor) -> Tensor:
        return returned + call.read_BS[:, :, None].to(returned) * moved_LD[site].to(returned)

    with _moving(model, sites, layers, put):
        yield


@contextlib.contextmanager
def ablate(
    model: nn.Module,
    dictionary: Dictionary,
    features: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    where: Where | None = None,
    blocks_path: str | None = None,
) -> Generator[None]:
    """Take what features write off every token on which they are active; arguments and errors are those of `steer`.

    Activations are those of the model as it is: every call runs it twice, first to read them.
    """
    sites = _Sites.of(model, dictionary, where, blocks_path)
    share_nLD, wanted_n = sites.shares(features), torch.tensor(list(features))

    def prepare(call: _Call, x_BSLD: Tensor) -> Tensor:
        return sites.values(x_BSLD, wanted_n) * call.read_BS[:, :, None].to(x_BSLD)

    def put(site: int, call: _Call, given: Tensor, returned: Tensor) -> Tensor:
        return returned - (call.prepared @ share_nLD[:, site]).to(returned)

    with _moving(model, sites, layers, put, prepare):
        yield


@contextlib.contextmanager
def replace(
    model: nn.Module,
    dictionary: Dictionary,
    *,
    layers: Sequence[int] | None = None,
    where: Where | None = None,
    blocks_path: str | None = None,
) -> Generator[None]:
    """Put reconstructions of the activations of the model as it is in their place; arguments as of `steer`.

    The loss under it is the spliced loss of `measure.splice`. Every call runs the model twice.
    """
    sites = _Sites.of(model, dictionary, where, blocks_path)

    def prepare(call: _Call, x_BSLD: Tensor) -> Tensor:
        recon_BSLD = dictionary(x_BSLD * sites.scale_L1).recon / sites.scale_L1
        return torch.where(call.read_BS[:, :, None, None].to(x_BSLD.device), recon_BSLD, x_BSLD)

    def put(site: int, call: _Call, given: Tensor, returned: Tensor) -> Tensor:
        new = call.prepared[:, :, site].to(returned.device)
        new = new + given if sites.kind == "write" else new
        is_first_BS = (call.place_BS < sites.skip).to(returned.device)
        return torch.where(is_first_BS[:, :, None], returned, new.to(returned.dtype))

    with _moving(model, sites, layers, put, prepare):
        yield


@dataclass(frozen=True)
class _Sites:
    """Where a dictionary reads and writes in a model."""

    dictionary: Dictionary
    blocks: tuple[nn.Module, ...]
    kind: str
    sites: tuple[int, ...]
    skip: int
    special: tuple[int, ...]
    outliers: bool
    """Whether outliers are read too."""

    @classmethod
    def of(cls, model: nn.Module, dictionary: Dictionary, where: Where | None, blocks_path: str | None) -> _Sites:
        reads = dictionary.reads
        if where is None and reads is None:
            raise ValueError("the dictionary keeps no record of the sites that it reads; give where=Where(kind, sites)")
        kind, numbers = (reads.site, reads.sites) if where is None and reads is not None else where or ("", ())
        if kind not in ("residual", "write"):
            raise ValueError(f"the dictionary reads sites of kind {kind}; expected a residual stream or block writes")
        if reads is not None:
            there = changed(
                reads, site=kind, sites=tuple(numbers), model=model_origin(model, reads.model.name), null=None
            )
            require_same(reads, there, owner="the dictionary", given="the model")
        looking = _LOOKING.set(True)
        try:
            blocks = find_blocks(model, blocks_path)
        finally:
            _LOOKING.reset(looking)
        if len(numbers) != dictionary.config.n_layers or not all(1 <= one <= len(blocks) for one in numbers):
            raise ValueError(
                f"sites {list(numbers)} for a dictionary of {dictionary.config.n_layers} layers in a model of "
                f"{len(blocks)} blocks, counted from 1; expected one block for each layer"
            )
        skip = 1 if reads is None else reads.skip_positions
        special = () if reads is None else reads.tokens.special_ids
        # Raw activations, at a scale of 1, say nothing of their usual norm.
        outliers = bool((dictionary.input_scale == 1).all()) or (reads is not None and reads.keep_outliers)
        return cls(dictionary.eval(), tuple(blocks), kind, tuple(numbers), skip, special, outliers)

    @property
    def scale_L1(self) -> Tensor:
        return self.dictionary.input_scale[:, None]

    def shares(self, features: Sequence[int] | Mapping[int, float]) -> Tensor:
        """`feature_shares` of features that there are."""
        n_features = len(self.dictionary.decoder_FLD())
        wrong = [one for one in features if not 0 <= one < n_features]
        if wrong or not features:
            raise ValueError(f"features {wrong or 'none'}; expected numbers from 0 to {n_features - 1}")
        return feature_shares(self.dictionary, list(features), self.kind)

    def values(self, x_BSLD: Tensor, wanted_n: Tensor) -> Tensor:
        """Activations of some features, `[B, S, n]`."""
        code = self.dictionary.encode((x_BSLD * self.scale_L1).flatten(0, 1))
        n_tokens = x_BSLD.shape[0] * x_BSLD.shape[1]
        n_groups = code.n_rows // n_tokens
        feature_P, token_P = to_global(code, n_groups), code.rows() // n_groups
        found = x_BSLD.new_zeros(n_tokens, len(wanted_n))
        for index, feature in enumerate(wanted_n.tolist()):
            is_its_P = feature_P == feature
            found[token_P[is_its_P], index] = code.values[is_its_P].to(found)
        return found.view(*x_BSLD.shape[:2], -1)

    def reads_from(self, call: _Call, x_BSLD: Tensor) -> Tensor:
        """Which tokens the dictionary reads, now that their norms are known."""
        if self.outliers:
            return call.read_BS
        return call.read_BS & ~is_outlier(x_BSLD * self.scale_L1).any(-1).to(call.read_BS.device)


@dataclass
class _Call:
    """One call of the model: where its tokens are in their texts, which of them are read, and what is put at them."""

    place_BS: Tensor
    read_BS: Tensor
    prepared: Tensor = field(default_factory=lambda: torch.zeros(0))


Put = Callable[[int, _Call, Tensor, Tensor], Tensor]
"""`(site, call, given, returned)` to what a block returns instead."""


@contextlib.contextmanager
def _moving(
    model: nn.Module,
    sites: _Sites,
    layers: Sequence[int] | None,
    put: Put,
    prepare: Callable[[_Call, Tensor], Tensor] | None = None,
) -> Generator[None]:
    """While active, every call of the model is moved; with `prepare`, it runs as it is first."""
    wanted = sites.sites if layers is None else tuple(layers)
    if wrong := [one for one in wanted if one not in sites.sites]:
        raise ValueError(f"layers {wrong}; the dictionary reads {list(sites.sites)}")
    chosen = [sites.sites.index(one) for one in wanted]
    now: list[_Call] = []
    clean_of: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
    after_clean: list[Any] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now.clear()
        if _LOOKING.get():
            return
        call = _call(sites, args, kwargs)
        if prepare is not None:
            cache = kwargs.get("past_key_values")
            beside = clean_of.get(cache) if cache is not None else None
            clean = {} if cache is None else {"past_key_values": copy.deepcopy(cache) if beside is None else beside}
            device = sites.scale_L1.device
            with torch.no_grad(), recording_sites(sites.blocks, sites.sites, sites.kind, device) as read:
                output = module.forward(*args, **kwargs | clean)
            x_BSLD = read()
            call.read_BS = sites.reads_from(call, x_BSLD)
            with torch.no_grad():
                call.prepared = prepare(call, x_BSLD)
            after_clean[:] = [getattr(output, "past_key_values", None)]
        now.append(call)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        now.clear()
        cache = getattr(output, "past_key_values", None)
        if after_clean and cache is not None and cache not in clean_of:
            clean_of[cache] = after_clean[0]
            _change_alike(cache, after_clean[0])

    def moved(number: int, given: Tensor, returned: Tensor) -> Tensor:
        return put(chosen[number], now[0], given, returned) if now else returned

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.enter_context(model.register_forward_hook(end))
        hooks.enter_context(replacing([sites.blocks[sites.sites[i] - 1] for i in chosen], moved))
        yield


def _call(sites: _Sites, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
    """What a call's arguments say of its tokens."""
    ids = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if ids is None else ids
    if not isinstance(tokens, Tensor):
        raise ValueError("the model is called without input_ids or inputs_embeds; features are moved at its tokens")
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    n_before = 0 if cache is None else cache.get_seq_length()
    size_BS = tokens.shape[:2]
    place_BS = torch.arange(n_before, n_before + size_BS[1], device=tokens.device).expand(size_BS)
    if isinstance(mask, Tensor) and mask.shape == (size_BS[0], n_before + size_BS[1]):  # a text may begin with padding
        place_BS = (mask.long().cumsum(1) - 1)[:, -size_BS[1] :]
    elif isinstance(given := kwargs.get("position_ids"), Tensor) and given.ndim == 2 and given.shape[1] == size_BS[1]:
        place_BS = given.expand(size_BS)  # a cache of fixed size has a mask of its own form
    read_BS = place_BS >= sites.skip
    if ids is not None and not sites.outliers:
        read_BS = read_BS & ~torch.isin(ids, torch.tensor(sites.special, dtype=ids.dtype, device=ids.device))
    return _Call(place_BS, read_BS)


def _change_alike(cache: Any, clean: Any) -> None:
    """Let whatever generation does to a cache between calls, such as reordering beams, be done to the clean one too."""
    for name in CACHE_CHANGES:
        if (own := getattr(cache, name, None)) is None:
            continue

        setattr(cache, name, partial(_both, getattr(clean, name), own))


def _both(first: Callable[..., Any], second: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    first(*args, **kwargs)
    return second(*args, **kwargs)
