"""Artifacts on the Hugging Face Hub: found by name and read from its cache, and uploaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crosscoder.foundation.console import say

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CARD = "README.md"


def local_folder(
    where: str | Path,
    *,
    files: Sequence[str],
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
) -> Path:
    """The folder at a path; of `organisation/repository` on the Hub its `files` in the cache, fetched where need be.

    A folder of that name goes first. revision: a branch, tag or commit; None: the main branch. subfolder: of either.
    """
    folder, inside = Path(where), _plain_subfolder(subfolder)
    if folder.exists() or not NAME.fullmatch(str(where)):
        if revision is not None:
            raise ValueError(f"revision {revision!r} of {where}, which is no repository on the Hub; leave it out")
        return folder / inside
    hub = _client()
    patterns = [(inside / name).as_posix() for name in files]
    try:
        found = hub.snapshot_download(str(where), revision=revision, allow_patterns=patterns, token=token)
    except _failures() as error:
        at = "" if revision is None else f" at {revision}"
        raise FileNotFoundError(
            f"no folder {where}, and no repository {where}{at} on the Hub or in its cache ({_said(error)}); check the "
            "name, and for a private one log in with `hf auth login` or give token="
        ) from error
    return Path(found) / inside


def upload_folder(
    folder: Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    message: str,
    may_replace_card: Callable[[str], bool] | None = None,
) -> str:
    """Upload the files of `folder` to `organisation/repository` as one commit, and return the commit's address.

    The repository is made if there is none; what else it holds stays.

    private: whether a new one is. revision: a branch, made if there is none. may_replace_card: asked of the text of a
        README that is there already; where it says no, that stays and it is said.
    """
    if not NAME.fullmatch(repo):
        raise ValueError(f"{repo!r} is no repository; give organisation/name or user/name")
    inside = _plain_subfolder(subfolder)
    api, card = _client().HfApi(token=token), (inside / CARD).as_posix()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        # A repository that is there keeps its visibility whatever was asked for.
        if private is not None and (is_private := bool(api.repo_info(repo).private)) != private:
            seen, asked = ("private", "public") if is_private else ("public", "private")
            raise ValueError(
                f"{repo} is there and {seen}, and {asked} was asked for; change it on the Hub, or leave it"
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        left_out = []
        if may_replace_card is not None and api.file_exists(repo, card, revision=revision):
            old = Path(api.hf_hub_download(repo, card, revision=revision)).read_text(encoding="utf-8", errors="replace")
            if not may_replace_card(old):
                left_out = [CARD]
                say(f"note: {repo} has a {card} of its own, which stays; --replace-card puts ours in its place")
        where = {"path_in_repo": inside.as_posix(), "revision": revision, "ignore_patterns": left_out}
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, **where)
    except _failures() as error:
        raise OSError(
            f"{repo} could not be written ({_said(error)}); check the network, and log in with `hf auth login` or set "
            "HF_TOKEN to a token that may write there"
        ) from error
    return str(done.commit_url)


def _plain_subfolder(subfolder: str) -> Path:
    inside = Path(subfolder)
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"subfolder is {subfolder!r}; expected one inside the repository, as 'layer-10'")
    return inside


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hub needs huggingface_hub: pip install 'crosscoder[hub]'") from error
    return huggingface_hub


def _failures() -> tuple[type[Exception], ...]:
    """What the client raises where the Hub refuses, is not reached, or has no such thing."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    of_http: Any = HfHubHTTPError.__bases__[0]  # that of the client's own library, which has changed its name
    return of_http, HFValidationError, OSError


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
