"""Where studies are kept: another version of the code that computes is another folder, another wording is not."""

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.origin import MismatchError
from crosscoder.foundation.tensors import load_tensors
from crosscoder.studies import baselines, folder


def test_a_study_is_run_again_when_any_file_of_a_computing_room_changes():
    hashed = set(folder.computing_sources())
    package = folder.Path(folder.__file__).parents[1]
    for room in (package.parent / "triton_kernels", *(package / name for name in folder.COMPUTING)):
        assert {path for path in room.rglob("*") if path.suffix in (".py", ".c", ".h")} <= hashed


def test_a_reworded_report_or_progress_line_does_not_cost_a_study():
    package = folder.Path(folder.__file__).parents[1]
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    shown = {"foundation", "formats", "results", "browser", "report", "commands"}
    assert rooms - set(folder.COMPUTING) <= shown, "a room is neither computing nor known to show"
    hashed = folder.computing_sources()
    assert not {path.parent.name for path in hashed} & shown
    assert not {path.name for path in hashed} & {"console.py", "cli.py"}


def test_cleaning_up_after_one_part_leaves_the_activations_that_others_read(tmp_path):
    study = folder.StudyFolder(tmp_path)
    own, other = (study.stores(run, "trained") for run in ("A0", "B0"))
    for one in (own, other):
        one.train.mkdir(parents=True)
        one.held_out.mkdir()
    folder.drop_activations([own])
    assert not own.train.exists()
    assert not own.held_out.exists()
    assert other.train.is_dir()
    assert other.held_out.is_dir()


def text_of(n_blocks, documents=None):
    return TokenBlocks(torch.arange(n_blocks)[:, None] + torch.arange(4), vocab_size=n_blocks + 4, documents=documents)


def test_spliced_rows_are_drawn_from_all_of_the_text(tmp_path):
    study = folder.StudyFolder(tmp_path)
    for n_drawn, n_blocks in ((6, 10), (5, 10), (20, 10), (1, 7)):
        study.draw_splice_ids(text_of(n_blocks), n_drawn)
        drawn = load_tensors(study.stores("A0", "trained", spliced=tmp_path).held_out_ids)
        places = drawn["blocks"].numpy()
        assert len(places) == min(n_drawn, n_blocks)
        assert np.diff([*places, n_blocks]).max() <= -(-n_blocks // len(places))  # no stretch is passed over
        assert (drawn["ids"][:, 0].numpy() == places).all()


def test_losses_without_a_document_are_those_of_the_others():
    documents, loss_B = np.repeat(np.arange(30) * 2, 3), np.random.default_rng(0).random(90)
    some = baselines.evenly(text_of(90, documents), 45)
    assert (some.documents == documents[::2]).all()
    found = baselines.loss_values("held_out_loss", loss_B[::2], some)
    assert found["held_out_loss"] == pytest.approx(loss_B[::2].mean())
    left = [loss_B[::2][some.documents != one].mean() for one in np.unique(documents)]
    assert found["held_out_loss_left"] == pytest.approx(left)
    few = baselines.evenly(text_of(87, documents[:87]), 87)
    assert baselines.loss_values("held_out_loss", loss_B[:87], few).keys() == {"held_out_loss"}


def test_inputs_may_change_until_tokens_were_made_of_them(tmp_path):
    """A study that failed on an empty text goes on once the text is mended."""
    folder.require_inputs(tmp_path, text="a")
    folder.require_inputs(tmp_path, text="b")
    (tmp_path / "tokens" / "held_out").mkdir(parents=True)
    folder.require_inputs(tmp_path, text="b")
    with pytest.raises(MismatchError, match=r"text \(now c, then b\) changed since"):
        folder.require_inputs(tmp_path, text="c")
    with pytest.raises(FileNotFoundError, match="there is no text at"):
        folder.text_hash(str(tmp_path / "nowhere"))


def test_processes_serve_every_stage_and_a_failure_names_its_job(tmp_path):
    study = folder.StudyFolder(tmp_path, workers=1)
    first = study.run({"a": os.getpid}, "first")
    assert study.run({"b": os.getpid}, "second")["b"] == first["a"] != os.getpid()
    with pytest.raises(RuntimeError, match="c failed: math domain error"):
        study.run({"c": partial(math.log, -1.0), "d": os.getpid}, "third")
    assert study.run({"e": os.getpid}, "fourth")["e"] != first["a"]


STOPPED = """
import sys, time
from functools import partial
from pathlib import Path
from crosscoder.studies.folder import StudyFolder

def work(path):
    import os
    Path(path).write_text(str(os.getpid()))
    time.sleep(300)

if __name__ == "__main__":
    StudyFolder(Path(sys.argv[1]) / "study", workers=1).run({"a": partial(work, sys.argv[1] + "/pid")}, "a")
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_study_whatever_ends_it(tmp_path, how):
    script, pid_file = tmp_path / "stopped.py", tmp_path / "pid"
    script.write_text(STOPPED)
    root = Path(folder.__file__).parents[2]
    study = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
    )
    assert wait_for(lambda: pid_file.is_file() and pid_file.read_text())
    worker = int(pid_file.read_text())
    os.kill(study.pid, how)  # the study alone, not its group
    assert study.wait(20) != 0
    assert wait_for(lambda: not is_alive(worker))


def wait_for(reached, seconds=30):
    end = time.monotonic() + seconds
    while not (found := reached()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def is_alive(pid):
    """Whether a process runs; one that has ended and waits to be asked about does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rsplit(")", 1)[1].split()[0] != "Z"
