"""One writer a folder: a lock that ends with its process, whatever ends it, and says who holds it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from crosscoder.foundation.console import say
from crosscoder.foundation.disk import remove_abandoned
from crosscoder.foundation.signals import begin

NAME = ".lock"
_ELSEWHERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class InUseError(RuntimeError):
    """Another process writes to a folder."""


@contextlib.contextmanager
def locked(folder: str | Path, *, name: str = NAME, shared: bool = False) -> Generator[None]:
    """Holds the lock file `name` in `folder`, which is made if need be; removed at the end.

    The system gives a lock back when its process ends, so one that a killed process left is taken over. Where the
    file system has no locks that is said, and nothing is held.

    shared: with others that hold it shared, against those that do not.

    Raises:
        InUseError: somebody else holds it; names process, host, start and command.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    is_new, path = not folder.is_dir(), folder / name
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _acquired(path, shared=shared)
    begin()
    try:
        yield
    finally:
        if descriptor is not None:
            _release(path, descriptor, shared=shared)
        if is_new:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()


def remove_leftovers(*folders: Path) -> None:
    """Remove what killed processes left of files that they had not finished; what living ones write stays.

    A folder that one had put aside for a new one goes back to its place where that is empty.
    """
    for folder in folders:
        remove_abandoned(folder)
        for path in folder.glob(".old-*"):
            name, _, digest = path.name.removeprefix(".old-").rpartition("-")
            if digest != hashlib.sha256(os.fsencode(name)).hexdigest()[:12]:
                continue  # of a name that was cut, or nothing of ours
            if (place := path.with_name(name)).exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(place)


def _acquired(path: Path, *, shared: bool) -> int | None:
    try:
        import fcntl
    except ImportError:  # not on this system
        return None
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            said = f"{path.parent} cannot be written to ({error.strerror}); choose another folder, or mend its rights"
            raise OSError(error.errno, said) from error
        try:
            fcntl.flock(descriptor, how)
            if _is_file(path, descriptor):
                _sign(path, descriptor, shared=shared)
                return descriptor
        except BlockingIOError:
            holder = _read(descriptor)
            os.close(descriptor)
            raise InUseError(_in_use(path.parent, holder)) from None
        except OSError as error:
            if error.errno in _ELSEWHERE:
                say(f"note: {path.parent} is on a file system without locks; let no other process write there")
                os.close(descriptor)
                return None
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between our opening and locking it


def _is_file(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _sign(path: Path, descriptor: int, *, shared: bool) -> None:
    before = _read(descriptor)
    if before and not shared:
        say(f"{path.parent}: taking over the lock that {_who(before)} left")
    record = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    with contextlib.suppress(OSError):  # a full disk: held all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record).encode(), 0)


def _read(descriptor: int) -> dict[str, Any]:
    """Who holds it; empty where that is not said, or not yet."""
    try:
        found = json.loads(os.pread(descriptor, 65536, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _release(path: Path, descriptor: int, *, shared: bool) -> None:
    import fcntl

    with contextlib.suppress(OSError):
        if shared:  # the last one removes it
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_file(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _who(record: dict[str, Any]) -> str:
    shown = {key: "".join(c for c in str(record.get(key, "unknown")) if c.isprintable())[:200] for key in _SAID}
    return f"process {shown['pid']} on {shown['host']}, started {shown['started']} ({shown['command']})"


_SAID = ("pid", "host", "started", "command")


def _in_use(folder: Path, record: dict[str, Any]) -> str:
    mend = "wait for it, stop it, or choose another folder"
    if record.get("host") == socket.gethostname():
        mend = f"wait for it, stop it (kill {record.get('pid')}), or choose another folder"
    return f"{folder} is in use by {_who(record) if record else 'another process'}; {mend}"
