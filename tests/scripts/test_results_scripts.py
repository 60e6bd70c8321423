"""The scripts on results files: a difference is found, and one that is told to be expected is let through."""

import json
from pathlib import Path

import pytest

from crosscoder.foundation.artifact import SEAL, write_sealed
from crosscoder.foundation.damage import DamagedArtifactError

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "benchmarks" / "smollm2-135m" / "results.json"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import compare_results

    return compare_results.main


def test_a_study_equals_itself(compare):
    assert compare([str(STUDY), str(STUDY)]) == 0


@pytest.mark.parametrize("value", [7, None])
def test_another_or_missing_value_is_found_unless_it_is_expected(compare, tmp_path, capsys, value):
    changed = json.loads(STUDY.read_text())
    values = next(block["values"] for block in changed["rows"] if "alive" in block["values"])
    values["alive"] = value
    write_sealed(tmp_path / "new.json", {key: one for key, one in changed.items() if key != SEAL})
    both = [str(STUDY), str(tmp_path / "new.json")]
    assert compare(both) == 1
    assert "DIFFERS alive at" in capsys.readouterr().out
    assert compare([*both, "--moved", "alive"]) == 0


def test_sealed_results_are_read_and_a_changed_digit_is_found(compare, tmp_path):
    sealed = ROOT / "benchmarks" / "standard-study" / "results.json"
    assert compare([str(sealed), str(sealed)]) == 0
    changed = json.loads(sealed.read_text())
    next(block["values"] for block in changed["rows"] if "alive" in block["values"])["alive"] = 7
    (tmp_path / "new.json").write_text(json.dumps(changed))
    with pytest.raises(DamagedArtifactError, match="was changed since it was written"):
        compare([str(sealed), str(tmp_path / "new.json")])
