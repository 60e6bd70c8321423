"""Where an artifact came from: the text, tokens, model and sites behind it, as records that travel along with it.

A token folder keeps `TokenOrigin`, an activation store and a trained dictionary keep `Reads`. Whoever joins two
artifacts compares their records first, so that numbers are never taken of things that do not belong together.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat

from crosscoder.foundation.config import config
from crosscoder.foundation.console import say

Kind = Literal["residual", "write", "mlp", "other"]
KINDS: dict[Kind, str] = {
    "residual": "residual stream after each block",
    "write": "what each block adds to the residual stream",
    "mlp": "what MLPs are given, after the norm before them, and what they return, before any norm behind them",
    "other": "places that are not harvested here",
}
"""What is read, by what a user calls it."""
Null = Literal["shuffled", "gaussian"]
NULLS: dict[Null, str] = {
    "shuffled": "every layer's tokens in an order of its own",
    "gaussian": "tokens of a Gaussian of the same mean and covariance over all layers",
}
"""What is put in the place of the activations, to see what a measurement finds where there is nothing of the kind."""


HASHED = ("model", "tokenizer", "BOS", "markup as special tokens", "first positions left out", "outliers kept")
"""What `require_same` compares only where both sides were seen here."""


class MismatchError(ValueError):
    """Two artifacts that do not belong together."""


@config
class TextOrigin:
    """The documents of a token folder.

    content: sha256 of the documents that were read, in their order.
    skipped: documents or files that were not read, by reason.
    """

    source: str
    content: str
    config_name: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None
    n_documents: NonNegativeInt = 0
    skipped: dict[str, int] = field(default_factory=dict)


@config
class TokenOrigin:
    """How text became token blocks.

    tokenizer: sha256 of its rules and vocabulary. bos: the id that begins every block; None where none does.
    special_ids: the tokenizer's special tokens, which are no text.
    special_tokens: whether markup in the text that spells special tokens was read as those. context: tokens of a
    block; 0 where a publisher does not say it.
    """

    tokenizer: str
    name: str | None = None
    revision: str | None = None
    bos: NonNegativeInt | None = None
    special_ids: tuple[int, ...] = ()
    special_tokens: bool = False
    context: NonNegativeInt
    text: TextOrigin | None = None


@config
class ModelOrigin:
    """A language model. `weights` is the sha256 of its parameters and buffers, empty where only its name is known;
    `revision` is a commit on the Hub."""

    name: str
    weights: str
    revision: str | None = None
    dtype: str = "float32"


@config
class Reads:
    """What a store holds and a dictionary reads.

    sites: blocks, counted from 1, whose outputs, writes or MLPs are read; 0 is the embedding.
    convention: of MLPs, what is read and whether norms or the residual are inside, as the model's probe says.
    skip_positions: tokens left out at the start of every block. keep_outliers: whether tokens of unusual norm and
        special tokens are kept. dropped: tokens that were not harvested, by reason. scale: the factor of each layer
        that made its usual norm sqrt(D).
    null: what stands in the place of these activations; None where they are the model's own.
    published: of a dictionary that somebody else trained: format, place, revision and sha256 of what it was read from.
        Its model is known by name alone then, and its tokens are not known.
    """

    model: ModelOrigin
    tokens: TokenOrigin
    site: Kind
    sites: tuple[int, ...]
    convention: str = ""
    skip_positions: NonNegativeInt = 1
    keep_outliers: bool = False
    dropped: dict[str, int] = field(default_factory=dict)
    scale: tuple[PositiveFloat, ...] = ()
    null: Null | None = None
    published: str = ""

    def as_null(self, null: Null) -> Reads:
        """The record of a null made of these activations; a ValueError if they are one already."""
        if self.null is not None:
            raise ValueError(
                f"these activations are the {self.null} null already; make the {null} one of the model's own"
            )
        return replace(self, null=null)

    def on_tokens(self, tokens: TokenOrigin | None) -> Reads:
        """The record with the tokens that a published dictionary is read on, as its own are not known: what is special
        among these is no text either."""
        return replace(self, tokens=tokens) if self.published and tokens is not None else self

    def __str__(self) -> str:
        """One line for people."""
        numbers = ", ".join(map(str, self.sites))
        if self.published:
            where = f" ({self.convention})" if self.convention else ""
            return f"{KINDS[self.site]}{where}, sites {numbers}, of {self.model.name or 'a model'}; {self.published}"
        bos = "with BOS" if self.tokens.bos is not None else "no BOS"
        left_out = "no special or outlier tokens" if self.tokens.special_ids else "no outlier tokens"
        kept = "all tokens" if self.keep_outliers else left_out
        revision = f"@{self.model.revision[:12]}" if self.model.revision else ""
        model = f"{self.model.name}{revision} ({self.model.weights[:8]})"
        null = "" if self.null is None else f"the {self.null} null ({NULLS[self.null]}) of "
        return f"{null}{KINDS[self.site]}, sites {numbers}, of {model}; blocks of {self.tokens.context}, {bos}, {kept}"


def require_same(mine: Reads | None, other: Reads | None, *, owner: str, given: str) -> None:
    """Refuse to join two artifacts that read different things; one that keeps no record is let through.

    Blocks of another length are said, and let through. Where one of the two was published by somebody else, sites alone
    can be compared, and it is said if the models have other names.
    """
    if mine is None or other is None:
        return
    wrong, mend_site = [], f"--site {mine.site}"
    by_name = bool(mine.published or other.published)
    if "mlp" in (mine.site, other.site):
        mend_site = f"--reads {'mlp' if mine.site == 'mlp' else 'residual'}"
    for what, a, b, mend in (
        ("model", *(f"{r.model.name} ({r.model.weights[:8]})" for r in (mine, other)), "give it with --subject"),
        ("tokenizer", *(r.tokens.tokenizer[:8] for r in (mine, other)), "prepare the text with the model's own"),
        ("BOS", *(_said(r.tokens.bos is not None) for r in (mine, other)), f"prepare with --{_no(mine.tokens.bos)}bos"),
        ("markup as special tokens", *(_said(r.tokens.special_tokens) for r in (mine, other)), "--special-tokens"),
        ("site", mine.site, other.site, mend_site),
        ("sites", *(list(r.sites) for r in (mine, other)), f"--layers {' '.join(map(str, dict.fromkeys(mine.sites)))}"),
        ("MLPs", mine.convention or "none", other.convention or "none", "--reads and --mlp-path"),
        ("first positions left out", mine.skip_positions, other.skip_positions, "harvest again"),
        (
            "null",
            *(r.null or "none" for r in (mine, other)),
            f"--null {mine.null}" if mine.null else "leave out --null",
        ),
        ("outliers kept", *(_said(r.keep_outliers) for r in (mine, other)), "with or without --keep-outliers"),
    ):
        unsaid = what in HASHED or (what == "MLPs" and "none" in (a, b))
        if a != b and not (by_name and unsaid):
            wrong.append(f"{what}: {owner} {a}, {given} {b} ({mend})")
    if wrong:
        raise MismatchError(f"{owner} and {given} do not belong together: {'; '.join(wrong)}")
    if by_name:
        _compare_names(mine.model.name, other.model.name, owner=owner, given=given)
    elif mine.tokens.context != other.tokens.context:
        say(
            f"note: {owner} comes from blocks of {mine.tokens.context} tokens, {given} from blocks of "
            f"{other.tokens.context}: later positions are other inputs, and scores are not those of its own context"
        )


def _compare_names(mine: str, other: str, *, owner: str, given: str) -> None:
    # Base models are published with and without the suffix.
    short = [name.rstrip("/").split("/")[-1].casefold().removesuffix("-pt") for name in (mine, other)]
    if short[0] != short[1]:
        say(
            f"warning: {owner} is of {mine or 'a model without a name'}, {given} of {other or 'one without a name'}, "
            "and no hash tells whether these are the same: make sure that they are"
        )


def _no(bos: int | None) -> str:
    return "" if bos is not None else "no-"


def _said(yes: bool) -> str:
    return "yes" if yes else "no"
