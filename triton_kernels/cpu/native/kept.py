"""Compiled libraries that one process leaves for the next: loading one runs its code, so it is checked before.

A library is loaded if it is a plain file of this user that nobody else may write to, in a folder of which the same is
true, and if its content has the sha256 that its name says; the rest of the name is the fingerprint of what it was made
from. Anything else is made again. Where no such folder can be had, a library is made for one process and removed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Generator
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
Build = Callable[[Path], None]
"""Writes a library to a path."""


def library(fingerprint: str, build: Build) -> ctypes.CDLL:
    """The library of a fingerprint, a kept one if there is one that may be trusted; else `build` makes it."""
    folder = cache_folder()
    if (found := _trusted(folder, fingerprint)) is not None:
        return found
    with _alone(folder / "compiling.lock") as is_alone:
        if (found := _trusted(folder, fingerprint)) is not None:  # another process has made it meanwhile
            return found
        for left in folder.glob(".making-*") if is_alone else ():  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        return _made(folder, fingerprint, build)


def _made(folder: Path, fingerprint: str, build: Build) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix=f".making-{fingerprint}-", dir=folder) as scratch:
        made = Path(scratch) / "made.so"
        build(made)
        made.chmod(0o600)
        loaded = ctypes.CDLL(str(made))  # what cannot be loaded is not kept
        content = hashlib.sha256(made.read_bytes()).hexdigest()
        made.replace(folder / f"kernels-{fingerprint}-{content}.so")
    return loaded


def _trusted(folder: Path, fingerprint: str) -> ctypes.CDLL | None:
    """The first library of this fingerprint that is whole and this user's alone; others are removed where they may."""
    for path in sorted(folder.glob(f"kernels-{fingerprint}-*.so")):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _is_ours(os.fstat(descriptor), stat.S_ISREG) and _content(descriptor) == path.stem.rsplit("-", 1)[1]:
                    return ctypes.CDLL(str(path))
            finally:
                os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _content(descriptor: int) -> str:
    with os.fdopen(os.dup(descriptor), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_out_of_reach(folder: Path) -> bool:
    """Whether nobody but this user and root can put another folder in the place of this one."""
    above = [parent.stat() for parent in folder.resolve().parents]
    return all(
        one.st_uid in (0, os.geteuid()) and (not one.st_mode & OTHERS_WRITE or one.st_mode & stat.S_ISVTX)
        for one in above
    )


def _is_ours(found: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    return is_kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & OTHERS_WRITE


def cache_folder() -> Path:
    """Where libraries are kept: this user's cache, else a folder of this user among temporary files; in a pinch one of
    this process alone, which is removed when it ends."""
    refused = []
    for folder in _candidates():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(folder.lstat(), stat.S_ISDIR) or not _is_out_of_reach(folder):
                refused.append(f"{folder} or a folder above it is another user's, or others may write to it")
                continue
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            refused.append(str(error))
    warnings.warn(
        f"the C kernels are not kept, and compiled again by every process ({'; '.join(refused)}); make the folder "
        "yours alone (chown, chmod 700), or name another in XDG_CACHE_HOME",
        RuntimeWarning,
        stacklevel=2,
    )
    folder = Path(tempfile.mkdtemp(prefix="crosscoder-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _candidates() -> Generator[Path]:
    """XDG_CACHE_HOME (a relative one is to be ignored) or the home's, then one that is named by the user's number."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")
    with contextlib.suppress(RuntimeError):  # no HOME, and no such user
        home = given if given.is_absolute() else Path.home() / ".cache"
        if home.is_absolute() and home != Path("/.cache"):  # what an empty HOME comes to
            yield home / "crosscoder"
    yield Path(tempfile.gettempdir()) / f"crosscoder-{os.geteuid()}"


@contextlib.contextmanager
def _alone(path: Path) -> Generator[bool]:
    """One process at a time, and whether that is sure; where a file system has no locks two may make the same."""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_alone = True
        except OSError:
            is_alone = False
        yield is_alone
