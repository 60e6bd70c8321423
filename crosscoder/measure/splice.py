"""How much worse the subject predicts when reconstructions replace its own activations.

Sites of kind `residual` are block outputs x_l; sites of kind `write` are what block l adds, x_l - x_(l-1). A site is
spliced by replacing its activations with the reconstruction of those of the clean run. Tokens that the dictionary was
not made to read keep their clean values: the first positions, special tokens and outliers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosscoder.data.blocks import run_model
from crosscoder.data.hooks import ModuleEnd, reading, replacing, replacing_input
from crosscoder.data.residuals import norms, scales_of_norms
from crosscoder.data.sources import is_outlier
from crosscoder.data.subject import model_origin
from crosscoder.dictionary import Dictionary
from crosscoder.foundation.origin import require_same
from crosscoder.foundation.signals import safe_point

ALL_LAYERS = "all"
"""The name of splicing every layer of several."""
SMALLEST_HARM = 1e-4  # nats a token that an ablation must cost before its recovery means anything
LOGIT_BYTES = 2**28
"""Of the logits of one call of the model, as float32; those of the clean and of one spliced run are held at once."""
USUAL_ROWS = 8
"""Of tokens, from which the usual norm of raw activations is taken."""
BLOCK_BYTES = 2**26
"""Of the logits that are scored at a time; about six such arrays exist at once."""

Logits = Callable[[int, int], Tensor]
"""Those of positions `start` to `stop`, `[B, stop - start, V]`."""


class Spliced(NamedTuple):
    """What splicing does to the subject, by the names of quantities: cross-entropy in nats a token, and KL."""

    clean: dict[str, Any]
    """Of the subject as it is on the spliced tokens."""
    sites: dict[str, dict[str, Any]]
    """With one layer's site replaced, by layer, or `all`."""


class BoundedModel:
    """A model that is run without ever making logits beyond `LOGIT_BYTES`.

    Where those of `n_rows` rows, which are run together, are larger, the output head is given one position, and later
    the others block by block, in runs of a single token: whatever the model does to logits behind the head, such as
    capping them, it does itself. A model that does not work so, as a few tokens tell, makes the logits of those rows at
    once.
    """

    def __init__(self, model: nn.Module, ids_BS: Tensor, n_rows: int = 1) -> None:
        self.model = model
        self.token_bytes = 4 * run_model(model, ids_BS[:1, :1]).logits.shape[-1]
        rows_fit = n_rows * ids_BS.shape[1] * self.token_bytes <= LOGIT_BYTES
        self.head = None if rows_fit else self._find_head(ids_BS[:1, :8])

    def run(self, ids_BS: Tensor) -> Logits:
        """The model's logits of token ids."""
        if self.head is None:
            logits = run_model(self.model, ids_BS).logits
            return lambda start, stop: logits[:, start:stop]
        seen: list[Tensor] = []

        def keep(hidden_BSD: Tensor) -> Tensor:
            seen.append(hidden_BSD)
            return hidden_BSD[:, -1:]

        with replacing_input(self.head, keep):
            run_model(self.model, ids_BS)
        return lambda start, stop: self._of_hidden(self.head, ids_BS, seen[0][:, start:stop])

    def _of_hidden(self, head: nn.Module | None, ids_BS: Tensor, hidden_BPD: Tensor) -> Tensor:
        assert head is not None
        with replacing_input(head, lambda _: hidden_BPD):
            return run_model(self.model, ids_BS[:, :1]).logits

    def _find_head(self, ids_BS: Tensor) -> nn.Module | None:
        """The output head, if the logits of every position are a function of what it is given there; else None."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is None or isinstance(head, nn.Embedding):
            return None
        seen: list[Tensor] = []
        with reading([ModuleEnd(head, "input")], lambda _, hidden: seen.append(hidden)):
            logits = run_model(self.model, ids_BS).logits
        if len(seen) != 1 or seen[0].ndim != 3 or seen[0].shape[:2] != ids_BS.shape:
            return None
        again = self._of_hidden(head, ids_BS, seen[0])
        same = again.shape == logits.shape and bool((again - logits).abs().max() <= 1e-3 * logits.abs().max())
        return head if same else None


@contextlib.contextmanager
def recording_sites(
    blocks: Sequence[nn.Module], layers: Sequence[int], kind: str, device: torch.device
) -> Generator[Callable[[], Tensor]]:
    """While active, runs of the model are read; what is yielded gives the last one's sites, float32 `x_BSLD`."""
    before = [layer - 1 for layer in layers] if kind == "write" else []
    numbers, stream = sorted({*layers, *before}), dict[int, Tensor]()
    first = ModuleEnd(blocks[0], "input")
    ends = [ModuleEnd(blocks[number - 1], "output") if number else first for number in numbers]

    def read() -> Tensor:
        x_BSLD = torch.stack([stream[layer] for layer in layers], dim=2)
        return x_BSLD - torch.stack([stream[layer] for layer in before], dim=2) if before else x_BSLD

    with reading(ends, lambda i, hidden: stream.update({numbers[i]: hidden.to(device).float()})):
        yield read


def feature_shares(dictionary: Dictionary, features: Sequence[int], kind: str) -> Tensor:
    """What each feature adds at each layer for an activation of 1, in the subject's units, `[n, L, D]`.

    At sites of kind `write` its row; of a residual stream, which still holds what earlier blocks wrote, what the row
    gains since the dictionary's layer before. A feature of a bank has one layer: it adds its row there, and what later
    layers hold is their own features'.
    """
    row_nLD = dictionary.decoder_FLD()[torch.tensor(list(features))].float() / dictionary.input_scale[:, None]
    return added(row_nLD, dictionary, kind)


def added(held_nLD: Tensor, dictionary: Dictionary, kind: str) -> Tensor:
    """What each layer adds of what sites hold: of a residual stream that a dictionary reads at once, the gain since the
    layer before."""
    if kind == "write" or dictionary.is_bank:
        return held_nLD
    return torch.cat([held_nLD[:, :1], held_nLD.diff(dim=1)], dim=1)


class Sites:
    """The sites of a dictionary in a model; see `splice_losses` for the arguments and for what is refused.

    ids_BS: some token ids, of rows as long as any that are to be run; `n_rows` of them at a time.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        ids_BS: Tensor,
        *,
        layers: Sequence[int],
        kind: Literal["residual", "write"],
        skip_positions: int | None = None,
        n_rows: int = 1,
    ) -> None:
        if len(layers) != dictionary.config.n_layers:
            raise ValueError(f"{len(layers)} layers named for a dictionary of {dictionary.config.n_layers}")
        if (reads := dictionary.reads) is not None:
            origin = model_origin(model, reads.model.name)
            there = replace(reads, site=kind, sites=tuple(layers), model=origin, null=None)
            require_same(reads, there, owner="the dictionary", given="what is spliced")
        usual = 1 if reads is None else reads.skip_positions
        self.skip = usual if skip_positions is None else skip_positions
        if ids_BS.shape[1] < self.skip + 2:
            raise ValueError(
                f"blocks of {ids_BS.shape[1]} tokens hold no prediction after {self.skip} skipped positions"
            )
        self.dictionary, self.blocks = dictionary.eval(), blocks
        self.layers, self.kind = list(layers), kind
        self.subject = BoundedModel(model, ids_BS, n_rows)
        self.scale_L1 = dictionary.input_scale[:, None]
        self._some_ids = ids_BS[:USUAL_ROWS]

    @cached_property
    def _usual_L1(self) -> Tensor:
        """The scale at which outliers are told; raw activations, of a dictionary that was not trained here, say nothing
        of their usual norm, so that it is taken from some rows."""
        if bool((self.scale_L1 != 1).any()):
            return self.scale_L1
        x_BSLD = self.record(self._some_ids)[1][:, self.skip :]
        with contextlib.suppress(ValueError):  # a layer that is mostly zero has none
            return scales_of_norms(norms(x_BSLD.flatten(0, 1)), x_BSLD.shape[-1])[:, None].to(x_BSLD)
        return torch.zeros_like(self.scale_L1)

    def record(self, ids_BS: Tensor) -> tuple[Logits, Tensor]:
        """Clean logits, and what the dictionary reads, float32 `x_BSLD`."""
        safe_point()
        with recording_sites(self.blocks, self.layers, self.kind, self.scale_L1.device) as read:
            logits = self.subject.run(ids_BS)
        return logits, read()

    def read(self, ids_BS: Tensor, x_BSLD: Tensor) -> Tensor:
        """Which tokens the dictionary was made to read, bool `[B, S]`."""
        reads, read_BS = self.dictionary.reads, torch.ones(ids_BS.shape, dtype=torch.bool, device=x_BSLD.device)
        read_BS[:, : self.skip if reads is None else max(self.skip, reads.skip_positions)] = False
        if reads is not None and not reads.keep_outliers:
            special = torch.tensor(reads.tokens.special_ids, dtype=ids_BS.dtype, device=ids_BS.device)
            read_BS &= ~torch.isin(ids_BS, special).to(x_BSLD.device)
            read_BS &= ~is_outlier(x_BSLD * self._usual_L1).any(-1)
        return read_BS

    def mean(self, ids: Sequence[Tensor]) -> Tensor:
        """The mean of the tokens that the dictionary reads, `[L, D]`."""
        total, count = torch.zeros(()), 0
        for ids_BS in ids:
            x_BSLD = self.record(ids_BS)[1]
            x_TLD = x_BSLD[self.read(ids_BS, x_BSLD)]
            total, count = x_TLD.sum(0) if count == 0 else total + x_TLD.sum(0), count + len(x_TLD)
        if count == 0:
            raise ValueError("no token is left to splice: all are special tokens, outliers or at the first positions")
        return total / count

    def spliced(self, ids_BS: Tensor, new_BSLD: Tensor, chosen: Sequence[int]) -> Logits:
        """The logits with `new_BSLD` in place of the sites numbered `chosen`, but for the first positions."""

        def put(number: int, given: Tensor, returned: Tensor) -> Tensor:
            new = new_BSLD[:, :, chosen[number]].to(returned.device)
            new = new + given if self.kind == "write" else new
            return torch.cat([returned[:, : self.skip], new[:, self.skip :].to(returned.dtype)], dim=1)

        with replacing([self.blocks[self.layers[i] - 1] for i in chosen], put):
            return self.subject.run(ids_BS)


def _loss_and_kl(logits: Logits, clean: Logits, ids_BS: Tensor, skip: int, token_bytes: int) -> np.ndarray:
    """Cross-entropy of logits, and KL of the clean ones from them, summed over each row's tokens from position `skip`
    on, `[B, 2]`."""
    sums_B2, last = np.zeros((len(ids_BS), 2)), ids_BS.shape[1] - 1
    step = max(1, BLOCK_BYTES // (token_bytes * len(ids_BS)))
    for start in range(skip, last, step):
        stop = min(start + step, last)
        log_q = logits(start, stop).float().log_softmax(-1).flatten(0, 1)
        log_p = log_q if clean is logits else clean(start, stop).float().log_softmax(-1).flatten(0, 1)
        loss = F.nll_loss(log_q, ids_BS[:, start + 1 : stop + 1].flatten().to(log_q.device), reduction="none")
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
        both = torch.stack([loss, kl]).double().view(2, len(ids_BS), -1).sum(2)
        sums_B2 += both.T.cpu().numpy()
    return sums_B2


@torch.no_grad()
def splice_losses(
    dictionary: Dictionary,
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ids: Sequence[Tensor],
    *,
    layers: Sequence[int],
    kind: Literal["residual", "write"],
    ablation: Literal["mean", "zero"] = "mean",
    skip_positions: int | None = None,
    each: bool = True,
    document_R: np.ndarray | None = None,
    n_documents: int = 0,
) -> Spliced:
    """Clean loss, and loss, KL and loss recovered with each of `layers` (and all of them) replaced.

    Losses count every prediction from position `skip_positions` on, also those at tokens that keep their clean values.
    The mean that replaces an ablated site is that of the tokens which the dictionary reads.

    layers: block numbers from 1, one for each layer of the dictionary, in its order.
    ids: batches of token ids `[B, S]`; the dictionary's `input_scale` maps raw activations to its inputs.
    skip_positions: the first tokens of each row that are never replaced. None: as many as the dictionary's record says,
        or 1. Special tokens and outliers are known where there is a record.
    each: False replaces only all of several layers at once.
    document_R: the position of each row's document among `n_documents` or more, from 0; then losses with every layer
        replaced are given without each document too.

    Raises:
        MismatchError: the dictionary reads other sites, another model, or a null.
        ValueError: `layers` does not name one block for each layer of the dictionary, or no token is left.
    """
    longest = max(ids, key=lambda ids_BS: ids_BS.shape[1])
    sites = Sites(dictionary, model, blocks, longest, layers=layers, kind=kind, skip_positions=skip_positions)
    subject, skip = sites.subject, sites.skip
    bytes_each = longest.shape[1] * max(subject.token_bytes, 4 * len(layers) * dictionary.config.d_model)
    parts = [part for ids_BS in ids for part in ids_BS.split(max(1, LOGIT_BYTES // bytes_each))]
    mean_LD = sites.mean(parts) if ablation == "mean" else None
    choices = {str(layer): [i] for i, layer in enumerate(layers)} if each or len(layers) == 1 else {}
    if len(layers) > 1:
        choices[ALL_LAYERS] = list(range(len(layers)))
    clean, row_tokens = list[np.ndarray](), list[int]()
    spliced, ablated = ({name: list[np.ndarray]() for name in choices} for _ in range(2))
    for ids_BS in parts:
        own, x_BSLD = sites.record(ids_BS)
        read_BS11 = sites.read(ids_BS, x_BSLD)[:, :, None, None]
        recon_BSLD = dictionary(x_BSLD * sites.scale_L1).recon / sites.scale_L1
        gone_BSLD = torch.zeros_like(x_BSLD) if mean_LD is None else mean_LD.expand_as(x_BSLD)
        clean.append(_loss_and_kl(own, own, ids_BS, skip, subject.token_bytes))
        row_tokens += [ids_BS.shape[1] - skip - 1] * len(ids_BS)
        for sums, new_BSLD in ((spliced, recon_BSLD), (ablated, gone_BSLD)):
            new_BSLD = torch.where(read_BS11, new_BSLD, x_BSLD)
            for name, chosen in choices.items():
                logits = sites.spliced(ids_BS, new_BSLD, chosen)
                sums[name].append(_loss_and_kl(logits, own, ids_BS, skip, subject.token_bytes))
    means = _Means(np.array(row_tokens), document_R, n_documents)
    clean_R2 = np.concatenate(clean)
    found = {"splice_tokens": sum(row_tokens), "spliced_ablation": ablation, "clean_loss": means.whole(clean_R2)[0]}
    joined = {n: (np.concatenate(spliced[n]), np.concatenate(ablated[n])) for n in choices}
    per_site = {name: _site(*both, found["clean_loss"], means) for name, both in joined.items()}
    if document_R is not None:
        found["clean_loss_left"] = means.left(clean_R2)
        per_site[next(reversed(choices))] |= {
            f"{key}_left": means.left(one_R2)
            for key, one_R2 in zip(("spliced_loss", "ablated_loss"), joined[next(reversed(choices))], strict=True)
        }
    return Spliced(found, per_site)


class _Means:
    """Means over tokens of what was summed over rows, and without each document's rows."""

    def __init__(self, tokens_R: np.ndarray, document_R: np.ndarray | None, n_documents: int) -> None:
        self.tokens_R, self.document_R, self.n_documents = tokens_R, document_R, n_documents

    def whole(self, sums_R2: np.ndarray) -> list[float]:
        """Loss and KL a token."""
        return (sums_R2.sum(0) / self.tokens_R.sum()).tolist()

    def left(self, sums_R2: np.ndarray) -> list[float]:
        """Loss a token without each document."""
        assert self.document_R is not None
        sums_E, tokens_E = (
            np.bincount(self.document_R, weights=one, minlength=self.n_documents)
            for one in (sums_R2[:, 0], self.tokens_R)
        )
        return ((sums_E.sum() - sums_E) / (tokens_E.sum() - tokens_E)).tolist()


def _site(spliced_R2: np.ndarray, ablated_R2: np.ndarray, clean_loss: float, means: _Means) -> dict[str, Any]:
    (loss, kl), (gone, _) = means.whole(spliced_R2), means.whole(ablated_R2)
    # Where removing the site does not hurt there is no loss to recover.
    recovered = (gone - loss) / (gone - clean_loss) if gone - clean_loss > SMALLEST_HARM else None
    return {"spliced_loss": loss, "ablated_loss": gone, "loss_recovered": recovered, "kl": kl}
