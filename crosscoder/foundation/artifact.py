"""Folders and files that are either whole or absent, and are checked before they are believed.

A folder is written beside its final place, every file is flushed to the disk, a manifest with the sha256 of each
file is written last, and only then does the folder take its name, in one step also where an older one has it. A reader
that finds no manifest, or a file that disagrees with it, refuses the folder by name. A JSON file that stands alone
carries the sha256 of its own content (`write_sealed`). Nothing here ever pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from crosscoder.foundation.damage import DamagedArtifactError
from crosscoder.foundation.disk import (
    exchange,
    naming_full_disk,
    plain_name,
    sync_path,
    temporary_file,
    temporary_folder,
)
from crosscoder.foundation.failpoints import failpoint

MANIFEST = "MANIFEST.json"
MAX_JSON_BYTES = 8 * 2**20
"""More than any file of ours has; what 64 MiB of brackets become would fill a small machine."""
SEAL = "sha256"
"""The key of a JSON file under which the hash of all others stands."""
_PENDING = ".new-crosscoder"
_SAFE_NAME = re.compile(r"^(?!\.+$)[A-Za-z0-9._-]+$")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON allows")


def _finite_number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_constant(text[:80])


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice among {sorted(found)[:5]}")
    return found


def read_json(path: str | Path) -> Any:
    """The parsed file, refusing NaN, numbers that no float holds, keys that stand twice, and files above 8 MiB.

    Raises:
        DamagedArtifactError: the file is too large, not UTF-8, or not JSON.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DamagedArtifactError(f"{path} is no plain file; expected JSON")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise DamagedArtifactError(f"{path} has {size} bytes; JSON files above {MAX_JSON_BYTES} are refused")
    checks: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite_number}
    try:
        return json.loads(path.read_text(encoding="utf-8"), **checks, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DamagedArtifactError(
            f"{path} is not valid JSON ({error}); restore it from a copy or delete the folder"
        ) from error


def write_json(path: str | Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write `value` with sorted keys, unless told otherwise, and a final newline; NaN and Infinity are refused.

    Bytes of a path that are not UTF-8 are escaped, as JSON can.
    """
    text = json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False)
    replace_file(path, (text + "\n").encode("utf-8", "backslashreplace"))


def write_sealed(path: str | Path, value: dict[str, Any]) -> None:
    """Write a table, keys in their order, with the sha256 of its content: `read_sealed` finds one changed digit."""
    write_json(path, {**value, SEAL: seal_of(value)}, sort_keys=False)


def read_sealed(path: str | Path, *, mend: str = "restore it from a copy") -> dict[str, Any]:
    """What `write_sealed` wrote, without its seal; a DamagedArtifactError, which ends with the mend, if it was changed
    since or never sealed."""
    return unsealed(read_json(path), path, mend=mend)


def unsealed(value: Any, path: str | Path, *, mend: str = "restore it from a copy") -> dict[str, Any]:
    """A table that was read, without its seal, which is checked; raises as `read_sealed`."""
    if not isinstance(value, dict) or SEAL not in value:
        raise DamagedArtifactError(
            f"{path} carries no {SEAL} of its content, so nobody can tell whether it is as it was written (crosscoder "
            f"0.2 and before wrote none); {mend}"
        )
    content = {key: one for key, one in value.items() if key != SEAL}
    if value[SEAL] != (found := seal_of(content)):
        raise DamagedArtifactError(
            f"{path} was changed since it was written: its content has the {SEAL} {found[:12]}, and it says "
            f"{str(value[SEAL])[:12]}; {mend}"
        )
    return content


def seal_of(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys and its white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def replace_file(path: str | Path, content: bytes) -> None:
    """Write `content` so that a reader sees the old file or the new one, never half of either.

    Raises:
        DiskFullError: there is no room; the old file is as it was.
    """
    path = Path(path)
    with temporary_file(path.parent) as (temporary, stream), naming_full_disk(path, temporary):
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        failpoint("json.rename")
        temporary.replace(path)


def file_sha256(path: str | Path) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _others(folder: Path, schema: str, files: Sequence[str]) -> list[str]:
    """What lies in a folder beside an artifact that is to be written there; nothing of it where one of its files is
    there already and is no artifact's."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if MANIFEST not in found:
        return [] if found & set(files) else sorted(found)
    try:
        manifest = read_json(folder / MANIFEST)
        return sorted(found - {MANIFEST, *manifest["files"]}) if manifest["schema"] == schema else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _is_replaceable(folder: Path, schema: str, others: Sequence[str]) -> bool:
    """Whether `folder` is empty, or an artifact of the same schema, whole or not, with its own files and others."""
    found = {path.name for path in folder.iterdir()} - set(others)
    if not found:
        return True
    try:
        manifest = read_json(folder / MANIFEST)
        return manifest["schema"] == schema and found <= {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def committed_directory(final: str | Path, *, schema: str, files: Sequence[str] = ()) -> Generator[Path]:
    """Yields a temporary folder to fill with plain files; on a clean exit it becomes `final`, whole.

    An older artifact at `final` is replaced. If the body raises, the temporary folder is removed and `final` is left
    as it was.

    files: what the body writes, if it may share its folder with others, such as a repository's README; these stay.

    Raises:
        FileExistsError: `final` exists and holds anything but an older artifact of the same schema.
        DiskFullError: there is no room; `final` is as it was.
        ValueError: the body wrote a file whose name holds anything but letters, digits, '.', '_' and '-', or none.
    """
    final = Path(final).resolve()
    _restore(final)
    others = _others(final, schema, files) if files else []
    final = require_replaceable(final, schema, others)
    failpoint("save.begin")
    with temporary_folder(final.parent) as temporary:
        with naming_full_disk(final, temporary):
            yield temporary
            _seal(temporary, schema)
        failpoint("save.rename")
        if others:
            temporary.rename(final / _PENDING)
            _finish(final)
        else:
            _rename_into_place(temporary, final)
    failpoint("save.end")
    sync_path(final.parent)


@contextlib.contextmanager
def resumed_directory(final: str | Path, *, schema: str, key: str) -> Generator[Path]:
    """As `committed_directory`, but what a body that was stopped has written is there again for the next of this `key`.

    The body writes each file under another name first, with a suffix, and renames it when it is whole. What another
    key left behind is removed, and so are files that are not whole (`*.part`), and all where the body refuses its
    input (ValueError).
    """
    final = Path(final)
    _restore(final)
    final = require_replaceable(final, schema)
    mine = hashlib.sha256(f"{schema} {key}".encode()).hexdigest()[:12]
    temporary = final.with_name(f".part-{plain_name(final.name)}-{mine}")
    for left in final.parent.glob(f".part-{plain_name(final.name)}-{12 * '[0-9a-f]'}"):
        if left != temporary:
            shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(exist_ok=True)
    for torn in (*temporary.glob("*.part"), *temporary.glob(".tmp-*")):
        torn.unlink()
    try:
        with naming_full_disk(final, temporary):
            yield temporary
            _seal(temporary, schema)
    except BaseException as error:
        if isinstance(error, ValueError):  # would come again
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # there is something in it
            temporary.rmdir()
        raise
    _rename_into_place(temporary, final)
    sync_path(final.parent)


def require_replaceable(final: Path, schema: str, others: Sequence[str] = ()) -> Path:
    """The path, its parent made, if an artifact may be written there; for whoever asks before long work."""
    if final.exists() and not (final.is_dir() and _is_replaceable(final, schema, others)):
        raise FileExistsError(
            f"{final} exists and is not just an older {schema}, so it is not ours to replace; choose another folder "
            "or move it away"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    return final


def _seal(folder: Path, schema: str) -> None:
    failpoint("save.filled")
    umask = os.umask(0)
    os.umask(umask)
    files = {}
    for path in sorted(folder.iterdir()):
        if not _SAFE_NAME.match(path.name) or not path.is_file():
            raise ValueError(f"{path.name!r} may not be part of an artifact: plain files named [A-Za-z0-9._-] only")
        path.chmod(0o666 & ~umask)  # safetensors leaves 0600, which a colleague cannot read
        sync_path(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    if not files:
        raise ValueError(f"an artifact {schema!r} without a file; there is nothing to keep")
    failpoint("save.manifest")
    write_json(folder / MANIFEST, {"schema": schema, "files": files})
    sync_path(folder)


def _rename_into_place(temporary: Path, final: Path) -> None:
    """Give a whole folder its name, in one step also where an older one has it."""
    if not final.exists():
        temporary.rename(final)
        return
    failpoint("save.replace")
    if exchange(temporary, final):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    retired = _retired(final)  # where a reader or the next writer finds it if this process ends between the two
    shutil.rmtree(retired, ignore_errors=True)
    final.rename(retired)
    try:
        temporary.rename(final)
    except OSError:
        retired.rename(final)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _retired(final: Path) -> Path:
    full = hashlib.sha256(os.fsencode(final.name)).hexdigest()[:12]
    return final.with_name(f".old-{plain_name(final.name)}-{full}")


def _restore(final: Path) -> None:
    """Bring to its end what a writer began that ended between two renames."""
    with contextlib.suppress(OSError):  # of a folder that may only be read
        if not final.exists() and (retired := _retired(final)).is_dir():
            retired.rename(final)
        if (final / _PENDING).is_dir():
            _finish(final)


def _finish(final: Path) -> None:
    """Move a whole new artifact, which lies in a folder that holds others' files too, to its place in it."""
    with contextlib.suppress(FileNotFoundError):  # another process finishes it as well
        for path in sorted((final / _PENDING).iterdir(), key=lambda path: path.name == MANIFEST):
            path.replace(final / path.name)
        (final / _PENDING).rmdir()
    sync_path(final)


def verify_directory(
    folder: str | Path, *, schema: str, required: Sequence[str] = (), hashes: bool = True, closed: bool = False
) -> frozenset[str]:
    """The names of the files that the manifest of `folder` lists, each checked by size and, unless told otherwise,
    sha256; a reader believes no other.

    closed: refuse a folder that holds more than it lists, but for hidden files and notes (`*.md`, `*.txt`); for
        folders that another library reads, which would take what it finds.

    Raises:
        FileNotFoundError: the folder or its manifest is missing.
        DamagedArtifactError: wrong schema, a missing or altered file, or a name that is not a plain file name.
    """
    folder = Path(folder)
    _restore(folder)
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}; check the path")
        mend = inside(folder) or "check the path, or write it again"
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it is not a finished artifact; {mend}")
    manifest = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise DamagedArtifactError(f"{path} does not list files; restore the folder from a copy")
    require_schema(manifest.get("schema"), schema, folder)
    if not files and not required:
        raise DamagedArtifactError(f"{path} lists no file; restore the folder from a copy")
    if unlisted := [name for name in required if name not in files]:
        raise DamagedArtifactError(f"{path} does not list {', '.join(unlisted)}; restore it from a copy")
    if unsafe := [name for name in files if not _SAFE_NAME.match(name)]:
        raise DamagedArtifactError(f"{path} lists {unsafe[0]!r}, which is not a plain file name")
    for name, entry in files.items():
        if said := _fault_of(folder / name, entry, hashes=hashes):
            raise DamagedArtifactError(said)
    if closed and (more := unlisted_files(folder, files)):
        raise DamagedArtifactError(f"{folder} holds {', '.join(more[:3])}, which {MANIFEST} does not list; remove it")
    return frozenset(files)


def inside(folder: Path, beside: str = MANIFEST) -> str:
    """Which artifacts lie in a folder that is none, for who gave it in their place; empty where none does.

    beside: a file that those have which are meant.
    """
    there = (one.parent for one in folder.glob(f"*/{MANIFEST}") if (one.parent / beside).is_file())
    found = ", ".join(sorted(map(str, there))[:4])
    return found and f"give what lies in it: {found}"


def require_schema(seen: Any, expected: str, where: Path) -> None:
    """Refuse what another version wrote, or another kind of artifact, and say which it is."""
    if seen != expected:
        raise DamagedArtifactError(f"{where} holds {seen!r}, expected {expected!r}: {other_version(seen, expected)}")


def other_version(seen: Any, expected: str) -> str:
    """Who reads a schema that is not the expected one."""
    kind, _, number = expected.rpartition("/")
    found = re.fullmatch(rf"{re.escape(kind)}/(\d{{1,9}})", seen) if isinstance(seen, str) else None
    if found is None:
        return "it is another kind of artifact"
    if int(found[1]) > int(number):
        return "a later version of crosscoder wrote it and reads it: pip install --upgrade crosscoder"
    return f"crosscoder {READERS.get(seen, '0.1 or 0.2')} wrote it and reads it; install that, or make it again"


READERS = {"crosscoder.results/2": "0.1"}
"""The version of the package that reads a schema of the past."""


def faults_of(folder: Path, manifest: Any) -> list[str]:
    """Everything that is wrong with the files of a manifest, where its readers stop at the first."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        return [f"{folder / MANIFEST} lists no file"]
    wrong = [name for name, entry in files.items() if not _SAFE_NAME.match(name) or not isinstance(entry, dict)]
    if wrong:
        return [f"{folder / MANIFEST}: {name!r:.80} is no entry of a plain file" for name in wrong]
    return [fault for name, entry in files.items() if (fault := _fault_of(folder / name, entry))]


def _fault_of(file: Path, entry: dict[str, Any], *, hashes: bool = True) -> str:
    """What is wrong with a file that a manifest lists; empty if nothing is."""
    if not file.is_file() or (file.is_symlink() and not hashes):  # the Hub's cache is of links to what it holds
        return f"{file} is listed in {MANIFEST} but missing; restore the folder from a copy"
    if (size := file.stat().st_size) != entry.get("bytes"):
        return f"{file} has {size} bytes, {MANIFEST} says {entry.get('bytes')}: altered"
    if hashes and file_sha256(file) != entry.get("sha256"):
        return f"{file} does not match its sha256 in {MANIFEST}: altered since it was written"
    return ""


def unlisted_files(folder: Path, files: dict[str, Any]) -> list[str]:
    """What lies in an artifact's folder and is neither listed, nor hidden, nor a note."""
    names = (path.name for path in folder.iterdir() if path.name not in files)
    return sorted(name for name in names if name != MANIFEST and not re.search(r"^\.|\.(md|txt)$", name))
