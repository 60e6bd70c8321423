"""Text to tokens in one step: a tokenizer, training blocks and held-out blocks that belong together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.data.text import DEMO_SOURCE, load_documents, split_documents
from crosscoder.data.tokens import TokenBlocks, pack_documents, tokenizer_hash, train_tokenizer
from crosscoder.foundation.artifact import DamagedArtifactError, committed_directory, verify_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_SCHEMA = "crosscoder.tokenizer/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTokens:
    """Blocks to train on, blocks never trained on (other documents), and the tokenizer that made both."""

    train: TokenBlocks
    held_out: TokenBlocks
    tokenizer: PreTrainedTokenizerBase

    def save(self, folder: str | Path) -> None:
        """Write `train/`, `held_out/` and `tokenizer/`; what is already there and the same is left alone."""
        folder = Path(folder)
        if not _is_same(self.tokenizer, folder / "tokenizer"):
            with committed_directory(folder / "tokenizer", schema=TOKENIZER_SCHEMA) as temporary:
                self.tokenizer.save_pretrained(temporary)
        for name, blocks in (("train", self.train), ("held_out", self.held_out)):
            if _fingerprint_at(folder / name) != blocks.fingerprint:
                blocks.save(folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> PreparedTokens:
        """The three parts, each verified, after checking that one tokenizer made both sets of blocks.

        Raises:
            FileNotFoundError: a part is missing.
            DamagedArtifactError: a part is altered, or the parts do not belong together.
        """
        folder = Path(folder)
        train, held_out = TokenBlocks.load(folder / "train"), TokenBlocks.load(folder / "held_out")
        tokenizer = _load_tokenizer(folder / "tokenizer")
        made_by = tokenizer_hash(tokenizer)
        for name, blocks in (("train", train), ("held_out", held_out)):
            if blocks.tokenizer_hash != made_by:
                raise DamagedArtifactError(f"{folder / name} was made by another tokenizer; prepare the tokens again")
        if train.sequence_length != held_out.sequence_length:
            raise DamagedArtifactError(
                f"{folder}: train has sequences of {train.sequence_length}, held_out of "
                f"{held_out.sequence_length}; prepare the tokens again"
            )
        return cls(train=train, held_out=held_out, tokenizer=tokenizer)


def prepare_tokens(
    source: str = DEMO_SOURCE,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int | None = None,
    sequence_length: int = 128,
    held_out_fraction: float = 0.05,
    seed: int = 0,
    max_documents: int | None = None,
) -> PreparedTokens:
    """Documents of `source`, split by document and packed; a new tokenizer sees the training documents only.

    Raises:
        ValueError: both or neither of `tokenizer` and `vocab_size` are given, or the source is too small.
    """
    if (tokenizer is None) == (vocab_size is None):
        raise ValueError("give either a tokenizer or the vocab_size of one to train, not both and not neither")
    documents = load_documents(source, max_documents=max_documents)
    train, held_out = split_documents(documents, held_out_fraction=held_out_fraction, seed=seed)
    if tokenizer is None:
        tokenizer = train_tokenizer(train, vocab_size=vocab_size or 0)
    return PreparedTokens(
        train=pack_documents(train, tokenizer, sequence_length=sequence_length),
        held_out=pack_documents(held_out, tokenizer, sequence_length=sequence_length),
        tokenizer=tokenizer,
    )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    verify_directory(folder, schema=TOKENIZER_SCHEMA)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    return tokenizer


def _is_same(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    try:
        return tokenizer_hash(_load_tokenizer(folder)) == tokenizer_hash(tokenizer)
    except (FileNotFoundError, DamagedArtifactError):
        return False


def _fingerprint_at(folder: Path) -> str | None:
    try:
        return TokenBlocks.load(folder).fingerprint
    except (FileNotFoundError, DamagedArtifactError):
        return None
