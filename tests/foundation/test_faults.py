"""What disks and killed writers do to files, what is read as good, and what reaches a terminal."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from crosscoder.foundation import artifact, console, disk
from crosscoder.foundation.artifact import (
    MANIFEST,
    DamagedArtifactError,
    committed_directory,
    read_json,
    read_sealed,
    replace_file,
    resumed_directory,
    verify_directory,
    write_json,
    write_sealed,
)
from crosscoder.foundation.config import config, from_mapping, require_count
from crosscoder.foundation.damage import reading
from crosscoder.foundation.disk import TEMPORARY, DiskFullError, exchange
from crosscoder.foundation.tensors import load_tensors, save_tensors

ROOT = Path(__file__).parents[2]
SCHEMA = "test/1"


def write(folder, content="hello", *, files=()):
    with committed_directory(folder, schema=SCHEMA, files=files) as temporary:
        (temporary / "a.txt").write_text(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def without_exchange(monkeypatch):
    monkeypatch.setattr(artifact, "exchange", lambda one, other: False)


class KilledError(BaseException):
    """As a kill: nothing that an `except OSError` would undo."""


@pytest.mark.parametrize("at", [1, 2], ids=["after the first rename", "after the second"])
def test_killed_between_the_renames_that_replace_a_folder_one_of_both_is_there(
    tmp_path, without_exchange, monkeypatch, at
):
    write(tmp_path / "x", "old")
    rename, seen = Path.rename, []

    def kill(self, target):
        rename(self, target)
        seen.append(target)
        if len(seen) == at:
            raise KilledError

    monkeypatch.setattr(Path, "rename", kill)
    with pytest.raises(KilledError):
        write(tmp_path / "x", "new")
    monkeypatch.setattr(Path, "rename", rename)
    verify_directory(tmp_path / "x", schema=SCHEMA)
    assert (tmp_path / "x" / "a.txt").read_text() == {1: "old", 2: "new"}[at]
    write(tmp_path / "x", "newest")
    assert (tmp_path / "x" / "a.txt").read_text() == "newest"
    assert names(tmp_path) == ["x"]


def test_a_folder_is_never_absent_while_it_is_replaced(tmp_path, monkeypatch):
    """On systems that can exchange two names; nobody sees a moment without the folder."""
    if not exchange_works(tmp_path):
        pytest.skip("this file system cannot exchange names")
    write(tmp_path / "x", "old")
    monkeypatch.setattr(Path, "rename", lambda self, target: pytest.fail("renamed"))
    write(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a.txt").read_text() == "new"


def exchange_works(folder):
    for name in "ab":
        (folder / name).mkdir()
    try:
        return exchange(folder / "a", folder / "b")
    finally:
        for name in "ab":
            (folder / name).rmdir()


@pytest.mark.parametrize("moved", [0, 1])
def test_killed_while_moving_into_a_shared_folder_the_new_one_is_whole(tmp_path, monkeypatch, moved):
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    write(folder, "old", files=("a.txt",))
    replace, seen = Path.replace, []

    def kill(self, target):
        if TEMPORARY in str(self) or self.parent.name == "repo":
            return replace(self, target)
        if len(seen) == moved:
            raise KilledError
        seen.append(replace(self, target))
        return target

    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KilledError):
        write(folder, "new", files=("a.txt",))
    monkeypatch.setattr(Path, "replace", replace)
    verify_directory(folder, schema=SCHEMA)
    assert (folder / "a.txt").read_text() == "new"
    assert names(folder) == [MANIFEST, "README.md", "a.txt"]


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from crosscoder.foundation.disk import temporary_folder, temporary_file
root = Path({str(tmp_path)!r})
with temporary_folder(root) as folder, temporary_file(root) as (file, stream):
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    assert len(list(tmp_path.glob(f"{TEMPORARY}*"))) == 2
    write(tmp_path / "x")
    assert len(list(tmp_path.glob(f"{TEMPORARY}*"))) == 2
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    replace_file(tmp_path / "y", b"1")
    assert names(tmp_path) == ["x", "y"]


def test_where_there_are_no_locks_only_the_old_is_abandoned(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(disk.fcntl, "flock", none)
    new, old = tmp_path / f"{TEMPORARY}new", tmp_path / f"{TEMPORARY}old"
    for path in (new, old):
        path.mkdir()
    os.utime(old, (time.time() - 2 * disk.ABANDONED_S,) * 2)
    write(tmp_path / "x")
    assert names(tmp_path) == [new.name, "x"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_with_bytes_path_and_mend(tmp_path, error):
    write(tmp_path / "x", "old")

    def fill(folder):
        (folder / "a.txt").write_bytes(bytes(4096))
        raise error

    def commit():
        with committed_directory(tmp_path / "x", schema=SCHEMA) as temporary:
            fill(temporary)

    def resume():
        with resumed_directory(tmp_path / "y", schema=SCHEMA, key="k") as temporary:
            fill(temporary)

    for act in (commit, resume):
        with pytest.raises(
            DiskFullError, match=r"no room for the rest of .*/[xy]: 4\.0 KiB of it .* free some"
        ) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "x" / "a.txt").read_text() == "old"


def test_another_error_of_the_disk_is_not_called_full(tmp_path):
    with pytest.raises(PermissionError), disk.naming_full_disk(tmp_path / "x", tmp_path):
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has such a file")
def test_a_really_full_device_is_named(tmp_path):
    naming = disk.naming_full_disk(tmp_path / "x", tmp_path)
    with pytest.raises(DiskFullError, match="no room"), naming, open("/dev/full", "wb") as stream:
        stream.write(bytes(10))


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    write(tmp_path / "x", "old")

    def stale(one, other):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(artifact, "exchange", stale)
    with pytest.raises(OSError, match="Stale"):
        write(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["with space", "ünï", "[a]*", "x" * 200, "é" * 100, "-dash", os.fsdecode(b"\xff\xfe")])
def test_odd_names_of_folders(tmp_path, name):
    for content in ("old", "new"):
        write(tmp_path / name, content)
    with resumed_directory(tmp_path / f"r{name}"[:120], schema=SCHEMA, key="k") as temporary:
        (temporary / "a").write_text("1")
    verify_directory(tmp_path / name, schema=SCHEMA)
    assert (tmp_path / name / "a.txt").read_text() == "new"
    assert len(names(tmp_path)) == 2


def test_a_damaged_artifact_of_the_same_kind_can_be_replaced(tmp_path):
    write(tmp_path / "x", "old")
    (tmp_path / "x" / "a.txt").unlink()
    write(tmp_path / "x", "new")
    verify_directory(tmp_path / "x", schema=SCHEMA)


def test_a_manifest_that_lists_nothing_and_a_folder_without_files_are_refused(tmp_path):
    write(tmp_path / "x")
    write_json(tmp_path / "x" / MANIFEST, {"schema": SCHEMA, "files": {}})
    with pytest.raises(DamagedArtifactError, match="lists no file"):
        verify_directory(tmp_path / "x", schema=SCHEMA)
    with pytest.raises(ValueError, match="nothing to keep"), committed_directory(tmp_path / "y", schema=SCHEMA):
        pass
    assert names(tmp_path) == ["x"]


def test_what_a_manifest_does_not_list_is_refused_where_others_would_read_it(tmp_path):
    write(tmp_path / "x")
    for harmless in (".hidden", "README.md", "notes.txt"):
        (tmp_path / "x" / harmless).write_text("")
    assert verify_directory(tmp_path / "x", schema=SCHEMA, closed=True) == {"a.txt"}
    (tmp_path / "x" / "planted.json").write_text("{}")
    verify_directory(tmp_path / "x", schema=SCHEMA)
    with pytest.raises(DamagedArtifactError, match=r"holds planted\.json"):
        verify_directory(tmp_path / "x", schema=SCHEMA, closed=True)


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ("test/2", "a later version of crosscoder"),
        ("test/0", "crosscoder 0.1 or 0.2 wrote it"),
        ("x/1", "another kind"),
    ],
)
def test_another_version_says_which_reads_it(tmp_path, seen, said):
    write(tmp_path / "x")
    manifest = read_json(tmp_path / "x" / MANIFEST)
    write_json(tmp_path / "x" / MANIFEST, {**manifest, "schema": seen})
    with pytest.raises(DamagedArtifactError, match=said):
        verify_directory(tmp_path / "x", schema=SCHEMA)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1e999}', "not a number"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
        ("[" + "{}," * 3_000_000 + "0]", "are refused"),
    ],
)
def test_json_that_is_hostile_is_refused_at_once(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    start = time.perf_counter()
    with pytest.raises(DamagedArtifactError, match=said):
        read_json(tmp_path / "a.json")
    assert time.perf_counter() - start < 1


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(DamagedArtifactError, match="no plain file"):
        read_json(tmp_path / "a.json")


def test_one_digit_of_a_sealed_file_is_found_and_other_white_space_is_not(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, {"b": [1.25, {"c": "é"}], "a": None})
    assert read_sealed(path) == {"b": [1.25, {"c": "é"}], "a": None}
    assert list(json.loads(path.read_text())) == ["b", "a", "sha256"]
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_sealed(path)["b"][0] == 1.25
    path.write_text(path.read_text().replace("1.25", "1.26"))
    with pytest.raises(DamagedArtifactError, match=r"was changed since it was written.*run it again"):
        read_sealed(path, mend="run it again")
    path.write_text('{"a": 1}')
    with pytest.raises(DamagedArtifactError, match="carries no sha256"):
        read_sealed(path)


@pytest.mark.parametrize("change", ["value", "name", "unsealed", "torn"])
def test_sealed_tensors(tmp_path, change):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.arange(4.0).bfloat16(), "one": torch.ones(1)}
    save_tensors(tensors, path)
    assert torch.equal(load_tensors(path)["x"], tensors["x"])
    content = path.read_bytes()
    if change == "unsealed":
        save_file(tensors, path)
    else:
        changed = {"value": content[:-1] + b"\x41", "name": content.replace(b'"x"', b'"y"'), "torn": content[:-1]}
        path.write_bytes(changed[change])
    with pytest.raises(DamagedArtifactError, match=r"a\.safetensors"):
        load_tensors(path)


def test_whatever_a_reader_stumbles_over_is_one_line_that_names_the_file(tmp_path):
    class PanicException(BaseException):
        pass

    stumbles = (
        KeyError("a"),
        TypeError("x\ny"),
        RecursionError(),
        OverflowError("big"),
        RuntimeError("r"),
        IndexError(),
    )
    for error in (
        *stumbles,
        PanicException("rust"),
        Exception("rust too"),
        SafetensorError("s"),
        ValueError("v" * 5000),
    ):
        with pytest.raises(DamagedArtifactError, match=r"a/b\.json.*make it again") as caught, reading("a/b.json"):
            raise error
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1500
    for error in (FileNotFoundError("f"), KeyboardInterrupt()):
        with pytest.raises(type(error)), reading("a/b.json"):
            raise error


def test_what_somebody_else_wrote_cannot_command_a_terminal(capsys):
    console.say("a\x1b[31mred\x07\u202egnp.exe\u2028b\ud800\tc\x9b2J")
    said = capsys.readouterr().err
    assert said == "a\ufffd[31mred\ufffd\ufffdgnp.exe b\ufffd c\ufffd2J\n"
    console.say("plain: é, 日本, two\nlines")
    assert capsys.readouterr().err == "plain: é, 日本, two\nlines\n"


def test_paths_that_are_not_utf_8_are_given_and_kept(tmp_path, capfdbinary):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    console.give(path)
    assert capfdbinary.readouterr().out == os.fsencode(path) + b"\n"
    write_json(tmp_path / "a.json", {"path": str(path)})
    assert read_json(tmp_path / "a.json")["path"] == str(path)


@config
class Counted:
    n: int = 1
    inner: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        float(self.n)


def test_numbers_that_nothing_holds_and_long_values_are_one_short_line():
    for settings in ({"n": 10**400}, {"inner": "a" * 10_000}, {"x" * 10_000: 1}, {"inner": [10**6000, "b"]}):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            from_mapping(Counted, settings)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", float("nan"), 2**63])
def test_counts_are_whole_numbers(value):
    with pytest.raises(ValueError, match=r"n is .*expected a whole number of at least 1"):
        require_count(n=value)
    require_count(n=None, m=1)
