"""Residual streams read from a stock model by hooks on its blocks.

Site 0 is what enters the first block (the embedding), site l is what leaves block l. `output_hidden_states`
is not used: its last entry is after the final norm, and it keeps every layer of every token alive. All
sites of a token are written to one row of one buffer, and the model is stopped once the last site has been
read. With `reads="mlp"` the sites are what the blocks' MLPs are given and what they return, for transcoders.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from crosscoder.data.blocks import input_device, run_model, text_config
from crosscoder.data.hooks import ModuleEnd, reading
from crosscoder.data.probe import probe_model
from crosscoder.data.subject import model_origin
from crosscoder.foundation.config import require_count
from crosscoder.foundation.origin import ModelOrigin

OUTLIER_RATIO = 10.0
"""Times a site's usual norm; a token above it is an outlier."""


class _AllSitesReadError(Exception):
    """Ends the model's forward pass early; never leaves this module."""


def find_blocks(model: nn.Module, blocks_path: str | None = None) -> tuple[nn.Module, ...]:
    """The model's blocks, as `probe.probe_model` finds them; a ValueError says why there are none."""
    return probe_model(model, blocks_path=blocks_path, mlps=False).blocks


class ResidualHarvester:
    """Reads chosen sites of a model: `sites` in increasing order (all of 0 to n by default).

    `reads="mlp"` reads the MLPs of the chosen blocks instead (all of 1 to n by default): [what each is given, after the
    block's norm; what each returns], so that `sites` names every block twice.

    Blocks and MLPs are what `probe.probe_model` finds, unless their paths are given; `probed` is all that it found.

    The first `skip_positions` tokens of each sequence are left out: their norms can be thousands of times the rest.
    So are special tokens, and tokens of unusual norm wherever the activations are read (see `SiteSource`);
    `keep_outliers` keeps them all, and the first ones too unless `skip_positions` says otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[int] | None = None,
        blocks_path: str | None = None,
        mlp_path: str | None = None,
        reads: Literal["residual", "mlp"] = "residual",
        skip_positions: int | None = None,
        keep_outliers: bool = False,
        origin: ModelOrigin | None = None,
    ) -> None:
        if reads not in ("residual", "mlp"):
            raise ValueError(f"reads is {reads!r}, expected 'residual' or 'mlp'")
        self.model, self.reads = model, reads
        self.probed = probe_model(model, blocks_path=blocks_path, mlp_path=mlp_path, mlps=reads == "mlp")
        self.blocks = self.probed.blocks
        chosen = _check_sites(layers, len(self.blocks), first=int(reads == "mlp"))
        self.sites = 2 * chosen if reads == "mlp" else chosen
        self.skip_positions = int(not keep_outliers) if skip_positions is None else skip_positions
        require_count(0, skip_positions=skip_positions)
        self.keep_outliers, self._origin = keep_outliers, origin
        self._ends()  # an MLP that cannot be read is refused at once

    def __repr__(self) -> str:
        sites = ", ".join(map(str, self.sites))
        return f"ResidualHarvester({self.reads} of {type(self.model).__name__}, sites {sites} of {len(self.blocks)})"

    @functools.cached_property
    def origin(self) -> ModelOrigin:
        """The model, with a hash of its weights that is taken when first asked for."""
        if self._origin is not None:
            return self._origin
        name = getattr(getattr(self.model, "config", None), "_name_or_path", "")
        return model_origin(self.model, name or type(self.model).__name__)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model's weights, the sites and the token policy."""
        where = self.probed.path, self.probed.mlp if self.reads == "mlp" else ""
        policy = (self.origin.weights, where, self.sites, self.reads, self.skip_positions, self.keep_outliers)
        return hashlib.sha256(repr(policy).encode()).hexdigest()

    def kept(self, ids_BS: Tensor, special_ids: Sequence[int] = ()) -> Tensor:
        """Which tokens are read, bool `[B, S]`: none of the first positions, nor special tokens."""
        kept_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        kept_BS[:, : self.skip_positions] = False
        if special_ids and not self.keep_outliers:
            kept_BS &= ~torch.isin(ids_BS, torch.tensor(special_ids, device=ids_BS.device))
        return kept_BS

    @torch.no_grad()
    def harvest(self, ids_BS: Tensor, kept_BS: Tensor | None = None) -> Tensor:
        """`x_TLD` of the kept tokens of `ids_BS` (see `kept`), row by row, in the model's dtype and on its device.

        Raises:
            ValueError: the model is in training mode, an id is outside its vocabulary, no token is left, or sites
                differ in width.
        """
        self._check_call(ids_BS)
        ids_BS = ids_BS.to(input_device(self.model))
        kept_BS = self.kept(ids_BS) if kept_BS is None else kept_BS.to(ids_BS.device)
        n_kept, buffer = int(kept_BS.sum()), []

        def store(slot: int, hidden_BSD: Tensor) -> None:
            d_model = hidden_BSD.shape[-1]
            if not buffer:
                buffer.append(hidden_BSD.new_empty(n_kept, len(self.sites), d_model))
            if d_model != buffer[0].shape[-1]:
                raise ValueError(
                    f"site {self.sites[slot]} is {d_model} wide and site {self.sites[0]} is "
                    f"{buffer[0].shape[-1]}; choose layers of one width"
                )
            buffer[0][:, slot] = hidden_BSD[kept_BS.to(hidden_BSD.device)]
            if slot == len(self.sites) - 1:
                raise _AllSitesReadError

        try:
            with reading(self._ends(), store):
                run_model(self.model, ids_BS)
        except _AllSitesReadError:
            return buffer[0]
        raise RuntimeError(
            f"block {self.sites[-1]} was not run by {type(self.model).__name__}; name the right --blocks-path"
        )

    def _ends(self) -> list[ModuleEnd]:
        """Where each of `sites` is read."""
        if self.reads == "residual":
            first = ModuleEnd(self.blocks[0], "input")
            return [ModuleEnd(self.blocks[site - 1], "output") if site else first for site in self.sites]
        mlps = self._mlps(self.sites[: len(self.sites) // 2])
        return [*(ModuleEnd(mlp, "input") for mlp in mlps), *(ModuleEnd(mlp, "output") for mlp in mlps)]

    def _mlps(self, sites: Sequence[int]) -> list[nn.Module]:
        for site in sites:
            if self.probed.mlps[site - 1] is None:
                raise ValueError(f"the MLP of block {site} cannot be read: {self.probed.problems[site - 1]}")
        return [mlp for site in sites if (mlp := self.probed.mlps[site - 1]) is not None]

    def _check_call(self, ids_BS: Tensor) -> None:
        if self.model.training:
            raise ValueError("the model is in training mode, where dropout would be recorded; call model.eval()")
        if ids_BS.ndim != 2 or ids_BS.is_floating_point() or not ids_BS.numel():
            raise ValueError(f"expected token ids [batch, sequence], got {ids_BS.dtype} {list(ids_BS.shape)}")
        if ids_BS.shape[1] <= self.skip_positions:
            raise ValueError(f"no token is left of {list(ids_BS.shape)} after {self.skip_positions} skipped positions")
        longest = getattr(text_config(self.model), "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < ids_BS.shape[1]:
            raise ValueError(
                f"blocks of {ids_BS.shape[1]} tokens are longer than the {longest} positions of the model; prepare "
                f"with --context {longest} or less"
            )
        get_embedding = getattr(self.model, "get_input_embeddings", lambda: None)
        vocab_size = getattr(get_embedding(), "num_embeddings", None)
        low, high = int(ids_BS.min()), int(ids_BS.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            raise ValueError(
                f"token ids run from {low} to {high}, the model knows 0 to {vocab_size} exclusive: the "
                "tokens were made by another tokenizer"
            )


def estimate_scales(x_TLD: Tensor) -> Tensor:
    """The factor of each layer that makes its usual norm sqrt(D): float32 `scale_L`, see `scales_of_norms`."""
    return scales_of_norms(norms(x_TLD), x_TLD.shape[-1])


def norms(x_TLD: Tensor) -> Tensor:
    """float64 `norm_TL`, on the CPU."""
    return torch.linalg.vector_norm(x_TLD.detach().double(), dim=-1).cpu()


def scales_of_norms(norm_TL: Tensor, d_model: int) -> Tensor:
    """The factor of each layer that makes its usual norm sqrt(d_model): float32 `scale_L`.

    The usual norm is the mean over tokens whose norm is at most ten times the layer's median, so that
    massive activations (thousands of times the rest, at a few tokens) hardly move it.
    """
    bad = (~norm_TL.isfinite()).nonzero()
    if len(bad):
        token, layer = bad[0].tolist()
        raise ValueError(f"the activation of token {token} at layer {layer} is not finite; check the model's weights")
    median_L = norm_TL.median(0).values
    if bool((median_L == 0).any()):
        layer = int((median_L == 0).nonzero()[0])
        raise ValueError(f"layer {layer} is zero for most tokens, so it has no scale; leave the layer out")
    usual_TL = norm_TL <= OUTLIER_RATIO * median_L
    mean_L = (norm_TL * usual_TL).sum(0) / usual_TL.sum(0)
    return (d_model**0.5 / mean_L).float()


def _check_sites(layers: Sequence[int] | None, n_blocks: int, *, first: int) -> tuple[int, ...]:
    sites = tuple(range(first, n_blocks + 1)) if layers is None else tuple(int(layer) for layer in layers)
    if not sites or sites != tuple(sorted(set(sites))) or sites[0] < first or sites[-1] > n_blocks:
        lowest = "1 (the first block)" if first else "0 (the embedding)"
        raise ValueError(
            f"layers {list(sites)}: expected {lowest} to {n_blocks} (the last block's output), in increasing order"
        )
    return sites


def combine_fingerprints(*parts: str) -> str:
    """sha256 of the parts, in order."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def norms_of(x_BLD: Tensor) -> Tensor:
    """The norm of each token at each layer, `[B, L]`."""
    return torch.linalg.vector_norm(x_BLD, dim=-1)


def require_finite(
    x_BLD: Tensor,
    norm_BL: Tensor,
    tokens: Callable[[], Tensor],
    document_of: Callable[[int], int],
    sites: tuple[int, ...],
    context: int,
) -> None:
    """Refuse tokens that hold NaN or infinity; norms, which are at hand, tell at almost no cost that none does.

    tokens: gives each token's block times `context`, and its position there. document_of: a token's document.
    """
    if bool(norm_BL.isfinite().all()):
        return
    bad_BL = ~torch.isfinite(x_BLD).all(2)
    if not bool(bad_BL.any()):  # the square of a large number is none
        return
    row, layer = bad_BL.nonzero()[0].tolist()
    block, position = divmod(token := int(tokens()[row]), context)
    raise ValueError(
        f"the activations hold NaN or infinity in {int(bad_BL.any(1).sum())} of {len(x_BLD)} tokens, first in "
        f"document {document_of(token)} (block {block}, position {position}) at site {sites[layer]}; harvest them "
        "again in float32 or bfloat16, and look at that text"
    )
