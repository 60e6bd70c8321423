"""Tokens as people read them: the text of each, with whatever cannot be seen, or would move other text, spelled out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from crosscoder.measure.labels import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIGNS = {"\n": "⏎", "\t": "⇥"}
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of characters that are spelled out: control, format (direction marks among them), unassigned, breaks."""


class TokenTexts:
    """The text of each token of a tokenizer, by id, as it is inside a text; empty for an id that it does not know."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._texts = tokenizer, dict[int, str]()
        self._letter = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._start = len(decode(tokenizer, self._letter))

    def __getitem__(self, number: int) -> str:
        """The text as it is; a token that is only a part of a character is the tokenizer's own name for it."""
        if number not in self._texts:
            try:
                text = decode(self._tokenizer, [*self._letter, number])[self._start :]
                if "\N{REPLACEMENT CHARACTER}" in text or not text:
                    text = str(self._tokenizer.convert_ids_to_tokens(number) or "")
            except (IndexError, KeyError, OverflowError, TypeError):
                text = ""
            self._texts[number] = text
        return self._texts[number]

    def of(self, ids: Iterable[int] | np.ndarray) -> list[str]:
        return [self[int(one)] for one in ids]


def visible(text: str) -> str:
    """A text in which no character is unseen: breaks and tabs as signs, others as `<U+202E>` in angle brackets."""
    return "".join(SIGNS.get(c) or (f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in HIDDEN else c) for c in text)
