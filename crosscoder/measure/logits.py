"""What a feature's decoder rows do to the model's predictions directly: through the final norm and the output head.

The direct effect alone: a row stands in the residual stream and goes on to the head, past all later blocks. The final
norm divides by a scale of each token; with the scale held fixed it is linear, so that a row w becomes `head(g * w / s)`
with the norm's gain g (of a LayerNorm, w less its mean first) and one scale s for all, the mean of `1 / s` over some
text. Only the size depends on that scale, not the order of tokens. Whatever a model does to its logits behind the head,
such as capping them, is left out. Effects are less their mean over the vocabulary, which softmax does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from crosscoder.data.blocks import input_device, run_model
from crosscoder.data.hooks import ModuleEnd, reading
from crosscoder.data.residuals import OUTLIER_RATIO, find_blocks
from crosscoder.dictionary import Dictionary
from crosscoder.foundation.console import Progress
from crosscoder.measure.rows import FeatureRows

LOGIT_BYTES = 2**26
"""Of the effects that are worked out at once, as float32."""
FITS = 0.02
"""Share of the head's input that a form of the final norm may leave unexplained: rounding of half precision."""
FEWEST_TOKENS = 16
CALL_TOKENS = 1024
"""Tokens that the model is given at once."""


class Readout(NamedTuple):
    """A model behind its last block, with the scale of the final norm held fixed: `head(gain * w) * scale`.

    norm: "rms", "layer" (w less its mean first) or "none". scale: of the mean token.
    """

    norm: str
    gain_D: Tensor
    scale: float
    head: Callable[[Tensor], Tensor]

    def effect(self, row_nD: Tensor) -> Tensor:
        """What rows add to each logit, for an activation of 1, less the mean over the vocabulary, `[n, V]`."""
        row_nD = row_nD.to(self.gain_D)
        row_nD = row_nD - row_nD.mean(-1, keepdim=True) if self.norm == "layer" else row_nD
        effect_nV = self.head(row_nD * (self.gain_D * self.scale)).float()
        return effect_nV - effect_nV.mean(-1, keepdim=True)


class LogitEffects(NamedTuple):
    """The tokens that features promote and suppress most, `[n, S, m]`, the largest effect first.

    A feature's S rows are its decoder's K rows (`FeatureRows`) and, where K > 1, their sum at the end. Values are
    logits for an activation of 1 (`measure.logits`).
    """

    promoted_nSm: np.ndarray
    promotion_nSm: np.ndarray
    suppressed_nSm: np.ndarray
    suppression_nSm: np.ndarray


@torch.no_grad()
def find_readout(
    model: nn.Module,
    ids_BS: Tensor,
    *,
    blocks_path: str | None = None,
    kept_BS: Tensor | None = None,
    keep_outliers: bool = False,
) -> Readout:
    """The readout of a model, whose final norm is found by what it does to some text, never by its name.

    kept_BS: which tokens count, at least 16; None: all behind the first of each row. The mean token's scale is theirs,
        less outliers of more than ten times the median norm, unless `keep_outliers`.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head, so features have no effect on logits")
    if kept_BS is None:
        kept_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        kept_BS[:, :1] = False
    ends = [ModuleEnd(find_blocks(model, blocks_path)[-1], "output"), ModuleEnd(head, "input")]
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    rows = max(1, CALL_TOKENS // ids_BS.shape[1])  # of which the model makes logits over its vocabulary
    for ids, kept in zip(ids_BS.split(rows), kept_BS.split(rows), strict=True):
        with reading(ends, lambda i, hidden, kept=kept: seen[i].append(hidden[kept.to(hidden.device)].float())):
            run_model(model, ids.to(input_device(model)))
    given, needed = (torch.cat(parts) for parts in seen)
    if given.shape != needed.shape or len(given) < FEWEST_TOKENS:
        raise ValueError(
            f"the last block returns {list(given.shape)}, the head of {type(model).__name__} is given "
            f"{list(needed.shape)}; expected at least {FEWEST_TOKENS} tokens of one width"
        )
    left = {}
    for norm, scaled in _forms(given):
        gain_D, bias_D = _fit(scaled, needed, has_bias=norm == "layer")
        left[norm] = float((needed - scaled * gain_D - bias_D).norm() / needed.norm())
        if left[norm] <= FITS:
            norm_T = _centred(given, norm).norm(dim=1)
            usual_T = (norm_T <= OUTLIER_RATIO * norm_T.median()) | keep_outliers
            scale = float((scaled.norm(dim=1) / norm_T)[usual_T].mean())
            return Readout(norm, gain_D, scale, _linear(head))
    said = ", ".join(f"{norm} {share:.2g}" for norm, share in left.items())
    raise ValueError(
        f"what stands between the last block and the head of {type(model).__name__} is no norm with a gain (left "
        f"unexplained: {said}); logit effects are not known for it"
    )


def _centred(given_TD: Tensor, norm: str) -> Tensor:
    return given_TD - given_TD.mean(1, keepdim=True) if norm == "layer" else given_TD


def _forms(given_TD: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Hidden states as each form of norm leaves them, before its gain."""
    yield "none", given_TD
    for norm in ("rms", "layer"):
        centred = _centred(given_TD, norm)
        yield norm, centred * (given_TD.shape[1] ** 0.5 / centred.norm(dim=1, keepdim=True))


def _fit(scaled_TD: Tensor, needed_TD: Tensor, *, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Gain and bias of each number, by least squares."""
    means = (scaled_TD.mean(0), needed_TD.mean(0)) if has_bias else (torch.zeros(()), torch.zeros(()))
    x, y = scaled_TD - means[0].to(scaled_TD), needed_TD - means[1].to(needed_TD)
    gain_D = (x * y).sum(0) / x.square().sum(0).clamp(min=torch.finfo(x.dtype).tiny)
    return gain_D, means[1].to(y) - gain_D * means[0].to(x)


def _linear(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """The head without its bias."""
    dtype = next((one.dtype for one in head.parameters() if one.is_floating_point()), torch.float32)
    bias = getattr(head, "bias", None)

    def run(row_nD: Tensor) -> Tensor:
        out = head(row_nD.to(dtype))
        return out if bias is None else out - bias

    return run


@torch.no_grad()
def logit_effects(
    dictionary: Dictionary,
    readout: Readout,
    features: Sequence[int] | np.ndarray,
    *,
    most: int = 10,
    n_tokens: int | None = None,
    quiet: bool = True,
) -> LogitEffects:
    """The `most` tokens that features promote, and suppress, by each layer's decoder row and by their sum.

    Rows are in the model's own units, `W_l / input_scale_l`. Of block writes the sum is all that the feature adds to
    the residual stream. In a residual stream a row is what the stream holds after its block, so there the last layer's
    row is what reaches the head, and the sum weighs all layers.

    features: their numbers, in a bank `layer * F + feature`. n_tokens: of the vocabulary, those that are text; a model
    may have more logits than its tokenizer has tokens. None: all.
    """
    rows = FeatureRows.of(dictionary)
    found: list[tuple[Tensor, ...]] = []
    scale_L = dictionary.input_scale
    with Progress("logit effects", len(features), unit="features", quiet=quiet) as progress:
        n_logits = readout.effect(rows.decoder_FKD[:1, 0]).shape[1]
        n_each = max(1, LOGIT_BYTES // (4 * n_logits * (rows.layer_FK.shape[1] + 1)))
        for part_n in torch.as_tensor(np.asarray(features), dtype=torch.int64).split(n_each):
            row_nSD = rows.decoder_FKD[part_n].float() / scale_L[rows.layer_FK[part_n]][:, :, None]
            if row_nSD.shape[1] > 1:
                row_nSD = torch.cat([row_nSD, row_nSD.sum(1, keepdim=True)], dim=1)
            effect_nSV = readout.effect(row_nSD)[..., :n_tokens]
            most_here = min(most, effect_nSV.shape[-1])
            up, down = effect_nSV.topk(most_here), effect_nSV.topk(most_here, largest=False)
            found.append(tuple(one.cpu() for one in (up.indices, up.values, down.indices, down.values)))
            progress.advance(len(part_n))
    if not found:
        return LogitEffects(*(np.zeros((0, 1, most)) for _ in range(4)))
    return LogitEffects(*(torch.cat(parts).numpy() for parts in zip(*found, strict=True)))
