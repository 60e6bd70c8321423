"""How well features tell what is true of a token by its text alone: read on all layers together, and on the best one.

Labels come from outside the dictionary. A feature's own activity, as a label, is joint by construction: it is decided
by a sum over layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crosscoder.data.tokenizer import special_ids
from crosscoder.dictionary import Dictionary
from crosscoder.foundation.console import Progress
from crosscoder.foundation.signals import safe_points
from crosscoder.measure.profile import known_mean
from crosscoder.results.table import Value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("token class", "previous token", "position", "next token class")
CLASSES = ("special", "space", "digit", "lower", "capital", "continuation", "punctuation", "bytes")
N_PREVIOUS = 16  # most frequent previous tokens that are labels
RECALL = 0.9  # at which precisions are read
STRETCH_OF_TOKENS = 256  # length of a document where none are given
MIN_LABELLED = 20  # tokens in each half of the documents below which a label is left out
PREDICTED = 0.2  # see `measure_labels`
SCORE_BYTES = 2**27
"""Of the readings of the features that are looked at together, as float32; a few such arrays exist at once."""
Batches = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class TextLabels:
    """Q labels of T tokens: `value_TQ` is 1 for tokens that have the label, 0 for others, -1 where nobody knows.

    Names are for people; two previous tokens that are parts of characters may have the same.
    """

    kinds: tuple[str, ...]
    names: tuple[str, ...]
    value_TQ: np.ndarray


def label_text(ids_RS: np.ndarray, tokenizer: PreTrainedTokenizerBase, token_T: np.ndarray) -> TextLabels:
    """Labels of the tokens of blocks that `token_T` numbers, block times S plus position (`Reading.token_T`).

    Token class, by the text of the token's id behind a letter: special; space, if it is white space alone; else by its
    first other character: digit, lower or capital for a letter (lower for one without case), bytes if it is no whole
    character, punctuation for all else. A token that begins with a letter, with no space, behind a letter is a
    continuation. The next token's class is by the same rule, the last position's unknown. Previous token: each of the
    16 most frequent; the first position's unknown. Position: by powers of two, 0, 1, 2-3, 4-7 and so on.
    """
    block_T, position_T = np.divmod(token_T, ids_RS.shape[1])
    class_RS = _classes(ids_RS, tokenizer)
    # One more on either side of each block, unknown.
    next_T = np.pad(class_RS, ((0, 0), (0, 1)), constant_values=-1)[block_T, position_T + 1]
    previous_T = np.pad(ids_RS, ((0, 0), (1, 0)), constant_values=-1)[block_T, position_T]
    frequent = [int(one) for one, _ in Counter(previous_T[previous_T >= 0].tolist()).most_common(N_PREVIOUS)]
    bin_T = np.where(position_T > 0, np.log2(np.maximum(position_T, 1)).astype(int) + 1, 0)
    bins, classes = np.unique(bin_T).tolist(), dict(enumerate(CLASSES))
    named = {
        KINDS[0]: (class_RS[block_T, position_T], classes),
        KINDS[1]: (previous_T, {one: decode(tokenizer, [one]) for one in frequent}),
        KINDS[2]: (bin_T, {one: f"{2**one // 2}-{2**one - 1}" for one in bins}),
        KINDS[3]: (next_T, classes),
    }
    columns = [
        (kind, name, np.where(code_T < 0, -1, code_T == one).astype(np.int8))
        for kind, (code_T, names) in named.items()
        for one, name in names.items()
    ]
    kinds, names, values = zip(*columns, strict=True)
    return TextLabels(kinds, names, np.stack(values, axis=1))


def _classes(ids_RS: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The class of each token of blocks, by number."""
    ids, place_N = np.unique(ids_RS, return_inverse=True)
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    # Behind a letter every tokenizer shows the space that a token begins with.
    start = len(decode(tokenizer, letter))
    texts = [decode(tokenizer, [*letter, one])[start:] for one in ids.tolist()]
    special = set(special_ids(tokenizer))
    class_V = np.array([0 if one in special else CLASSES.index(token_class(t)) for one, t in zip(ids.tolist(), texts)])
    begins_V = np.array([text[:1].isalpha() for text in texts]) & (class_V > 0)
    ends_V = np.array([text[-1:].isalpha() for text in texts]) & (class_V > 0)
    place_RS = place_N.reshape(ids_RS.shape)
    class_RS = class_V[place_RS]
    goes_on = begins_V[place_RS][:, 1:] & ends_V[place_RS][:, :-1]
    class_RS[:, 1:][goes_on] = CLASSES.index("continuation")
    return class_RS


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of some tokens, as it is."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def token_class(text: str) -> str:
    """The class of a token by its text alone, see `label_text`."""
    first = text.lstrip()[:1]
    if not first:
        return "space" if text else "bytes"
    if first == "\N{REPLACEMENT CHARACTER}":
        return "bytes"
    if first.isnumeric():
        return "digit"
    if first.isalpha():
        return "capital" if first.isupper() else "lower"
    return "punctuation"


@dataclass(frozen=True)
class LabelReading:
    """Precision at recall .9 for P pairs of a feature and a label, on documents that chose neither pair nor layer."""

    labels: TextLabels
    feature_P: np.ndarray  # their numbers in the dictionary
    label_P: np.ndarray  # columns of `labels`
    layer_P: np.ndarray  # the best one
    by_joint_P: np.ndarray  # true where the joint reading predicts the label, false where only a layer's does
    joint_P: np.ndarray
    best_P: np.ndarray
    base_P: np.ndarray  # share of tokens that have the label: the precision of knowing nothing

    @property
    def gain_P(self) -> np.ndarray:
        """Joint minus best layer."""
        return self.joint_P - self.best_P

    def summary(self) -> dict[str, Value]:
        """Means over the pairs that the joint reading predicts, and the gain over all; nan where there is none.

        The former favour the joint reading, which chose them. `label_gain_any` favours single layers: with L of them a
        pair has L chances to be chosen, and with it shapes of many layers. A sign means something where both have it.
        """
        chosen = self.by_joint_P
        return {
            "label_pairs": int(chosen.sum()),
            "label_features": len(np.unique(self.feature_P[chosen])),
            "labels_predicted": len(np.unique(self.label_P[chosen])),
            "label_base_rate": known_mean(self.base_P[chosen]),
            "label_joint_precision": known_mean(self.joint_P[chosen]),
            "label_best_layer_precision": known_mean(self.best_P[chosen]),
            "label_gain": known_mean(self.gain_P[chosen]),
            "label_pairs_any": len(self.gain_P),
            "label_gain_any": known_mean(self.gain_P),
        }


@torch.no_grad()
def measure_labels(
    dictionary: Dictionary,
    batches: Batches,
    labels: TextLabels,
    feature_n: np.ndarray,
    *,
    document_T: np.ndarray | None = None,
    quiet: bool = False,
) -> LabelReading:
    """Precision at recall .9 of features `feature_n` for labels, by matched filters on all layers and on the best one.

    The reading of layer l is `<W_l, x_l>` with the decoder's row, in units in which layers have equal norm, and that of
    all layers is their sum: each is the best detector of the feature there under white noise. An encoder's part on one
    layer is not, as it was only trained to be right in the sum.

    Documents of even number choose, those of odd number measure (`split_documents`). A reading predicts a label if its
    `(precision - base rate) / (1 - base rate)` at recall .9 is at least .2. Pairs of a feature and a label are measured
    which the joint reading or some layer's predicts where they were chosen, with the layer whose precision was largest
    there; the first of equals.

    batches: gives the stream `x_BLD` whose tokens `labels` are of, from its beginning, the same each time.
    """
    n_layers = dictionary.config.n_layers
    if dictionary.is_bank:
        raise ValueError("the dictionary is a bank; a best layer needs features that read all layers")
    n_tokens = len(labels.value_TQ)
    n_each = max(1, SCORE_BYTES // (4 * max(1, n_tokens) * (n_layers + 1)))
    pairs: list[_Pair] = []
    with Progress("labels", len(feature_n), unit="features", quiet=quiet) as progress:
        for start in safe_points(range(0, len(feature_n), n_each)):
            chosen_n = feature_n[start : start + n_each]
            scores_2 = _read(dictionary, batches, document_T, chosen_n, n_tokens)
            pairs += [one._replace(feature=chosen_n[one.feature]) for one in _pairs(*scores_2, labels.value_TQ)]
            progress.advance(len(chosen_n))
    columns = np.array(pairs, dtype=np.float64).reshape(-1, len(_Pair._fields)).T
    return LabelReading(labels, *columns[:3].astype(np.int64), columns[3] > 0, *columns[4:])


def _read(
    dictionary: Dictionary, batches: Batches, document_T: np.ndarray | None, chosen_n: np.ndarray, n_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Readings of each layer, then of all, `[T, n, L + 1]`, and which tokens measure, `[T]`."""
    row_nLD = dictionary.decoder_FLD()[torch.from_numpy(chosen_n)].float()
    scores, measures = [], []
    for x_BLD, is_scored_B in split_documents(batches, document_T):
        each_BnL = torch.einsum("bld,nld->bnl", x_BLD.float(), row_nLD)
        scores.append(torch.cat([each_BnL, each_BnL.sum(2, keepdim=True)], dim=2).cpu().numpy())
        measures.append(is_scored_B.cpu().numpy())
    measures_T = np.concatenate(measures)
    if len(measures_T) != n_tokens:
        raise ValueError(f"{n_tokens} tokens have labels, the batches hold {len(measures_T)}; give labels of the same")
    return np.concatenate(scores), measures_T


def split_documents(batches: Batches, document_T: np.ndarray | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch, and which of its tokens `[B]` measure: those of odd documents; those of even ones choose."""
    number_T = None if document_T is None else np.unique(document_T, return_inverse=True)[1].ravel()
    stop = 0
    for x_BLD in batches():
        start, stop = stop, stop + len(x_BLD)
        number_B = np.arange(start, stop) // STRETCH_OF_TOKENS if number_T is None else number_T[start:stop]
        if len(number_B) < len(x_BLD):
            raise ValueError(f"{start + len(number_B)} document labels for at least {stop} tokens; give one for each")
        yield x_BLD, torch.from_numpy(number_B % 2 == 1).to(x_BLD.device)
    if number_T is not None and len(number_T) > stop:
        raise ValueError(f"{len(number_T)} document labels for {stop} tokens; give one for each")


class _Pair(NamedTuple):
    feature: int
    label: int
    layer: int
    by_joint: bool
    joint: float
    best: float
    base: float


def _pairs(score_TnS: np.ndarray, measures_T: np.ndarray, value_TQ: np.ndarray) -> Iterator[_Pair]:
    """Each pair of a feature, by its place, and a label that is predicted."""
    for label, value_T in enumerate(value_TQ.T):
        halves = [(measures_T == half) & (value_T >= 0) for half in (False, True)]
        if min((value_T[half] == 1).sum() for half in halves) < MIN_LABELLED:
            continue
        has_t = value_T[halves[0]] == 1
        least = has_t.mean() + PREDICTED * (1 - has_t.mean())
        if least >= 1:  # every token has it
            continue
        precision_nS = precision_at_recall(score_TnS[halves[0]], has_t)
        kept_k = np.flatnonzero(precision_nS.max(1) >= least)
        by_joint_k = precision_nS[kept_k, -1] >= least
        best_k = precision_nS[kept_k, :-1].argmax(1)
        has_t, score_tkS = value_T[halves[1]] == 1, score_TnS[halves[1]][:, kept_k]
        pair_tk2 = np.stack([score_tkS[:, :, -1], score_tkS[:, np.arange(len(kept_k)), best_k]], axis=2)
        found_k2 = precision_at_recall(pair_tk2, has_t)
        for index, layer, by_joint, (joint, best) in zip(kept_k, best_k, by_joint_k, found_k2, strict=True):
            yield _Pair(index, label, layer, by_joint, joint, best, has_t.mean())


def precision_at_recall(score_TX: np.ndarray, has_T: np.ndarray) -> np.ndarray:
    """Share of tokens with a label among those that score as high as a share `RECALL` of those with it, `[...]`.

    score_TX: `[T, ...]`. Tokens of equal score are taken together, so that at least that share is recalled.
    """
    with_label = score_TX[has_T]
    first = len(with_label) - math.ceil(RECALL * len(with_label) - 1e-9)
    threshold = np.partition(with_label, first, axis=0)[first]
    return (with_label >= threshold).sum(0) / (score_TX >= threshold).sum(0)
