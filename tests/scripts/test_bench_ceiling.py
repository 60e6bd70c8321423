"""The ceiling's constant: the search by hand, the form inverted, and one small calibration."""

import math
import sys
from pathlib import Path

import pytest

from crosscoder.measure.dimension import headroom, highest_probability
from crosscoder.studies.calibration import FitConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_ceiling as ceiling
from bench_ceiling import CeilingConfig, CeilingPoint

FIT = FitConfig(steps=400, batch=256, held_out=4096)
TINY = CeilingConfig(n_layers=1, d_model=20, densities=(1.0,), seeds=(0,), fit=FIT)


@pytest.mark.parametrize(("density", "constant"), [(2.0, 3.0), (5.0, 1.0), (40.0, 0.4)])
def test_the_constant_inverts_the_ceiling(density, constant):
    p = highest_probability(density, constant)
    assert ceiling.ceiling_constant(density, p) == pytest.approx(constant)
    assert headroom(density, p / 2, constant) == pytest.approx(2)


def test_the_search_finds_the_crossing():
    for crossing in (2.5, 7.3, 20.0, 61.0):
        found, tried = ceiling.find_ceiling(lambda k, c=crossing: 0.9 - 0.01 * (k - c), most=90, wanted=0.9)
        assert found == pytest.approx(crossing)
        assert len(tried) <= 11
        assert max(k for k, recall in tried.items() if recall >= 0.9) <= crossing


def test_the_search_says_where_there_is_no_crossing():
    assert ceiling.find_ceiling(lambda k: 0.1, most=20, wanted=0.9)[0] is None
    late, _ = ceiling.find_ceiling(lambda k: 0.8 if k < 4 else 0.95 - 0.01 * k, most=20, wanted=0.9)
    assert late == pytest.approx(5)
    never, tried = ceiling.find_ceiling(lambda k: 1.0, most=20, wanted=0.9)
    assert never is None
    assert max(tried) == 20, "stopped before the whole range was seen"


def test_constants_are_averaged_by_their_logs():
    config = CeilingConfig(densities=(2.0, 4.0), seeds=(0, 1, 2))

    def point(density, seed, constant):
        p = None if constant is None else highest_probability(density, constant)
        return CeilingPoint(density, seed, 10, p, ())

    points = [point(2.0, 0, 2.0), point(4.0, 0, 8.0), point(2.0, 1, 4.0), point(4.0, 1, 4.0)]
    points += [point(2.0, 2, None), point(4.0, 2, 100.0)]
    found = ceiling.summarize_ceiling(points, config)
    assert found.constant is not None
    assert found.constant.value == pytest.approx(4), "the seed without a point at one density must not count"
    assert found.constant.low == pytest.approx(found.constant.high)
    assert found.by_density[2.0] == pytest.approx(math.sqrt(8))
    assert ceiling.summarize_ceiling(points[-2:], config).constant is None


def test_a_world_is_filled_until_it_is_not_found():
    found = ceiling.calibrate_ceiling(TINY)
    (point,) = found.points
    assert point.n_features == 20
    assert point.probability is not None
    recalls = dict(point.tried)
    assert max(recalls.values()) >= 0.9 > recalls[max(recalls)], "the search saw no crossing"
    assert found.constant is not None
    assert found.constant.value == pytest.approx(ceiling.ceiling_constant(1.0, point.probability))
    assert 1 < found.constant.value < 10
    assert any(line.startswith(f"| 1 | 20 | {point.probability:.3f} |") for line in ceiling.markdown_table(found))
    # nearly twice as dense, the same world is lost although its features fire much more rarely
    assert 0.7 * point.probability > 4 / 35
    assert ceiling.planted_recall(TINY, 35, 4, seed=0) <= 0.7


def test_a_probability_beyond_the_turn_is_refused():
    with pytest.raises(ValueError, match="up to 1 / e"):
        ceiling.ceiling_constant(2.0, 0.5)
