"""Folders that are either whole or absent, and are checked before they are believed.

A folder is written beside its final place, every file is flushed to the disk, a manifest with the sha256 of each
file is written last, and only then is the folder renamed into place. A reader that finds no manifest, or a file that
disagrees with it, refuses the folder by name. Nothing here ever pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
MAX_JSON_BYTES = 64 * 2**20
_SAFE_NAME = re.compile(r"^(?!\.+$)[A-Za-z0-9._-]+$")


class DamagedArtifactError(ValueError):
    """A file or folder on disk is not what its manifest or format says it should be."""


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON allows")


def read_json(path: str | Path) -> Any:
    """The parsed file, refusing NaN, Infinity and files above 64 MiB.

    Raises:
        DamagedArtifactError: the file is too large, not UTF-8, or not JSON.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise DamagedArtifactError(f"{path} has {size} bytes; JSON files above {MAX_JSON_BYTES} are refused")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DamagedArtifactError(
            f"{path} is not valid JSON ({error}); restore it from a copy or delete the folder"
        ) from error


def write_json(path: str | Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write `value` with sorted keys, unless told otherwise, and a final newline; NaN and Infinity are refused."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False)
    replace_file(path, (text + "\n").encode("utf-8"))


def replace_file(path: str | Path, content: bytes) -> None:
    """Write `content` so that a reader sees the old file or the new one, never half of either."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of the file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_path(path: Path) -> None:
    """Ask the disk to keep `path` (a file, or a folder's list of names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Whether `folder` is empty, or an artifact of the same schema that holds nothing but its own files and others."""
    found = {path.name for path in folder.iterdir()} - set(others)
    if not found:
        return True
    try:
        manifest = read_json(folder / MANIFEST)
        return manifest["schema"] == schema and found == {MANIFEST, *manifest["files"]}
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
        ValueError: the body wrote a file whose name holds anything but letters, digits, '.', '_' and '-'.
    """
    final = Path(final).resolve()
    others = _others(final, schema, files) if files else []
    final = _require_replaceable(final, schema, others)
    temporary = final.with_name(f".tmp-{final.name[:80]}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        _seal(temporary, schema)
        if others:
            _move_into(temporary, final)
        else:
            _rename_into_place(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_path(final.parent)


@contextlib.contextmanager
def resumed_directory(final: str | Path, *, schema: str, key: str) -> Generator[Path]:
    """As `committed_directory`, but what a body that was stopped has written is there again for the next of this `key`.

    The body writes each file under another name first, with a suffix, and renames it when it is whole. What another
    key left behind is removed, and so are files that are not whole (`*.part`), and all where the body refuses its
    input (ValueError).
    """
    final = _require_replaceable(Path(final), schema)
    mine = hashlib.sha256(f"{schema} {key}".encode()).hexdigest()[:12]
    temporary = final.with_name(f".part-{final.name[:80]}-{mine}")
    for left in final.parent.glob(f".part-{final.name[:80]}-{12 * '[0-9a-f]'}"):
        if left != temporary:
            shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(exist_ok=True)
    for torn in temporary.glob("*.part"):
        torn.unlink()
    try:
        yield temporary
    except ValueError:  # would come again
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _seal(temporary, schema)
    _rename_into_place(temporary, final)
    sync_path(final.parent)


def _require_replaceable(final: Path, schema: str, others: Sequence[str] = ()) -> Path:
    if final.exists() and not (final.is_dir() and _is_replaceable(final, schema, others)):
        raise FileExistsError(
            f"{final} exists and is not just an older {schema}, so it is not ours to replace; choose another folder "
            "or move it away"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    return final


def _seal(folder: Path, schema: str) -> None:
    umask = os.umask(0)
    os.umask(umask)
    files = {}
    for path in sorted(folder.iterdir()):
        if not _SAFE_NAME.match(path.name) or not path.is_file():
            raise ValueError(f"{path.name!r} may not be part of an artifact: plain files named [A-Za-z0-9._-] only")
        path.chmod(0o666 & ~umask)  # safetensors leaves 0600, which a colleague cannot read
        sync_path(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(folder / MANIFEST, {"schema": schema, "files": files})
    sync_path(folder)


def _move_into(temporary: Path, final: Path) -> None:
    """File by file into a folder that holds others too, the manifest first: what is stopped half-way is refused."""
    for path in sorted(temporary.iterdir(), key=lambda path: path.name != MANIFEST):
        path.replace(final / path.name)
    sync_path(final)


def _rename_into_place(temporary: Path, final: Path) -> None:
    if not final.exists():
        temporary.rename(final)
        return
    retired = final.with_name(f".old-{final.name[:80]}-{uuid.uuid4().hex[:8]}")
    final.rename(retired)
    try:
        temporary.rename(final)
    except OSError:
        retired.rename(final)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def verify_directory(folder: str | Path, *, schema: str, required: Sequence[str] = (), hashes: bool = True) -> None:
    """Check every file that the manifest of `folder` lists, by size and, unless told otherwise, sha256.

    Raises:
        FileNotFoundError: the folder or its manifest is missing.
        DamagedArtifactError: wrong schema, a missing or altered file, or a name that is not a plain file name.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: it is not a finished artifact. Check the path, or write it again."
        )
    manifest = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise DamagedArtifactError(f"{path} does not list files; restore the folder from a copy")
    if manifest.get("schema") != schema:
        raise DamagedArtifactError(
            f"{folder} holds {manifest.get('schema')!r}, expected {schema!r}: it is another kind of artifact, or "
            "was written by another version"
        )
    if unlisted := [name for name in required if name not in files]:
        raise DamagedArtifactError(f"{path} does not list {', '.join(unlisted)}; restore it from a copy")
    if unsafe := [name for name in files if not _SAFE_NAME.match(name)]:
        raise DamagedArtifactError(f"{path} lists {unsafe[0]!r}, which is not a plain file name")
    for name, entry in files.items():
        file = path.with_name(name)
        if not file.is_file() or (file.is_symlink() and not hashes):  # the Hub's cache is of links to what it holds
            raise DamagedArtifactError(f"{file} is listed in {MANIFEST} but missing; restore the folder from a copy")
        if (size := file.stat().st_size) != entry.get("bytes"):
            raise DamagedArtifactError(f"{file} has {size} bytes, {MANIFEST} says {entry.get('bytes')}: altered")
        if hashes and file_sha256(file) != entry.get("sha256"):
            raise DamagedArtifactError(f"{file} does not match its sha256 in {MANIFEST}: altered since it was written")
