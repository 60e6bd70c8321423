"""Artifacts on the Hugging Face Hub, found by name and read from its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_folder(where: str | Path, *, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder at a path; of `organisation/repository` on the Hub its `files` in the cache, fetched where need be.

    A folder of that name goes first. revision: a branch, tag or commit; None: the main branch.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a repository, or the Hub cannot be reached.
        ValueError: a revision of a folder, which has none.
    """
    folder = Path(where)
    if folder.exists() or not NAME.fullmatch(str(where)):
        if revision is not None:
            raise ValueError(f"revision {revision!r} of {where}, which is no repository on the Hub; leave it out")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(where), revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        at = "" if revision is None else f" at {revision}"
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"no folder {where}, and no repository {where}{at} on the Hub or in its cache ({said}); check the name, "
            "and for a private one log in with `hf auth login`"
        ) from error
