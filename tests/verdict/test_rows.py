"""Statistics as rows of results."""

import numpy as np
import pytest

from crosscoder.measure.welch import group_mean
from crosscoder.results.table import Estimate
from crosscoder.verdict.legs import Contrast
from crosscoder.verdict.rows import statistic_rows


def b_over_a(b, a):
    return {"q": Contrast(((1.0, group_mean(b)), (-1.0, group_mean(a))), constant=0.5)}


def test_a_null_of_one_training_is_a_number_without_an_interval():
    found = {("trained", "fvu"): b_over_a([1.0, 2.0], [0.0, 0.5]), ("gaussian", "fvu"): b_over_a([0.3], [0.1])}
    real, null, excess = statistic_rows(found)
    assert isinstance(real.value, Estimate)
    assert null.value == pytest.approx(0.7)
    assert isinstance(null.value, float)
    assert (excess.key, excess.value) == ("null_excess", None)
    assert excess.missing == "1 training; an interval over trainings needs two"


def test_a_null_of_more_trainings_without_an_interval_has_no_number():
    copies = {("trained", "fvu"): b_over_a([1.0, 2.0], [0.0, 0.5]), ("gaussian", "fvu"): b_over_a([0.3, 0.3], [0.1])}
    assert statistic_rows(copies)[1].value is None
    few = Contrast(((1.0, group_mean([0.3, 0.5], np.ones((2, 29)))), (-1.0, group_mean([0.1, 0.2]))))  # documents
    found = {("trained", "fvu"): copies["trained", "fvu"], ("gaussian", "fvu"): {"q": few}}
    null = statistic_rows(found)[1]
    assert (null.value, null.missing) == (None, "29 documents, of which the text's variance needs 30")


def test_subjects_of_one_training_have_no_number():
    (real,) = statistic_rows({("trained", "fvu"): b_over_a([1.0], [0.0, 0.5])})
    assert (real.value, real.missing) == (None, "1 training; an interval over trainings needs two")
