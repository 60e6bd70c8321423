"""Damaged and hostile files through every loader, in short; `scripts/fuzz.py` does it at length."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import fuzz


def test_every_loader_ends_in_a_clear_error_or_a_right_load(tmp_path):
    found = fuzz.fuzz(tmp_path, inputs=400, seed=7)
    found.failures = [line for line in found.failures if not line.endswith(" s")]  # a busy machine is slow
    assert not found.failures
    assert len(found.inputs) >= 15
    assert found.memory_bytes < fuzz.MOST_BYTES


def test_what_is_read_as_good_and_what_ends_in_a_traceback_is_a_failure(tmp_path):
    import random

    (tmp_path / "a.json").write_text('{"a": 1}')

    def sample(load):
        return fuzz.Sample("a", tmp_path, load)

    for load, said in ((lambda: None, "read as good"), (lambda: [][0], "IndexError"), (fuzz.Found, "read as good")):
        found = fuzz.Found()
        for number in range(40):
            fuzz.try_one(sample(load), random.Random(number), found, number)
        assert any(said in line for line in found.failures)
    assert (tmp_path / "a.json").read_text() == '{"a": 1}'
