"""What a study is made from, by content: a study whose text or model was replaced is not gone on with."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

from crosscoder.data.text import DEMO_SOURCE, unused_settings
from crosscoder.foundation.artifact import file_sha256, read_sealed, write_sealed
from crosscoder.foundation.origin import MismatchError

INPUTS = "inputs.json"


def require_inputs(folder: Path, **hashes: str) -> None:
    """Keep the hashes of a study's inputs in its folder, or compare them with those that its tokens were made from."""
    path = folder / INPUTS
    if not path.is_file() or not (folder / "tokens" / "held_out").is_dir():
        write_sealed(path, hashes)
        return
    known = read_sealed(path, mend="delete the folder for a new study")
    changed = [
        f"{name} (now {new[:12]}, then {str(known.get(name))[:12]})"
        for name, new in hashes.items()
        if known.get(name) != new
    ]
    if changed:
        raise MismatchError(
            f"{folder} was made from other inputs: {', '.join(changed)} changed since. Its results are not of what is "
            "there now: put the old ones back, or delete the folder (or give another --out) for a new study"
        )


def text_hash(source: str) -> str:
    """sha256 of the names and bytes of a text's files; of a data set on the Hub, which is not read here, its name's."""
    unused_settings(source)
    home = Path(source)
    if source == DEMO_SOURCE and (spec := importlib.util.find_spec(source)) and spec.submodule_search_locations:
        home = Path(spec.submodule_search_locations[0]) / "data"
    if not home.exists():
        return hashlib.sha256(source.encode()).hexdigest()
    inside = (path for path in home.rglob("*") if not re.search(r"(^|/)\.", path.relative_to(home).as_posix()))
    files = [home] if home.is_file() else sorted(path for path in inside if path.is_file())
    lines = [f"{path.relative_to(home)} {file_sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
