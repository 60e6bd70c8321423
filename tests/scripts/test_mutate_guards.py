"""The list of guards is that of the code: a long form that cannot find what it takes away would be told too late."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def guards(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutate_guards

    return mutate_guards.GUARDS


def test_what_is_taken_away_stands_once_in_its_file_and_its_tests_are_there(guards):
    stale = [guard.name for guard in guards if (ROOT / guard.path).read_text().count(guard.text) != 1]
    assert not stale
    assert all((ROOT / path).is_file() for guard in guards for path in guard.tests.split())
    assert len({guard.name for guard in guards}) == len(guards) >= 25
