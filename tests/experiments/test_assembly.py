"""Sentences that a study's report opens with."""

from crosscoder.experiments import assembly


def test_at_least_is_never_rounded_up():
    cell = {
        "counts": {"role": "main", "state": "trained"},
        "quality": {"summary": {"dead_share": {"mean": 0.0234, "low": 0.0215, "high": 0.0254}}},
    }
    cross = {(state, site): None for state in ("trained", "untrained") for site in ("residual", "write")}
    assert "at least 97% of every dictionary is alive" in assembly._support([cell], cross)
