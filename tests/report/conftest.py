"""What the tests of the report share."""

import pytest

from crosscoder.report import page as report
from crosscoder.report.page import PICTURES


@pytest.fixture
def undrawn(monkeypatch):
    """Without the pictures, which take seconds and are tested elsewhere."""
    monkeypatch.setattr(report, "PICTURES", dict.fromkeys(PICTURES, lambda results: None))
