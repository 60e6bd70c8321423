"""Sentences that a study's report opens with, and numbers pooled over training seeds."""

import pytest

from crosscoder.studies import answer as assembly


def judged(**rows: tuple[float, float | None]) -> dict:
    """R by estimator, trained and untrained, on what blocks write."""

    def entry(mean: float | None) -> dict[str, float] | None:
        return None if mean is None else {"mean": mean, "low": mean, "high": mean}

    found = [
        {"site": "write", "estimator": name, "trained": entry(trained), "untrained": entry(untrained)}
        for name, (trained, untrained) in rows.items()
    ]
    elsewhere = {"site": "residual", "estimator": "load_raw", "trained": entry(9.0), "untrained": None}
    return {"sentence": "Undecided: R crosses a bound.", "estimators": [*found, elsewhere]}


SUBJECTS = {
    name: {"parameters": {"non_embedding": 393_216}, "held_out_loss": 3.4, "n_layers": depth, "d_model": width}
    for name, depth, width in (("A", 8, 64), ("B", 2, 128))
}


def test_the_answer_opens_with_the_verdict_and_tells_loads_from_counts():
    rows = {"load_raw": (1.7, 2.0), "load_debiased": (0.5, 0.9), "count_joint": (2.1, 2.2)}
    answer = assembly.answer([], SUBJECTS, judged(**rows))
    assert answer[0] == "Undecided: R crosses a bound."
    assert "is 0.50 to 1.70 (untrained 0.90 to 2.00) by the entropy load" in answer[1]
    assert "2.10 to 2.10 (untrained 2.20 to 2.20) by their number" in answer[1]
    assert "A 8 layers of 64, B 2 layers of 128" in answer[1]


def test_without_a_control_nothing_is_said_of_one():
    assert "untrained" not in assembly.answer([], SUBJECTS, judged(load_raw=(1.7, None)))[1]


def test_numbers_are_pooled_over_training_seeds():
    def cell(mean: float) -> dict:
        return {"quality": {"summary": {"l0_token": {"mean": mean, "low": mean - 1, "high": mean + 1}}}}

    pooled = assembly._number([cell(4.0), cell(8.0)], "quality", "l0_token")
    assert pooled == {"mean": pytest.approx(6), "low": 3, "high": 9}
    assert assembly._number([cell(4.0), {"quality": {"summary": {}}}], "quality", "l0_token") is None
    assert assembly._number([], "quality", "l0_token") is None
