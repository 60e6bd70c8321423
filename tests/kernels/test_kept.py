"""Compiled libraries of an earlier process: what is loaded, what is made again, and what is never executed."""

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from triton_kernels.cpu.native import kept

SOURCE = "int answer(void) { return %d; }"


def compile_answer(number, *, log=None):
    """What builds a library whose `answer` is a number; each building is counted in `log`."""

    def make(target):
        if log is not None:
            log.append(number)
        source = target.with_suffix(".c")
        source.write_text(SOURCE % number)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)

    return make


@pytest.fixture(scope="module", autouse=True)
def cpu_form():
    """Neither form of the operators is asked here."""
    if not shutil.which("gcc"):
        pytest.skip("there is no C compiler")


@pytest.fixture
def home():
    """A folder of this user among the system's temporary files, where a test's own folder may not be."""
    with tempfile.TemporaryDirectory(prefix="kept-", dir="/tmp") as made:
        yield Path(made)


@pytest.fixture
def folder(home, tmp_path, monkeypatch):
    """The cache of a user whose temporary files are elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return home / "crosscoder"


def answer_of(fingerprint, number, log=None):
    return kept.library(fingerprint, compile_answer(number, log=log)).answer()


def test_a_library_is_made_once_and_by_this_user_alone(folder):
    log = []
    assert [answer_of("a", 1, log), answer_of("a", 2, log), answer_of("b", 3, log)] == [1, 1, 3]
    assert log == [1, 3]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.glob("*.so"))


@pytest.mark.parametrize("damage", ["empty", "zeros", "half", "bit", "long"])
def test_a_damaged_library_is_made_again(folder, damage):
    answer_of("a", 1)
    (path,) = folder.glob("*.so")
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    after = {"empty": b"", "zeros": bytes(len(content)), "half": content[: len(content) // 2]}
    # Another file of the name: this process has the first one in memory.
    path.unlink()
    path.write_bytes({**after, "bit": bytes(flipped), "long": content + b"\0"}[damage])
    path.chmod(0o600)
    assert answer_of("a", 2) == 2
    assert answer_of("a", 3) == 2


def plant(path, number, scratch):
    compile_answer(number)(scratch / "planted.so")
    content = (scratch / "planted.so").read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.with_name(f"kernels-a-{hashlib.sha256(content).hexdigest()}.so")
    target.write_bytes(content)
    return target


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_what_another_user_has_planted_is_not_executed(folder, tmp_path):
    """A folder of another user, a file of another user in one's own, and a folder that others may write to."""
    os.chown(folder.parent, 0, 0)
    planted = plant(folder / "x", 66, tmp_path)
    for path in (folder, planted):
        os.chown(path, 1234, 1234)
    folder.chmod(0o777)
    assert answer_of("a", 1) == 1
    assert not list(folder.glob("*lock")), "nothing is written into it either"
    os.chown(folder, 0, 0)
    folder.chmod(0o700)
    assert answer_of("a", 2) == 2, "the file is still another user's"


@pytest.mark.parametrize("where", ["file", "folder", "above"])
def test_what_others_may_write_to_is_not_executed(folder, tmp_path, where):
    planted = plant(folder / "x", 66, tmp_path)
    folder.chmod(0o700)
    planted.chmod(0o600)
    {"file": planted, "folder": folder, "above": folder.parent}[where].chmod(0o777)
    assert answer_of("a", 1) == 1


def test_a_link_is_not_followed(folder, tmp_path):
    planted = plant(tmp_path / "elsewhere" / "x", 66, tmp_path)
    folder.mkdir(mode=0o700)
    (folder / planted.name).symlink_to(planted)
    assert answer_of("a", 1) == 1
    assert planted.exists()


def test_without_a_home_or_with_one_that_is_read_only_a_library_is_kept_elsewhere(monkeypatch, home):
    log, shared = [], home
    shared.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for given in ("", "/proc/nowhere", "relative"):
        monkeypatch.setenv("HOME", given)
        assert answer_of(home.name, 1, log) == 1  # a name that no earlier run has left anywhere
    assert log == [1]
    assert [path.name for path in shared.iterdir()] == [f"crosscoder-{os.geteuid()}"]
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    assert answer_of(home.name, 1, log) == 1


def test_where_no_folder_may_be_trusted_it_is_said_and_made_for_one_process(folder, tmp_path):
    folder.parent.chmod(0o777)
    tmp_path.joinpath(f"crosscoder-{os.geteuid()}").write_text("in the way")
    with pytest.warns(RuntimeWarning, match=r"not kept.*chmod 700"):
        assert answer_of("a", 1) == 1


def test_two_processes_at_once_make_it_once(folder, tmp_path):
    """Both wait for the lock, and the second finds what the first has made."""
    script = f"""
import importlib.util, subprocess, time
spec = importlib.util.spec_from_file_location("kept", {kept.__file__!r})
kept = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kept)
def make(target):
    with open({str(tmp_path / "log")!r}, "a") as log: log.write("made\\n")
    time.sleep(0.5)
    source = target.with_suffix(".c"); source.write_text({SOURCE % 7!r})
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
assert kept.library("a", make).answer() == 7
"""
    runs = [subprocess.Popen([sys.executable, "-c", script]) for _ in "ab"]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_what_a_killed_compiler_left_is_removed(folder):
    folder.mkdir(mode=0o700)
    (folder / ".making-a-x").mkdir()
    answer_of("a", 1)
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]


def test_what_cannot_be_loaded_is_not_kept(folder):
    with pytest.raises(OSError, match=r"made\.so"):
        kept.library("a", lambda target: target.write_text("no library"))
    assert not list(folder.glob("*.so"))
    assert isinstance(kept.library("a", compile_answer(1)), ctypes.CDLL)
