"""Sentences that a study's report opens with, and numbers pooled over training seeds."""

import pytest

from crosscoder.experiments import assembly


def judged(trained: list[float], untrained: list[float]) -> dict:
    def entry(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean, "high": mean}

    rows = [
        {"site": "write", "trained": entry(a), "untrained": entry(b)} for a, b in zip(trained, untrained, strict=True)
    ]
    return {"sentence": "Undecided: R crosses a bound.", "estimators": rows}


SUBJECTS = {name: {"parameters": {"non_embedding": 393_216}, "held_out_loss": 3.4} for name in ("A", "B")}


def test_the_answer_opens_with_the_verdict_and_shows_how_far_estimators_differ():
    answer = assembly.answer([], SUBJECTS, judged([1.7, 0.5], [2.0, 0.9]))
    assert answer[0] == "Undecided: R crosses a bound."
    assert "from 0.50 to 1.70 by estimator" in answer[1]
    assert "from 0.90 to 2.00 in the untrained pair" in answer[1]


def test_without_a_control_nothing_is_said_of_one():
    without = judged([1.7], [1.0])
    without["estimators"][0]["untrained"] = None
    assert "untrained" not in assembly.answer([], SUBJECTS, without)[1]


def test_numbers_are_pooled_over_training_seeds():
    def cell(mean: float) -> dict:
        return {"quality": {"summary": {"l0_token": {"mean": mean, "low": mean - 1, "high": mean + 1}}}}

    pooled = assembly._number([cell(4.0), cell(8.0)], "quality", "l0_token")
    assert pooled == {"mean": pytest.approx(6), "low": 3, "high": 9}
    assert assembly._number([cell(4.0), {"quality": {"summary": {}}}], "quality", "l0_token") is None
    assert assembly._number([], "quality", "l0_token") is None
