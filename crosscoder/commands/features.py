"""The command that shows what a dictionary's features mean."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from crosscoder.commands.base import LOADING, RAW, SUBJECT, Idle, ReadsModel
from crosscoder.data.shards import ActivationShards
from crosscoder.data.sites import kind_read
from crosscoder.data.sources import Activations, SiteKind
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import load_model, require_own_tokens
from crosscoder.data.tokenizer import count_ids
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.dictionary import Dictionary, load_dictionary
from crosscoder.dictionary.scale import at_usual_scale
from crosscoder.foundation.artifact import require_replaceable
from crosscoder.foundation.console import give, human_bytes, say
from crosscoder.foundation.origin import MismatchError
from crosscoder.needs import Needs


@dataclass(frozen=True, kw_only=True)
class Features(ReadsModel):
    """Show what features mean: how often each fires, its strongest examples, the tokens it promotes.

    One pass over text the dictionary was not trained on writes a folder: `index.html`, which a browser opens offline
    (search, sort, a page a feature), and parquet files that `datasets` reads. What is read of the model is what the
    dictionary's record says.

    $ crosscoder features runs/cc/dictionary --subject runs/A/step-488 --tokens-folder runs/tokens --out runs/look
    $ crosscoder features runs/cc/dictionary --activations runs/acts --tokens-folder runs/tokens --out runs/look
    $ crosscoder features runs/cc/dictionary --subject runs/A/step-488 --tokens-folder runs/tokens --out runs/look \
--other runs/seed1/dictionary runs/bank/dictionary
    """

    dictionary: tyro.conf.Positional[Path]  # What `crosscoder train` wrote: a folder with config.json and weights
    out: Path  # Folder to write; index.html is in it
    tokens_folder: Path  # What `crosscoder prepare` wrote, with the subject's own tokenizer
    subject: Annotated[str | None, SUBJECT] = None
    activations: Path | None = None
    """Read these, which `crosscoder harvest` wrote of the same tokens; then --subject is for logit effects alone."""
    split: Literal["held_out", "train"] = "held_out"  # The text to read
    max_tokens: int = 50_000  # Tokens to harvest and read, in whole blocks spread evenly over the text
    other: tuple[Path, ...] = ()
    """Dictionaries over the same layers, a bank or other seeds: nearest features are sought in each, and stability is
    the share of those of the same form in which a feature is found."""
    nearest: int = 5  # Nearest features to keep of each dictionary; 0 for none
    examples: int = 12  # Strongest examples of a feature
    before: int = 16  # Tokens of an example before the one it is of
    after: int = 7  # Tokens after it
    logits: bool = True  # With --subject: tokens that features promote and suppress
    site: SiteKind | None = None  # What is read of each block. None: what the dictionary reads
    raw_inputs: Annotated[bool, RAW] = False

    def idle(self) -> Idle:
        found = super().idle()
        if self.activations is not None:
            names = ("layers", "reads", "blocks_path", "mlp_path", "keep_outliers", "max_tokens")
            found["activations are read from --activations"] = (
                names if self.subject is None else (*names[:2], *names[3:])
            )
            if self.subject is None:
                found["that is of a subject, and there is none"] = ("logits", *LOADING)
        return found

    def needs(self) -> Needs:
        from crosscoder.measure.examples import Wanted
        from crosscoder.measure.rows import FeatureRows

        dictionary = load_dictionary(self.dictionary)
        n_features, rows = FeatureRows.of(dictionary).layer_FK.shape
        wanted = self._wanted(Wanted)
        each = 4 * wanted.width * (wanted.strongest + wanted.sampled + 3 * rows) + 4 * wanted.sampled * (rows + 1)
        return [
            ("features", f"{n_features:,}"),
            ("tokens to read, at most", "all of --activations" if self.activations else f"{self.max_tokens:,}"),
            ("examples in memory", human_bytes(n_features * each)),
            ("the dictionary", human_bytes(sum(4 * one.numel() for one in dictionary.parameters()))),
            ("disk, about", human_bytes(n_features * (wanted.strongest + 12) * wanted.width * 12)),
        ]

    def _wanted(self, kind: Any) -> Any:
        return kind(strongest=self.examples, before=self.before, after=self.after)

    def run(self) -> None:
        from crosscoder.browser.findings import find_features
        from crosscoder.browser.folder import SCHEMA, write_features
        from crosscoder.browser.source import as_dictionary_reads
        from crosscoder.measure.examples import Wanted

        require_replaceable(self.out, SCHEMA)
        wanted, dictionary = self._wanted(Wanted), load_dictionary(self.dictionary).to(self.device)
        if self.max_tokens < 1 or self.nearest < 0:
            raise ValueError(f"max_tokens is {self.max_tokens} and nearest {self.nearest}; expected 1 and 0 or more")
        dictionary.require_input_scale("looking at features", raw_inputs=self.raw_inputs)
        others = {name: load_dictionary(path).to(self.device) for name, path in zip(names_of(self.other), self.other)}
        prepared = PreparedTokens.load(self.tokens_folder)
        tokens = getattr(prepared, self.split)
        read, model = self._read(dictionary, tokens)
        at_usual_scale(dictionary, lambda: read.site_scale(self.site or kind_read(dictionary.reads)))
        source = as_dictionary_reads(dictionary, read, self.site)
        findings = find_features(
            dictionary,
            source,
            tokens,
            model=model if self.logits else None,
            blocks_path=self.blocks_path,
            others=others,
            wanted=wanted,
            nearest=self.nearest,
            n_text=count_ids(prepared.tokenizer),
        )
        path = write_features(findings, prepared.tokenizer, self.out)
        activity, size = findings.activity, sum(one.stat().st_size for one in self.out.iterdir())
        say(
            f"{int(activity.alive_F.sum()):,} of {len(findings):,} features are alive (active on more than ten of the "
            f"{activity.n_tokens:,} tokens read); the folder has {human_bytes(size)}"
        )
        give(path)

    def _read(self, dictionary: Dictionary, tokens: TokenBlocks) -> tuple[Activations, Any]:
        """The activations to read, and the model where there is one."""
        if self.activations is not None:
            store = ActivationShards.load(self.activations / self.split)
            require_same_tokens(store, tokens, self.tokens_folder / self.split)
            model = None
            if self.subject is not None and self.logits:
                model = load_model(self.subject, **asdict(self.loading), device=self.device)
            return store, model
        if self.subject is None:
            raise ValueError("nothing to read: give --subject, or --activations")
        require_own_tokens(self.subject, tokens, revision=self.loading.revision)
        harvester = self.as_read(dictionary.reads).harvester(self.subject)
        return ActivationStream(harvester, tokens, max_tokens=self.max_tokens, ahead=False), harvester.model


def names_of(paths: tuple[Path, ...]) -> list[str]:
    """A short name for each folder, different from one another: as many of its last parts as it takes."""
    for depth in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names) and set(names) != {"dictionary"}:
            return names
    if len(set(paths)) < len(paths):
        raise ValueError(f"--other names {', '.join(map(str, paths))}; expected every dictionary once")
    return [str(path) for path in paths]


def require_same_tokens(store: ActivationShards, tokens: TokenBlocks, folder: Path) -> None:
    """Refuse a store that was not harvested from these tokens: its numbers would be of other text.

    Raises:
        MismatchError: names both.
    """
    metadata = store.index.metadata if isinstance(store.index.metadata, dict) else {}
    kept = metadata.get("tokens")
    wrong = kept is not None and kept != tokens.fingerprint
    origin = None if store.harvested is None else store.harvested.tokens
    wrong |= origin is not None and tokens.origin is not None and origin != tokens.origin
    wrong |= store.context != tokens.sequence_length or int(store.token_T[-1]) >= tokens.n_tokens
    if wrong:
        raise MismatchError(
            f"--activations were harvested from other tokens than those of {folder} (fingerprint "
            f"{tokens.fingerprint[:12]}), so examples would show other text; give the --tokens-folder they are of"
        )
    if kept is None:
        say("note: this store does not keep which tokens it is of; nobody can tell whether these are all the same")
