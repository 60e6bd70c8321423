"""What is said of files that are not what they should be: one line with the file, what is wrong, and the mend."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

MEND = "restore it from a copy, or make it again"

MOST_CHARACTERS = 1000
"""Of an error that repeats what a file says."""


class DamagedArtifactError(ValueError):
    """A file or folder on disk is not what its manifest or format says it should be; at most 1,000 characters of it."""

    def __init__(self, said: str = "") -> None:
        super().__init__(said if len(said) <= MOST_CHARACTERS else f"{said[: MOST_CHARACTERS - 3]}...")


@contextlib.contextmanager
def reading(path: str | Path, *, mend: str = MEND) -> Generator[None]:
    """Turns what code says of a file of other bytes than it expects into one `DamagedArtifactError` that names it.

    Errors that name it already pass, and so do those of the system, such as a file that is missing.
    """
    try:
        yield
    except (DamagedArtifactError, OSError):
        raise
    except BaseException as error:
        if not _is_of_content(error):
            raise
        if isinstance(error, ValueError) and str(path) in str(error) and len(str(error)) < MOST_CHARACTERS:
            raise
        said = (str(error).strip().splitlines() or [""])[0][: MOST_CHARACTERS // 2]
        if isinstance(error, ValueError):
            raise DamagedArtifactError(f"{path}: {said}; {mend}") from error
        raise DamagedArtifactError(
            f"{path} is not what it should be ({type(error).__name__}{': ' if said else ''}{said}); {mend}"
        ) from error


def _is_of_content(error: BaseException) -> bool:
    """Whether an error comes from what a file holds; libraries in Rust have two kinds that Python does not know."""
    from safetensors import SafetensorError

    known = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
    if isinstance(error, known):
        return type(error).__name__ != "MismatchError"
    return isinstance(error, SafetensorError) or type(error) is Exception or type(error).__name__ == "PanicException"
