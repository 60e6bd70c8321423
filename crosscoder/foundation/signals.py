"""Stopping: a signal raises a flag, and work ends at its next safe point, from which it can be gone on with.

A safe point is the end of a step, of a harvested batch, of a measured batch: nothing is half done there. Loops ask with
`safe_point` or `safe_points`; whoever holds work that took long catches `Stopped` on its way out and keeps it. What is
asked for is read in one place, `requested`; ranks of one job agree on it at the end of a step, and stop there alone.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from crosscoder.foundation.console import say

STOPPED = 75
"""Exit status of a command that was asked to stop and can be gone on with (EX_TEMPFAIL of sysexits)."""
STOPPED_AT_ONCE = 130
"""Exit status of a command that was asked twice."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
Item = TypeVar("Item")


class Stopped(KeyboardInterrupt):
    """Work was asked to stop and did, at a safe point.

    It is no `Exception`, so that no clause for failures takes it for one, and a `KeyboardInterrupt`, so that a notebook
    shows what it shows for any.
    """


class _Flag:
    reason = ""
    watched = False
    begun = False
    agree: Callable[[str], str] | None = None


def request(reason: str) -> None:
    """Ask the work of this process to stop; `reason` is what it says of that, such as the signal's name."""
    _Flag.reason = _Flag.reason or reason


def begin() -> None:
    """From here on there is something to keep; a command that is stopped before ends where it is."""
    _Flag.begun = True


def requested() -> str:
    """Why work is to stop at the next safe point; empty while it is not."""
    return _Flag.reason


def safe_point(*, together: bool = False) -> None:
    """Called where nothing is half done.

    together: all ranks of a job are here. Where work is theirs together (`agreeing`) no rank stops at another point,
        for the others would wait for it.
    """
    reason = requested()
    if _Flag.agree is not None:
        reason = _Flag.agree(reason) if together else ""
    if reason:
        raise Stopped(f"stopped by {reason}")


@contextlib.contextmanager
def agreeing(agree: Callable[[str], str]) -> Generator[None]:
    """While it lasts, ranks stop together: `agree` tells every rank why to stop, from why each would."""
    before, _Flag.agree = _Flag.agree, agree
    begin()
    try:
        yield
    finally:
        _Flag.agree = before


def safe_points(items: Iterable[Item]) -> Iterator[Item]:
    """The items, with a safe point before each."""
    for item in items:
        safe_point()
        yield item


@contextlib.contextmanager
def watching(*, exits: bool = False) -> Generator[None]:
    """While it lasts, the first signal asks work to stop, and the second does what it would have done before.

    exits: for a program that owns its process. The second signal ends it with status 130, also while the main thread
        is inside a long call, and the first with status 75 where nothing has begun; and Ctrl-C is watched also where a
        shell ignores it, for what it starts in the background.

    Nothing is done outside the main thread, which alone may set handlers, nor inside another `watching`; a handler that
    somebody else set stays. Handlers are restored at the end.
    """
    if _Flag.watched or threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    watched = {n: old for n, old in before.items() if old in usual or (exits and n == signal.SIGINT)}
    _Flag.reason, _Flag.watched, _Flag.begun = "", True, False
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, watched)
        if exits:
            _exit_at_second(stack)
        for number, old in watched.items():
            signal.signal(number, _ask if exits else _asking_once(old))
        yield


def _ask(number: int, _: Any) -> None:
    request(signal.Signals(number).name)


def _asking_once(old: Any) -> Any:
    def handle(number: int, frame: Any) -> None:
        if not requested():
            _ask(number, frame)
            say(f"{requested()}: stopping at the next safe point; once more stops at once")
        elif callable(old):
            old(number, frame)
        else:
            signal.signal(number, old)
            signal.raise_signal(number)

    return handle


def _restore(watched: dict[Any, Any]) -> None:
    for number, old in watched.items():
        signal.signal(number, old)
    _Flag.reason, _Flag.watched = "", False


def _exit_at_second(stack: contextlib.ExitStack) -> None:
    """A thread that reads signals as they come, whatever the main thread does; only where the process is ours."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def close() -> None:
        signal.set_wakeup_fd(old)
        os.close(write)

    stack.callback(close)
    threading.Thread(target=_listen, args=(read,), daemon=True).start()


def _listen(read: int) -> None:
    count = 0
    while received := os.read(read, 1):
        if (number := received[0]) not in SIGNALS:
            continue
        count += 1
        name = signal.Signals(number).name
        if count == 2:
            _end(f"crosscoder: {name} again, stopped at once; what was kept until now is whole", STOPPED_AT_ONCE)
        if not _Flag.begun:
            _end(f"crosscoder: stopped by {name} before anything was written\n{going_on(sys.argv[1:])}", STOPPED)
        request(name)
        with contextlib.suppress(OSError, ValueError):
            say(f"{name}: stopping at the next safe point, to go on from there; once more stops at once")
    os.close(read)


def _end(said: str, status: int) -> None:
    """End the process here and now; the thread that does it is not the main one."""
    with contextlib.suppress(OSError, ValueError):
        say(said)
    os._exit(status)


def going_on(arguments: Sequence[str]) -> str:
    """What is said of the command line, for a shell, that goes on with a command that was stopped."""
    program, found = Path(sys.argv[0]), shutil.which("crosscoder")
    start, size = ["crosscoder"], os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        own = os.environ.get("LOCAL_WORLD_SIZE", size)
        nodes = [] if own == size else ["--nnodes", str(int(size) // int(own))]
        start = ["torchrun", *nodes, "--nproc-per-node", own, "-m", "crosscoder"]
        return f"go on with:\n  {shlex.join([*start, *arguments])}"
    if program.name == "__main__.py" and program.parent.name == "crosscoder":
        start = [sys.executable, "-m", "crosscoder"]
    elif program.name == "crosscoder" and not (found and program.exists() and os.path.samefile(found, program)):
        start = [str(program)]
    return f"go on with:\n  {shlex.join([*start, *arguments])}"


@contextlib.contextmanager
def held_back() -> Generator[None]:
    """Signals wait until the end; processes that are started meanwhile wait with them until they `obey_parent`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent() -> None:
    """For a worker process: its parent says when to stop, a terminal's Ctrl-C does not; SIGTERM asks it alone."""
    _Flag.watched = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, _ask)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
