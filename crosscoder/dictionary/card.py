"""The page that goes along with a dictionary: what it is, what was measured of it, and how to load it.

No number is made here: those of an `Evaluation` are printed, beside those of nulls that were measured alike, and one
that nobody measured is called so, with the command that would measure it. Names out of files are no markup.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.foundation.origin import KINDS, NULLS, MismatchError, Reads
from crosscoder.results.evaluation import SHOWN, About, Evaluation, measured_rows, require_nulls, words_of
from crosscoder.results.quantities import QUANTITIES

MARK = "<!-- This page is crosscoder's; the next push replaces it. Without this line it stays as you write it. -->"
OF_LOSS = ("loss_recovered", "clean_loss", "spliced_loss", "ablated_loss", "splice_tokens")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#!~$])")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")


class Facts(NamedTuple):
    """What is known of a dictionary without measuring anything."""

    form: str
    config: DictionaryConfig
    weights: str
    """sha256 of its tensors."""
    reads: Reads | None
    frozen: str

    def about(self, command: Sequence[str] = (), versions: dict[str, str] | None = None) -> About:
        """What an `Evaluation` says of the dictionary that it is of."""
        known = {"weights": self.weights, "form": self.form, "frozen": self.frozen}
        return About(**known, reads=self.reads, command=tuple(command), versions=versions)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card says beside what the dictionary knows of itself.

    evaluation: what was measured of it, by `crosscoder evaluate --out`. nulls: the same of dictionaries of nulls, of
    the same model and sites. license: the name of one, as `apache-2.0`. command: what trained it. trained_tokens: how
    many tokens that took. about: a paragraph of your own, as Markdown.
    """

    evaluation: Evaluation | None = None
    nulls: Sequence[Evaluation] = ()
    license: str | None = None
    command: Sequence[str] = ()
    trained_tokens: int | None = None
    about: str = ""

    def text(self, facts: Facts, *, repo: str = "", subfolder: str = "") -> str:
        self._require_same(facts)
        title = plain(repo.rpartition("/")[2] or facts.form)
        parts = [
            _front_matter(facts, self.license),
            f"{MARK}\n\n# {title}",
            *([self.about.strip()] if self.about.strip() else []),
            _described(facts),
            "## What it is\n\n" + _table([("", ""), *_identity(facts, self)]),
            "## What was measured\n\n" + self._measured(facts),
            "## How to load it\n\n" + _loading(facts, repo, subfolder),
            "## How it was made\n\n" + _command("It was trained by", self.command, "What trained it was not recorded."),
        ]
        return "\n\n".join(parts) + "\n"

    def _require_same(self, facts: Facts) -> None:
        if self.evaluation is not None and (seen := self.evaluation.about.weights) != facts.weights:
            raise MismatchError(
                f"the evaluation is of weights {seen[:12]}, this dictionary has {facts.weights[:12]}; evaluate this one"
            )
        require_nulls(self.nulls, facts.reads)

    def _measured(self, facts: Facts) -> str:
        if self.evaluation is None:
            return f"Nothing was measured. {_how_to_measure(loss=True)}"
        measured = [self.evaluation, *self.nulls]
        names = ["this dictionary", *(f"null: {one.about.null}" for one in self.nulls)]
        rows: list[tuple[str, ...]] = [("", *map(plain, names))]
        rows += [(words, *cells) for _, words, cells in measured_rows(measured)]
        said = [_table(rows)]
        if missing := [key for key in SHOWN if all(key not in one.values for one in measured)]:
            words = ", ".join(words_of(key) for key in missing if key != "mean_rho")
            spread = "Every feature of a bank has one layer, so there is no spread. " if "mean_rho" in missing else ""
            loss = set(missing) & set(OF_LOSS)
            said.append(spread + (f"Not measured: {words}. {_how_to_measure(loss=bool(loss))}" if words else ""))
        if not self.nulls:
            said.append(
                "No null was measured beside it: what a dictionary of nothing would show is not known. Train one by "
                "`crosscoder train --null gaussian` or `--budget.frozen encoder`, and evaluate it alike."
            )
        shown = [key for key in SHOWN if key not in missing]
        said.append("\n".join(f"- **{words_of(key)}**: {plain(QUANTITIES[key].definition)}" for key in shown))
        said.append(_command("The numbers are those of", self.evaluation.about.command, ""))
        return "\n\n".join(part for part in said if part)


def is_own_card(text: str) -> bool:
    """Whether a README is a card that was written here, and not changed into somebody's own."""
    return MARK in text


def is_stale_card(path: Path, weights: Callable[[], str]) -> bool:
    """Whether a file is a card of other weights than these, of which the hash is taken only where it is needed."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return is_own_card(text) and weights() not in text


def plain(text: object) -> str:
    """A name from a file as one line of Markdown that is nothing but text, in a cell of a table too."""
    return _MARKUP.sub(r"\\\1", " ".join(_NO_TEXT.sub(" ", str(text)).split()))


def _front_matter(facts: Facts, license_name: str | None) -> str:
    """The Hub's own table, as JSON strings, which are YAML. Models and data sets are named where the Hub has them."""
    known: dict[str, Any] = {"library_name": "crosscoder"}
    if license_name is not None:
        known["license"] = license_name
    if (reads := facts.reads) is not None:
        if _is_on_hub(reads.model.name, reads.model.revision):
            known["base_model"] = reads.model.name
        if (text := reads.tokens.text) is not None and _is_on_hub(text.source, text.revision):
            known["datasets"] = [text.source]
    form = "crosscoder" if facts.form == "Crosscoder" else "sparse-autoencoder"
    known["tags"] = ["interpretability", "dictionary-learning", form]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in known.items()), "---"])


def _described(facts: Facts) -> str:
    c = facts.config
    null = "" if facts.reads is None or facts.reads.null is None else f", trained on a null: {NULLS[facts.reads.null]}"
    frozen = "" if facts.frozen == "none" else f", of which the {facts.frozen} was not learnt (a baseline)"
    if facts.form == "Crosscoder":
        return f"A crosscoder: {c.n_features:,} features that read and write {c.n_layers} layers{null}{frozen}."
    each = "one for all layers" if c.shared else "one a layer"
    return f"A bank of sparse autoencoders of {c.n_features:,} features, {each}, of {c.n_layers}{null}{frozen}."


def _identity(facts: Facts, card: ModelCard) -> list[tuple[str, str]]:
    c, reads = facts.config, facts.reads
    rows = [("form", f"{facts.form}, {c.n_layers} layers x {c.d_model}, {c.n_features:,} features")]
    rows += [
        ("sparsity", f"`{c.sparsity}`"),
        ("structure", f"`{c.structure}`"),
        ("weights", f"sha256 `{facts.weights}`"),
    ]
    if reads is None:
        return [*rows, ("reads", "no record of what it reads was kept")]
    model = f"{plain(_name(reads.model.name, reads.model.revision))}, weights sha256 `{reads.model.weights[:16]}`"
    rows += [("base model", model + (f", revision {plain(reads.model.revision)}" if reads.model.revision else ""))]
    rows += [("layers", ", ".join(map(str, reads.sites))), ("site", KINDS[reads.site])]
    blocks = f"blocks of {reads.tokens.context} tokens, {'no' if reads.tokens.bos is None else 'with'} BOS"
    if (text := reads.tokens.text) is None:
        rows.append(("text", f"not recorded; {blocks}"))
    else:
        revision = f", revision {plain(text.revision)}" if text.revision else ""
        source = f"{plain(_name(text.source, text.revision))}{revision}, {text.n_documents:,} documents"
        rows.append(("text", f"{source}, sha256 `{text.content[:16]}`; {blocks}"))
    if card.trained_tokens is not None:
        rows.append(("trained on", f"{card.trained_tokens:,} tokens"))
    return rows


def _name(name: str, revision: str | None) -> str:
    """A name on the Hub or in a package whole; a path of somebody's machine by its last part."""
    is_whole = _is_on_hub(name, revision) or name.startswith("package:")
    return name if is_whole else PurePath(name).name or name


def _is_on_hub(name: str, revision: str | None) -> bool:
    """Whether it was read from the Hub, at a commit; a folder may have one too, such as one of the Hub's cache."""
    return revision is not None and _HUB_NAME.fullmatch(name) is not None


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _loading(facts: Facts, repo: str, subfolder: str) -> str:
    where = json.dumps(repo or "path/of/this/folder")
    inside = f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    scale = "x: activations [tokens, layers, width], times dictionary.input_scale[:, None]"
    return (
        "```python\nfrom crosscoder import load_dictionary\n\n"
        f"dictionary = load_dictionary({where}{inside})\ncode = dictionary.encode(x)  # {scale}\n"
        "recon = dictionary.decode(code)\n```"
    )


def _how_to_measure(*, loss: bool) -> str:
    read = "--subject MODEL --tokens-folder TOKENS" if loss else "--activations STORE"
    return f"Measure it by `crosscoder evaluate --dictionary FOLDER {read} --out FILE`."


def _command(before: str, command: Sequence[str], otherwise: str) -> str:
    """A command with absolute paths, which are of one machine, by their last part."""
    if not command:
        return otherwise
    shown = [re.sub(r"(^|=)[~/][^=]*/(?=[^/])", r"\1", part) for part in command]
    line = _NO_TEXT.sub(" ", shlex.join(shown)).replace("```", "'''")
    return f"{before}\n\n```bash\n{line}\n```"
