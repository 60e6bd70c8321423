"""Named places at which a test ends the process, or makes a write fail; they do nothing unless switched on.

`CROSSCODER_FAILPOINT=save.manifest` kills the process (SIGKILL) where that point is reached first,
`save.manifest@3` where it is reached for the third time; `save.manifest=full` raises what a full disk raises there.
A test enumerates the points, and kills a run at every one of them.
"""

from __future__ import annotations

import errno
import os
import signal

POINTS = {
    "save.begin": "before a folder that is to be whole is begun",
    "save.filled": "its files are written, and not yet flushed",
    "save.manifest": "they are flushed, and no manifest is there yet",
    "save.rename": "all is flushed, and it has not its name yet",
    "save.replace": "before it takes the name of an older folder",
    "save.end": "it has its name, and that is not flushed yet",
    "json.rename": "a JSON file is flushed, and has not its name yet",
    "checkpoint.prune": "before each checkpoint that is removed",
    "checkpoint.end": "older ones have been removed",
    "metrics.line": "before a line of metrics.jsonl",
    "train.step": "after a step",
    "train.begin": "a checkpoint is loaded, and no step taken",
    "refill.begin": "before a refill of a stream is harvested",
    "refill.end": "it is harvested",
    "shard.batch": "after a call of the model",
    "shard.part": "a part of a shard is kept",
    "shard.rename": "a shard is written, and has not its name yet",
    "shard.end": "it has its name",
    "evaluation.batch": "before a held-out batch",
    "prepare.batch": "before documents are tokenised",
    "subject.step": "after a step of a subject",
    "cell.trained": "a cell's dictionaries are trained, and not measured",
    "cell.rows": "a cell's rows are in their file, and what it was trained from is still there",
}
"""Every point, and what has happened there."""


def _parsed(text: str) -> tuple[str, int, str]:
    """Name, which time, and what happens."""
    name, _, action = text.partition("=")
    name, _, count = name.partition("@")
    if text and (name not in POINTS or action not in ("", "full") or not (count or "1").isdigit()):
        raise ValueError(f"CROSSCODER_FAILPOINT is {text!r}; expected NAME, NAME@COUNT or NAME=full, of {list(POINTS)}")
    return name, int(count or 1), action or "kill"


class _Armed:
    name, left, action = _parsed(os.environ.get("CROSSCODER_FAILPOINT", ""))


def failpoint(name: str) -> None:
    """Does what was asked for at the point of this name; usually nothing."""
    if name == _Armed.name:
        _reached()


def arm(text: str) -> None:
    """As the environment variable would; an empty text switches all off."""
    _Armed.name, _Armed.left, _Armed.action = _parsed(text)


def _reached() -> None:
    _Armed.left -= 1
    if _Armed.left:
        return
    if _Armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
