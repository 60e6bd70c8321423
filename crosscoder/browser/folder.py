"""The folder of a dictionary's features: parquet files, a record, and a page that a browser opens by itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.browser import words
from crosscoder.browser.data import EXAMPLES, FEATURES, DataFiles
from crosscoder.browser.findings import Findings
from crosscoder.browser.page import BLOCK, Pages
from crosscoder.browser.records import Records
from crosscoder.browser.tokens import TokenTexts
from crosscoder.foundation.artifact import committed_directory, write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = "crosscoder.features/1"
RECORD = "features.json"
ASSETS = ("index.html", "browser.js", "browser.css")


def write_features(
    findings: Findings, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, quiet: bool = False
) -> Path:
    """The path of `index.html`, after writing the folder whole: see `docs/features.md` for each file."""
    folder, texts, records = Path(folder), TokenTexts(tokenizer), Records(findings)
    with committed_directory(folder, schema=SCHEMA) as temporary:
        for name in ASSETS:
            shutil.copyfile(Path(__file__).parent / "assets" / name, temporary / name)
        pages = Pages(temporary, records, texts)
        with (
            DataFiles(temporary, records, texts) as data,
            Progress("pages", len(findings), unit="features", quiet=quiet) as progress,
        ):
            for start in range(0, len(findings), BLOCK):
                features = range(start, min(start + BLOCK, len(findings)))
                strongest = {one: records.strongest(one) for one in features}
                quantiles = {one: records.quantiles(one) for one in features}
                pages.add(features, strongest, quantiles)
                each = [*strongest.values(), *(band for bands in quantiles.values() for band in bands)]
                data.add(features, [example for examples in each for example in examples])
                progress.advance(len(features))
        title, lead, facts = describe(findings)
        pages.finish(title=title, lead=lead, facts=facts)
        write_json(temporary / RECORD, record(findings))
    return folder / "index.html"


def describe(findings: Findings) -> tuple[str, str, list[tuple[str, str]]]:
    """Title, one sentence, and facts of the first page."""
    dictionary, activity, reads = findings.dictionary, findings.activity, findings.dictionary.reads
    form = "A bank of SAEs" if findings.activity.rows.is_bank else "A crosscoder"
    model = "a model" if reads is None else Path(reads.model.name.removeprefix("package:")).name
    alive = int(activity.alive_F.sum())
    lead = (
        f"{form} with {len(findings):,} features over {len(findings.sites)} layers of {model}; {alive:,} are alive "
        f"(active on more than ten of the {activity.n_tokens:,} tokens that were read)."
    )
    text = None if findings.tokens.origin is None else findings.tokens.origin.text
    facts = [("Dictionary", dictionary.extra_repr().splitlines()[0])]
    facts.append(("Reads", str(reads) if reads is not None else "no record of what it reads"))
    facts.append(("Text", "not recorded" if text is None else text.source))
    facts.append(("Tokens read", f"{activity.n_tokens:,} in {activity.n_blocks:,} blocks of {activity.context}"))
    if findings.readout is not None:
        facts.append(("Final norm", f"{findings.readout.norm}; scale of the mean token {findings.readout.scale:.4g}"))
    if findings.n_alike:
        facts.append(("Stability", f"over {findings.n_alike} other dictionaries of the same form"))
    return f"Features of {model}", lead, facts


def record(findings: Findings) -> dict[str, Any]:
    """What the folder is of, and what its numbers mean."""
    dictionary, activity, tokens = findings.dictionary, findings.activity, findings.tokens
    readout = findings.readout
    return {
        "class": type(dictionary).__name__,
        "settings": to_mapping(dictionary.config),
        "frozen": dictionary.frozen,
        "reads": None if dictionary.reads is None else to_mapping(dictionary.reads),
        "input_scale": dictionary.input_scale.tolist(),
        "tokens": {
            "fingerprint": tokens.fingerprint,
            "origin": None if tokens.origin is None else to_mapping(tokens.origin),
            "read": activity.n_tokens,
            "blocks": activity.n_blocks,
            "context": activity.context,
        },
        "sites": list(findings.sites),
        "features": len(findings),
        "alive": int(activity.alive_F.sum()),
        "wanted": to_mapping(activity.wanted),
        "readout": None if readout is None else {"norm": readout.norm, "scale": readout.scale},
        "no_effects": findings.no_effects or None,
        "others": [name for name in findings.nearest if name],
        "alike": findings.n_alike,
        "files": {"features": FEATURES, "examples": EXAMPLES, "page": "index.html"},
        "definitions": {one.key: one.definition for one in words.COLUMNS} | dict(words.DEFINITIONS),
    }
