"""Signals raise a flag and nothing else; a lock has one holder and ends with it; room is known before work."""

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import crosscoder
from crosscoder.foundation import disk, failpoints, lock, signals
from crosscoder.foundation.disk import TEMPORARY, require_room, temporary_folder
from crosscoder.foundation.lock import InUseError, locked

ROOT = Path(crosscoder.__file__).parents[1]


def child(code, *arguments):
    """A process that runs `code`; `import crosscoder` costs it nothing, for torch comes with what needs it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def test_the_first_signal_asks_and_handlers_are_restored():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.watching():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested() == "SIGTERM"
        with signals.watching():  # another one inside changes nothing
            assert signals.requested() == "SIGTERM"
        with pytest.raises(signals.Stopped, match="stopped by SIGTERM"):
            signals.safe_point()
        with pytest.raises(signals.Stopped):
            list(signals.safe_points([1]))
    assert not signals.requested()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


def test_the_second_ctrl_c_of_a_library_is_what_it_always_was():
    with signals.watching():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert not isinstance(stop.value, signals.Stopped)


def test_somebody_else_s_handler_stays_and_other_threads_set_none():
    def own(*_):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, own)
    try:
        with signals.watching():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    seen = []

    def elsewhere():
        with signals.watching():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_stopped_is_no_failure():
    """No `except Exception` may take it for one."""
    assert not issubclass(signals.Stopped, Exception)
    assert issubclass(signals.Stopped, KeyboardInterrupt)


PROGRAM = """
import sys, time
from crosscoder.foundation import signals
with signals.watching(exits=True):
    if sys.argv[1] == "begun":
        signals.begin()
    print("ready", flush=True)
    end = time.monotonic() + 60
    while time.monotonic() < end:  # never at a safe point
        time.sleep(0.01)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_asked_twice_ends_at_once_with_130(first):
    process = child(PROGRAM, "begun")
    process.stdout.readline()
    process.send_signal(first)
    assert "stopping at the next safe point" in process.stderr.readline()
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == signals.STOPPED_AT_ONCE == 130
    assert time.monotonic() - started < 5


def test_a_command_that_has_written_nothing_stops_where_it_is_and_says_how_to_begin_again():
    process = child(PROGRAM, "not", "a b")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=10)[1]
    assert process.returncode == signals.STOPPED == 75
    assert "go on with:\n  crosscoder not 'a b'" in said
    assert "Traceback" not in said


HOLDER = """
import sys
from crosscoder.foundation.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    process = child(HOLDER, folder)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_writer_and_the_other_is_told_whom(tmp_path, capsys):
    holder = hold(tmp_path)
    try:
        with pytest.raises(InUseError) as refused, locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    said = str(refused.value)
    for part in (str(tmp_path), f"process {holder.pid} on ", ", started 20", f"kill {holder.pid}", "another folder"):
        assert part in said
    assert (tmp_path / ".lock").is_file()  # what a killed process leaves
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert f"taking over the lock that process {holder.pid}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_parts_share_a_lock_that_the_whole_does_not(tmp_path):
    with locked(tmp_path, shared=True):
        with locked(tmp_path, shared=True):
            pass
        with pytest.raises(InUseError), locked(tmp_path):
            pass
    with locked(tmp_path), pytest.raises(InUseError), locked(tmp_path, shared=True):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_file_of_garbage_and_a_system_without_locks_stop_nobody(tmp_path, monkeypatch, capsys):
    (tmp_path / ".lock").write_text("garbage\x1b[31m")
    with locked(tmp_path):
        pass

    def none(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with locked(tmp_path):
        pass
    assert "without locks; let no other process write there" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with locked(tmp_path):
        pass


def test_a_folder_that_is_only_locked_is_not_left_behind(tmp_path):
    with locked(tmp_path / "new"):
        assert (tmp_path / "new" / ".lock").is_file()
    assert not (tmp_path / "new").exists()


def test_leftovers_go_and_nothing_else(tmp_path):
    (tmp_path / f"{TEMPORARY}1").mkdir()
    (tmp_path / f"{TEMPORARY}2").write_text("torn")
    (tmp_path / "step-1").mkdir()
    for name in ("step-1", "step-2"):
        (tmp_path / f".old-{name}-{hashlib.sha256(name.encode()).hexdigest()[:12]}").mkdir()
    (tmp_path / ".old-of-somebody").mkdir()
    with temporary_folder(tmp_path) as alive:
        lock.remove_leftovers(tmp_path)
        assert alive.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".old-of-somebody", "step-1", "step-2"]


def test_no_room_is_found_out_before_and_named(tmp_path, monkeypatch):
    require_room(tmp_path, {"model": 10_000, "empty": 0}, copies=3, what="checkpoint")
    with pytest.raises(OSError, match=r"3 checkpoints of \d+\.\d TiB, .* in all, and has .* free") as refused:
        require_room(tmp_path, {"model": 2**50}, copies=3, what="checkpoint")
    assert refused.value.errno == errno.ENOSPC
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path} cannot take one checkpoint of 195.3 KiB .*File too large"):
            require_room(tmp_path, {"model": 200_000}, what="checkpoint")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)  # then it is written
    monkeypatch.setattr(disk, "_CHUNK", 1000)
    require_room(tmp_path, {"model": 10_001}, what="checkpoint")


def test_what_a_kill_leaves_of_the_trial_for_room_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_reserve", lambda descriptor, n_bytes: os._exit(9))
    if (child := os.fork()) == 0:
        require_room(tmp_path, {"model": 10}, what="checkpoint")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 1
    disk.remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_failpoints_do_what_they_are_told_and_otherwise_nothing():
    failpoints.failpoint("save.begin")
    failpoints.arm("save.begin@2=full")
    try:
        failpoints.failpoint("save.begin")
        failpoints.failpoint("save.end")
        with pytest.raises(OSError, match="No space left"):
            failpoints.failpoint("save.begin")
        failpoints.failpoint("save.begin")
    finally:
        failpoints.arm("")
    for wrong in ("nowhere", "save.begin@x", "save.begin=explode"):
        with pytest.raises(ValueError, match="CROSSCODER_FAILPOINT is"):
            failpoints.arm(wrong)
