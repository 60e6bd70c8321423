"""What disks do to files: names that change in one step, what killed writers leave behind, and no more room, which
is found out before hours of work."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import IO, Any

from crosscoder.foundation.console import human_bytes

TEMPORARY = ".tmp-crosscoder-"
"""How the names of unfinished files and folders begin."""
ABANDONED_S = 24 * 3600
"""Age of what a killed writer left, where the file system has no locks that would tell."""
_AT_CWD, _EXCHANGE = -100, 2
_CHUNK = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = tuple(word for code in _FULL for word in (os.strerror(code).lower(), f"os error {code})"))


class DiskFullError(OSError):
    """There is no room for a file; what stood at its place is as it was."""


def sync_path(path: Path) -> None:
    """Ask the disk to keep `path` (a file, or a folder's list of names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain_name(name: str) -> str:
    """Part of a hidden file's name that tells whose it is: short, ASCII, and nothing that a pattern would read."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80]


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Generator[Path]:
    """A new hidden folder in `parent`, removed at the end if it is still there; what killed writers left there goes."""
    remove_abandoned(parent)
    with _locked(lambda: _made_folder(parent)) as (path, _):
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def temporary_file(parent: Path) -> Generator[tuple[Path, IO[bytes]]]:
    """As `temporary_folder`, a file that is open for writing."""
    remove_abandoned(parent)
    with _locked(lambda: _made_file(parent)) as (path, descriptor):
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as stream:
                yield path, stream
        finally:
            path.unlink(missing_ok=True)


def _made_folder(parent: Path) -> tuple[Path, int]:
    path = parent / f"{TEMPORARY}{uuid.uuid4().hex[:12]}"
    path.mkdir()
    return path, os.open(path, os.O_RDONLY)


def _made_file(parent: Path) -> tuple[Path, int]:
    path = parent / f"{TEMPORARY}{uuid.uuid4().hex[:12]}"
    return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


@contextlib.contextmanager
def _locked(make: Callable[[], tuple[Path, int]]) -> Generator[tuple[Path, int]]:
    """What `make` makes, locked for as long as its writer lives."""
    for _ in range(100):
        try:
            path, descriptor = make()
        except FileNotFoundError:  # removed between its making and its opening
            continue
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink and path.exists():  # nobody took it for abandoned before it was locked
                yield path, descriptor
                return
        finally:
            os.close(descriptor)
    raise OSError(f"{path.parent}: temporary files there are removed as soon as they are made")


def remove_abandoned(parent: Path) -> None:
    """Remove the unfinished files and folders in `parent` whose writers are gone."""
    for path in parent.glob(f"{TEMPORARY}*"):
        if _is_abandoned(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(descriptor).st_mtime > ABANDONED_S
    finally:
        os.close(descriptor)
    return True


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change names in one step; False where the system cannot."""
    call = _renameat2()
    if call is None:
        return False
    if call(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one))


@functools.cache
def _renameat2() -> Any:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux; elsewhere two renames do
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call


@contextlib.contextmanager
def naming_full_disk(final: Path, written: Path) -> Generator[None]:
    """Turns whatever a library says of a full disk into one error with bytes, path and mend.

    written: the file or folder that is being written in the place of `final`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not is_full_disk(error):
            raise
        raise full_disk_error(final, written) from error


def full_disk_error(final: Path, written: Path) -> DiskFullError:
    """What is said where there is no room for the rest of a file or folder."""
    with contextlib.suppress(OSError):
        files = [written] if written.is_file() else list(written.rglob("*"))
        size, free = sum(path.stat().st_size for path in files), shutil.disk_usage(written.parent).free
        found = DiskFullError(
            f"no room for the rest of {final}: {human_bytes(size)} of it were written, and {human_bytes(free)} are "
            f"free on the disk (or quota) of {written.parent}; free some, or write elsewhere. What was at {final} "
            "before is as it was"
        )
        found.errno = errno.ENOSPC
        return found
    return DiskFullError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final))


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, of whatever library, says that there is no room."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(word in str(error).lower() for word in _FULL_WORDS)


def require_room(folder: Path, files: Mapping[str, int], *, copies: int = 1, what: str) -> None:
    """Refuse a folder that could not take `copies` of some files of so many bytes; nothing stays of the trial.

    Free space is compared with the sum of all, and one copy is really reserved: quotas, limits of one file's size and
    folders that cannot be written to are found by that alone.

    what: that the files are, for the error.
    """
    size = sum(files.values())
    free = shutil.disk_usage(folder).free
    mend = "free some, or choose another folder"
    sum_said = f"{copies} {what}s of {human_bytes(size)}" if copies > 1 else f"one {what} of {human_bytes(size)}"
    if copies * size > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} is to hold {sum_said}, {human_bytes(copies * size)} in all, and has {human_bytes(free)} free; "
            f"{mend}",
        )
    try:
        with contextlib.ExitStack() as stack:  # swept as any unfinished file, if this process is killed here
            for n_bytes in files.values():
                _, stream = stack.enter_context(temporary_file(folder))
                _reserve(stream.fileno(), n_bytes)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder} cannot take {sum_said} ({error.strerror}; {human_bytes(free)} of the disk are free); a quota, a "
            f"limit of a file's size or missing rights: {mend}",
        ) from error


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Make an empty file so large, if the disk has room; reserved where the system can, else written."""
    if hasattr(os, "posix_fallocate") and n_bytes:
        try:
            os.posix_fallocate(descriptor, 0, n_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        else:
            return
    left = n_bytes
    while left:
        left -= os.write(descriptor, bytes(min(_CHUNK, left)))
    os.fsync(descriptor)
