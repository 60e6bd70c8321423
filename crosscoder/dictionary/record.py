"""What a saved dictionary is, without its weights."""

from __future__ import annotations

from pathlib import Path

from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.saved import CONFIG
from crosscoder.foundation.artifact import DamagedArtifactError, read_json
from crosscoder.foundation.config import from_mapping
from crosscoder.foundation.hub import local_folder
from crosscoder.foundation.origin import Reads


def read_record(where: str | Path) -> tuple[DictionaryConfig, Reads | None]:
    """The settings of a dictionary in a folder or on the Hub, and the record of what it reads, if it keeps one.

    Raises:
        FileNotFoundError: there is no dictionary there.
        DamagedArtifactError: its config is no dictionary's.
    """
    path = local_folder(where, files=(CONFIG,)) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{where} holds no {CONFIG}: it is no dictionary; give a folder that `train` wrote")
    saved = read_json(path)
    if not isinstance(saved, dict) or "settings" not in saved:
        raise DamagedArtifactError(f"{path} does not describe a dictionary")
    config = from_mapping(DictionaryConfig, saved["settings"], where=str(path))
    reads = saved.get("reads")
    return config, None if reads is None else from_mapping(Reads, reads, where=f"{path}.reads")
