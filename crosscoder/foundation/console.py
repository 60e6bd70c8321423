"""Progress for people: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

SECONDS_BETWEEN_LINES = 10.0
T = TypeVar("T")


def plain(text: str) -> str:
    """Text that somebody else may have written, without what a terminal would obey: control characters, characters that
    turn the direction, and halves of characters. Lines stay lines."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c == "\n" or unicodedata.category(c) not in HIDDEN else _SHOWN.get(c, "\ufffd") for c in text)


HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Categories of characters that are not seen, and change what is."""
_SHOWN = dict.fromkeys("\t\r\u2028\u2029", " ") | dict.fromkeys("\u200c\u200d\u00ad\ufeff", "")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines whose cells stand under one another; what does not print is replaced, see `plain`."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


class _Voice:
    is_muted = False


def mute() -> None:
    """From here on this process says nothing: another one of the same job speaks for it."""
    _Voice.is_muted = True


def say(message: str, *, always: bool = False) -> None:
    """One line to the person running the program (stderr, so that stdout stays data); see `plain`. `always`: also where
    muted."""
    if always or not _Voice.is_muted:
        print(plain(message), file=sys.stderr, flush=True)


def give(result: object) -> None:
    """A line of result on stdout: as it is for a program, also a path that is not UTF-8; see `plain` for a terminal."""
    if sys.stdout.isatty():
        print(plain(str(result)), flush=True)
        return
    content = os.fsencode(result) if isinstance(result, Path) else str(result).encode("utf-8", "surrogateescape")
    if (buffer := getattr(sys.stdout, "buffer", None)) is None:
        print(str(result), flush=True)
        return
    sys.stdout.flush()
    buffer.write(content + b"\n")
    buffer.flush()


class Progress:
    """Counts towards `total`: tqdm on a terminal, one line every ten seconds elsewhere, nothing if `quiet`.

    Use as a context manager; `advance(n, loss=...)` moves it and shows the given numbers. `initial` was done before.
    """

    def __init__(
        self, label: str, total: int | None, *, unit: str = "it", quiet: bool = False, initial: int = 0
    ) -> None:
        self._label, self._total, self._unit, self._quiet = label, total, unit, quiet or _Voice.is_muted
        self._initial = self._done = initial
        self._tokens = 0
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            shown: dict[str, Any] = {"desc": plain(label), "unit": unit, "leave": False, "dynamic_ncols": True}
            self._bar = tqdm(total=total, initial=initial, smoothing=0, **shown)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def from_first(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the rate is counted from when the first is there, which may take long and says nothing of it."""
        for number, item in enumerate(items):
            if number == 0:
                self._started = time.monotonic()
                if self._bar is not None:
                    self._bar.unpause()
            yield item

    def advance(self, amount: int = 1, *, share: float | None = None, tokens: int = 0, **numbers: float) -> None:
        """Move by `amount`; `numbers` are shown beside the count, and how many `tokens` a second that makes.

        `share` is how much of the work is done, from 0 to 1, where the count does not say so: for the time left.
        """
        self._done, self._tokens, now = self._done + amount, self._tokens + tokens, time.monotonic()
        if self._tokens and now > self._started:
            numbers = {"tokens/s": self._tokens / (now - self._started), **numbers}
        if self._bar is not None:
            if share and not self._total:
                self._bar.total = round(self._done / share)
            self._bar.update(amount)
            if numbers:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items()}, refresh=False)
            return
        if self._quiet or now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        rate = (self._done - self._initial) / (now - self._started)
        shown = "".join(f"  {k} {v:.4g}" for k, v in numbers.items())
        total = f"/{self._total:,}" if self._total else ""
        if self._total:
            seconds = (self._total - self._done) / rate if rate else None
        else:
            seconds = (now - self._started) * (1 / share - 1) if share else None
        left = "" if seconds is None else f"  about {human_seconds(seconds)} left"
        say(f"{self._label}: {self._done:,}{total} {self._unit}  {rate:.3g}/s{left}{shown}")


def human_seconds(seconds: float) -> str:
    """`200 -> '3 min'`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def human_bytes(count: float) -> str:
    """`1536 -> '1.5 KiB'`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def reader_is_gone() -> bool:
    """Whether nobody reads the output any more, as when `| head` has ended."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def leave_unread() -> int:
    """Let what is left of the output go nowhere; the exit status, as if SIGPIPE had ended the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
