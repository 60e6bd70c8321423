"""Tokenizers: a small one trained on documents, and what is asked of any: its hash, BOS, end and special ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token, `<|endoftext|>` (id 0: begin, end and padding).

    Any text can be encoded and decoded again. It has fewer than `vocab_size` entries if the documents have
    too few pairs to merge. The same documents give the same tokenizer.
    """
    if vocab_size < N_BYTES + 1:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least {N_BYTES + 1} (all bytes and {END_OF_TEXT})")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the tokenizer's rules and vocabulary, whatever its padding and truncation settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps([rules, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id: the vocabulary's size, or more where its ids have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def own_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer itself puts before a text, as its model was trained with; None where it puts none."""
    with_own = tokenizer("a", verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    if plain and with_own[: len(plain)] == plain:  # what it adds, if anything, stands behind the text
        return None
    before = [token for token in with_own[: len(with_own) - len(plain)] if token in special_ids(tokenizer)]
    if not before:
        return None
    return tokenizer.bos_token_id if tokenizer.bos_token_id in before else before[0]


def find_bos(tokenizer: PreTrainedTokenizerBase, wanted: bool | None = None) -> int | None:
    """The id to begin every block with, or None; by default the tokenizer's own way."""
    if wanted is False:
        return None
    found = own_bos(tokenizer)
    if wanted and found is None:
        found = tokenizer.bos_token_id
        if found is None:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise ValueError(f"the tokenizer of {name} has no BOS token to begin blocks with; leave out --bos")
    return found


def find_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands behind every document."""
    for end in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if isinstance(end, int):
            return end
    raise ValueError("the tokenizer has no end-of-text token to separate documents; set tokenizer.eos_token")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of special tokens, which are no text: named ones (begin, end, padding ...), and added ones marked so."""
    added = {number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return tuple(sorted(added | set(tokenizer.all_special_ids)))
