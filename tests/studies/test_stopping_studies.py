"""Studies that are stopped: their processes reach a safe point, nothing is left running, and the study goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crosscoder.foundation import signals
from crosscoder.foundation.disk import TEMPORARY
from crosscoder.foundation.lock import InUseError
from crosscoder.studies import folder
from tests.studies.test_folder import is_alive, wait_for

ROOT = Path(folder.__file__).parents[2]
STOPPED = """
import os, signal, sys, time
from functools import partial
from pathlib import Path
from crosscoder.foundation import signals
from crosscoder.studies.folder import StudyFolder

def work(path):
    path = Path(path)
    path.with_suffix(".pid").write_text(str(os.getpid()))
    end = time.monotonic() + 120
    try:
        while time.monotonic() < end:
            time.sleep(0.01)
            signals.safe_point()
    except signals.Stopped as stop:
        path.with_suffix(".kept").write_text(str(stop))
        raise

if __name__ == "__main__":
    root = sys.argv[1]
    jobs = {name: partial(work, f"{root}/{name}") for name in "abc"}
    try:
        with signals.watching(exits=True):
            study = StudyFolder(Path(root) / "study", workers=2)
            with study.alone():
                study.run(jobs, "jobs")
    except signals.Stopped as stop:
        print(stop, flush=True)
        sys.exit(signals.STOPPED)
"""


@pytest.mark.parametrize("to", ["study", "worker", "group"])
def test_every_process_of_a_study_reaches_a_safe_point(to, tmp_path):
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path)]
    study = subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)
    paths = [tmp_path / f"{name}.pid" for name in "ab"]
    assert wait_for(lambda: all(path.is_file() and path.read_text() for path in paths), 60)
    workers = [int(path.read_text()) for path in paths]
    match to:
        case "study":
            study.send_signal(signal.SIGTERM)
        case "worker":
            os.kill(workers[0], signal.SIGTERM)
        case "group":  # as a terminal's Ctrl-C does
            os.killpg(study.pid, signal.SIGINT)
    said, errors = study.communicate(timeout=60)
    assert study.returncode == signals.STOPPED, errors
    assert "what was done is kept in" in said
    assert "Traceback" not in errors
    assert all((tmp_path / f"{name}.kept").is_file() for name in "ab")
    assert not (tmp_path / "c.kept").exists()  # was never begun
    assert wait_for(lambda: not any(map(is_alive, workers)))
    assert not (tmp_path / "study" / ".lock").exists()


def test_a_study_has_one_process_that_orders_it_but_for_parts(tmp_path):
    study = folder.StudyFolder(tmp_path)
    with study.alone("0-of-2"), folder.StudyFolder(tmp_path).alone("1-of-2"):
        with pytest.raises(InUseError), folder.StudyFolder(tmp_path).alone("1-of-2"):
            pass
        with pytest.raises(InUseError), folder.StudyFolder(tmp_path).alone():
            pass
    with study.alone():
        pass


def test_a_part_waits_for_the_tokens_of_another(tmp_path, monkeypatch):
    """Two parts of a study begin alike; the second takes what the first has prepared."""
    study, calls = folder.StudyFolder(tmp_path), []

    def prepare(*_, **given):
        calls.append(1)
        if len(calls) < 3:
            raise InUseError("in use by process 1")
        (given["folder"] / "held_out").mkdir(parents=True)

    monkeypatch.setattr(folder, "prepare_tokens", prepare)
    monkeypatch.setattr(folder, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(folder.PreparedTokens, "load", lambda home: home)
    assert study.tokens("text") == tmp_path / "tokens"
    assert len(calls) == 3


def test_what_a_measurement_went_on_from_goes_once_its_rows_are_kept(tmp_path):
    unfinished = tmp_path / "unfinished" / "one"
    unfinished.mkdir(parents=True)
    folder._keep(list, tmp_path / "one.json", unfinished)
    assert json.loads((tmp_path / "one.json").read_text()) is not None
    assert not unfinished.exists()


def test_leftovers_of_a_killed_study_are_removed_by_the_next(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{TEMPORARY}1").write_text("torn")
    with folder.StudyFolder(tmp_path).alone():
        assert not list(tmp_path.rglob(".tmp-*"))
