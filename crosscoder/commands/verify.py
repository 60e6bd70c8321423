"""`crosscoder verify`: every hash of what lies in some folders, and every fault by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from crosscoder.browser.folder import SCHEMA as FEATURES
from crosscoder.commands.base import Printed
from crosscoder.data.shards import SCHEMA as STORE
from crosscoder.data.shards import ActivationShards
from crosscoder.data.subject import SUBJECT_SCHEMA, require_written
from crosscoder.data.subject_training import RUN_FILE, SubjectRun
from crosscoder.data.tokens import SCHEMA as TOKENS
from crosscoder.data.tokens import TOKENIZER_SCHEMA, PreparedTokens, TokenBlocks, load_kept_tokenizer
from crosscoder.dictionary import load_dictionary
from crosscoder.dictionary.saved import SCHEMA as DICTIONARY
from crosscoder.foundation.artifact import (
    MANIFEST,
    SEAL,
    faults_of,
    other_version,
    read_json,
    read_sealed,
    unlisted_files,
    verify_directory,
)
from crosscoder.foundation.console import Progress, give, say
from crosscoder.foundation.tensors import load_tensors
from crosscoder.results.file import CELL_SCHEMA, RESULTS, load_results, read_rows
from crosscoder.studies.folder import INPUTS
from crosscoder.training.checkpoint import FILES, read_cursor
from crosscoder.training.checkpoint import SCHEMA as CHECKPOINT

EXPORTS = ("saelens/6", "delphi/0.1")


class DamagedError(ValueError):
    """Something that was looked at is not as it was written; the command ends with status 3."""


def _load_checkpoint(folder: Path) -> None:
    verify_directory(folder, schema=CHECKPOINT, required=FILES)
    read_cursor(folder)


KINDS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    TOKENS: ("token blocks", TokenBlocks.load),
    TOKENIZER_SCHEMA: ("tokenizer", load_kept_tokenizer),
    STORE: ("activations", ActivationShards.load),
    SUBJECT_SCHEMA: ("subject", require_written),
    CHECKPOINT: ("checkpoint", _load_checkpoint),
    DICTIONARY: ("dictionary", load_dictionary),
    FEATURES: ("features", lambda folder: verify_directory(folder, schema=FEATURES)),
    **{schema: ("export", partial(verify_directory, schema=schema)) for schema in EXPORTS},
}
"""What a manifest's schema is called, and the loader that reads such a folder."""
CLOSED = (TOKENS, TOKENIZER_SCHEMA, STORE, SUBJECT_SCHEMA)
"""Folders that nothing else belongs into."""
HIDDEN = (".tmp-", ".part-", ".old-", ".new-")
"""How the names begin of what is not finished."""


@dataclass(frozen=True, kw_only=True)
class Verify(Printed):
    """Check what lies in folders against its hashes, read it as its loader would, and name every fault.

    Token sets, activations, subjects, runs and their checkpoints, dictionaries, whole studies, and anything that holds
    them: all that is found in a folder is looked at. Ends with status 3 if something is damaged, 2 if nothing is found.

    $ crosscoder verify runs/tokens runs/acts
    $ crosscoder verify runs
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]  # Folders or files to look at

    def run(self) -> None:
        if not self.paths:
            raise ValueError("no path to look at; give folders, such as `crosscoder verify runs`")
        looked_at, faults = list[dict[str, Any]](), list[str]()
        with Progress("verify", None, unit="artifact") as progress:
            for path in self.paths:
                before = len(looked_at)
                for kind, where, said in check(path):
                    looked_at.append({"kind": kind, "path": str(where), "faults": said})
                    progress.advance()
                    faults += said
                    for line in () if self.json else said or ["good"]:
                        give(f"{'DAMAGED' if said else 'good   '}  {kind:<12}  {where}{f': {line}' if said else ''}")
                if len(looked_at) == before:
                    raise ValueError(f"{path} holds nothing that crosscoder has written with a hash; check the path")
        if self.json:
            give(json.dumps(looked_at, indent=2))
        if faults:
            raise DamagedError(f"{len(faults)} faults in what was looked at ({len(looked_at)}); each is named above")
        say(f"{len(looked_at)} looked at, all as they were written")


def check(path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Kind, path and faults of everything with a hash at a path or below it.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}; check the path")
    if path.is_file():
        yield from _check_file(path)
        return
    if (path / MANIFEST).is_file():
        yield _check_folder(path)
    else:
        if (path / "tokenizer").is_dir() and (path / "train").is_dir() and (path / "held_out" / "state.json").is_file():
            yield "token set", path, _faults(lambda: PreparedTokens.load(path))
        for file in sorted(one for one in path.iterdir() if one.is_file()):
            yield from _check_file(file)
    for folder in sorted(one for one in path.iterdir() if one.is_dir() and not one.is_symlink()):
        if folder.name.startswith("damaged-step-"):
            say(f"note: {folder} was damaged and is set aside; nothing reads it")
        elif not folder.name.startswith("."):
            yield from check(folder)
        elif folder.name.startswith(HIDDEN):
            say(f"note: {folder} was not finished; the next writer of its folder goes on with it or removes it")


def _check_folder(folder: Path) -> tuple[str, Path, list[str]]:
    try:
        manifest = read_json(folder / MANIFEST)
    except ValueError as error:
        return "artifact", folder, [str(error)]
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, str) or schema not in KINDS:
        near = next((known for known in KINDS if isinstance(schema, str) and _family(schema) == _family(known)), "")
        return "artifact", folder, [f"holds {schema!r}; {other_version(schema, near or 'crosscoder/0')}"]
    name, load = KINDS[schema]
    if faults := faults_of(folder, manifest):
        return name, folder, faults
    if schema in CLOSED and (more := unlisted_files(folder, manifest["files"])):
        return name, folder, [f"{folder / one} is not listed in {MANIFEST}" for one in more]
    return name, folder, _faults(lambda: load(folder))


def _family(schema: str) -> str:
    return schema.rpartition("/")[0]


def _check_file(path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A file that carries its own hash, or should; others are nobody's business here."""
    if path.name == RESULTS:
        yield "results", path, _faults(lambda: load_results(path.parent))
    elif path.name == INPUTS:
        yield "inputs", path, _faults(lambda: read_sealed(path))
    elif path.suffix == ".safetensors" and path.parent.name in ("readings", "activations"):
        yield "tensors", path, _faults(lambda: load_tensors(path))
    elif path.suffix == ".json" and path.name != MANIFEST:
        if path.name == RUN_FILE and any(path.parent.glob(f"step-*/{MANIFEST}")):
            yield "subject run", path, _faults(lambda: SubjectRun.load(path.parent))
            return
        try:
            value = read_json(path)
        except ValueError as error:
            yield "file", path, [str(error)]
            return
        if isinstance(value, dict) and (value.get("schema") == CELL_SCHEMA or path.parent.name == "cells"):
            yield "cell", path, _faults(lambda: read_rows(path))
        elif isinstance(value, dict) and SEAL in value:
            yield "file", path, _faults(lambda: read_sealed(path))


def _faults(load: Callable[[], Any]) -> list[str]:
    """What a loader says; empty if it reads the folder."""
    try:
        load()
    except (ValueError, OSError) as error:
        return [str(error)]
    return []
