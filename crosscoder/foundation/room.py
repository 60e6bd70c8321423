"""Whether what is going to be written fits and can be written, found out before hours of work."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from crosscoder.foundation.console import human_bytes

_CHUNK = 2**20


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
    made: list[Path] = []
    try:
        for name, n_bytes in files.items():
            made.append(folder / f".tmp-probe-{name}-{uuid.uuid4().hex[:8]}")
            _reserve(made[-1], n_bytes)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder} cannot take {sum_said} ({error.strerror}; {human_bytes(free)} of the disk are free); a quota, a "
            f"limit of a file's size or missing rights: {mend}",
        ) from error
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def _reserve(path: Path, n_bytes: int) -> None:
    """A file of so many bytes for which the disk has room; they are reserved where the system can, else written."""
    with path.open("wb", buffering=0) as stream:
        if hasattr(os, "posix_fallocate") and n_bytes:
            try:
                os.posix_fallocate(stream.fileno(), 0, n_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
            else:
                return
        for start in range(0, n_bytes, _CHUNK):
            stream.write(bytes(min(_CHUNK, n_bytes - start)))
        os.fsync(stream.fileno())
