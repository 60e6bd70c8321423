"""The browser of a study's crosscoder, written beside its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from crosscoder.browser.findings import find_features
from crosscoder.browser.folder import write_features
from crosscoder.browser.source import source_of
from crosscoder.data.subject import Subject
from crosscoder.data.tokenizer import count_ids
from crosscoder.data.tokens import PreparedTokens
from crosscoder.dictionary import Dictionary, load_dictionary
from crosscoder.foundation.artifact import MANIFEST
from crosscoder.foundation.console import say
from crosscoder.foundation.origin import MismatchError
from crosscoder.results.table import Place, Row
from crosscoder.studies.cells import Cell, file_name
from crosscoder.studies.folder import StudyFolder

FOLDER = "features"


def browse(
    study: StudyFolder, cells: Sequence[Cell], subject: Subject, tokens: PreparedTokens, **how: Any
) -> list[Row]:
    """Write the features of the first crosscoder of the study's main site, once, and say where they are.

    Nearest features are sought in the bank of the same site and in the crosscoders of other seeds, which also tell
    stability. Reads the held-out text through the model once more, since stores are gone by now. `how` is of
    `source_of`. What goes wrong is the reason of a missing row, not the end of a study.
    """
    trained = [cell for cell in cells if cell.role == "main" and cell.state == "trained"]
    cell = [one for one in trained if one.arm == "crosscoder"][-1]  # block writes, where they are read
    bank = next(one for one in trained if one.arm == "layerwise" and one.site == cell.site)
    at = _of_seed(cell, cell.seeds[0])
    if not (study.root / FOLDER / MANIFEST).is_file():
        others = {f"seed {seed}": _load(study, _of_seed(cell, seed)) for seed in cell.seeds[1:]}
        others["bank"] = _load(study, _of_seed(bank, bank.seeds[0]))
        dictionary = _load(study, at)
        try:
            findings = find_features(
                dictionary,
                source_of(dictionary, subject.model, tokens.held_out, **how),
                tokens.held_out,
                model=subject.model,
                blocks_path=how.get("blocks_path"),
                others=others,
                n_text=count_ids(subject.tokenizer),
            )
            write_features(findings, subject.tokenizer, study.root / FOLDER)
        except MismatchError:
            raise
        except (OSError, ValueError) as error:
            say(f"no browser of the features: {error}")
            return [Row(at, "features_page", None, str(error))]
    return [Row(at, "features_page", f"{FOLDER}/index.html")]


def _of_seed(cell: Cell, seed: int) -> Place:
    return replace(cell.place, seed=seed)


def _load(study: StudyFolder, at: Place) -> Dictionary:
    return load_dictionary(study.root / "dictionaries" / file_name(at)).to(study.device)
