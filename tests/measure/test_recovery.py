"""Scores of a planted truth: by hand, on planted worlds, and where they must not be perfect."""

import json
import math

import numpy as np
import pytest

from crosscoder.data.world import World, WorldConfig, mean_interference_dimension
from crosscoder.measure import recovery

KINDS = ("local", "persistent", "drifting", "split", "gated")
SHAPE_OF_KIND = ("local", "persistent", "drifting", "composite", "composite")


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig(n_features=60, n_layers=4, d_model=16, kinds=KINDS))


@pytest.fixture(scope="module")
def truth(world):
    return world.decoder_FLD.numpy()


def rows(*vectors):
    """Single-layer decoders `[F, 1, D]`."""
    return np.array(vectors, dtype=np.float64)[:, None]


E1, E2, E3 = np.eye(3)


def score(found, world, truth, count=None):
    count = len(found) if count is None else count
    return recovery.score_features(found, truth, world.kind_F.numpy(), world.config.kinds, count=count)


class TestByHand:
    def test_assignment_is_one_to_one_and_counts_the_missing_as_zero(self):
        # Both found features are nearest to e1; one of them must take e2 (cosine 0.6), and e3 is left alone.
        assignment = recovery.assign(rows(E1, 0.8 * E1 + 0.6 * E2), rows(E1, E2, E3))
        np.testing.assert_array_equal(assignment.partner_F, [0, 1, -1])
        np.testing.assert_allclose(assignment.cosine_F, [1, 0.6, 0])
        assert recovery.mean_cosine(assignment) == pytest.approx(1.6 / 3)
        assert recovery.precision(assignment, 2) == 0.5

    def test_the_sum_is_what_is_largest(self):
        # Greedy would give truth 0 its best (.9) and leave truth 1 with 0; together .8 + .85 is more.
        a, b = np.array([0.9, math.sqrt(0.19), 0]), np.array([0.8, 0, 0.6])
        truth = np.stack([E1, a * 0.85 + E3 * math.sqrt(1 - 0.85**2)])[:, None]
        assignment = recovery.assign(rows(a, b), truth)
        total = assignment.cosine_F.sum()
        cosine = (truth[:, 0] / np.linalg.norm(truth[:, 0], axis=1, keepdims=True)) @ np.stack([a, b]).T
        assert total == pytest.approx(max(cosine[0, 0] + cosine[1, 1], cosine[0, 1] + cosine[1, 0]))

    def test_an_opposite_direction_is_no_partner(self):
        assignment = recovery.assign(rows(-E1), rows(E1))
        assert assignment.partner_F.tolist() == [-1]
        assert assignment.cosine_F.tolist() == [0]

    def test_per_kind(self):
        truth, kind = rows(E1, E2, E3), np.array([0, 1, 1])
        found = rows(E1, E1, E2)
        assignment = recovery.assign(found, truth)
        np.testing.assert_array_equal(recovery.recall_by_kind(assignment, kind, 3), [1, 0.5, np.nan])
        by_kind = recovery.precision_by_kind(found, truth, kind, 3, assignment)
        np.testing.assert_array_equal(by_kind, [0.5, 1, np.nan])

    @pytest.mark.parametrize(("estimate", "truth", "error"), [(110, 100, 0.1), (50, 100, -0.5), (3, 3, 0)])
    def test_relative_error(self, estimate, truth, error):
        assert recovery.relative_error(estimate, truth) == pytest.approx(error)
        assert math.isnan(recovery.relative_error(estimate, 0))

    def test_rho(self):
        # Energies 1:1 occupy two layers, 9:1 occupy 1 / (.81 + .01).
        decoder = np.array([[[1.0], [1.0]], [[3.0], [1.0]]])
        assert recovery.mean_rho(decoder) == pytest.approx((2 + 1 / 0.82) / 2)
        assert math.isnan(recovery.mean_rho(decoder[:0]))

    def test_matched_rho_error_sees_what_the_mean_hides(self):
        wide, narrow = [[1.0, 0, 0, 0], [1.0, 0, 0, 0]], [[0, 1.0, 0, 0], [0, 0.45, 0, 0]]
        truth = np.array([wide, narrow])
        # The wide one a little narrower and the narrow one a little wider, both at cosine > .9.
        found = np.array([[[1.0, 0, 0, 0], [0.6, 0, 0, 0]], [[0, 1.0, 0, 0], [0, 0.9, 0, 0]]])
        assignment = recovery.assign(found, truth)
        assert assignment.recalled_F.all()
        mean = recovery.relative_error(recovery.mean_rho(found), recovery.mean_rho(truth))
        rho = [2, 1.2025**2 / (1 + 0.45**4)], [1.36**2 / (1 + 0.6**4), 1.81**2 / (1 + 0.9**4)]
        by_hand = np.abs(np.array(rho[1]) / np.array(rho[0]) - 1).mean()
        assert recovery.matched_rho_error(found, truth, assignment) == pytest.approx(by_hand)
        assert by_hand > 2 * abs(mean)

    def test_shapes(self):
        half = math.sqrt(0.5)
        decoder = np.array(
            [
                [[1.0, 0], [0, 0], [0, 0]],
                [[1, 0], [1, 0], [0, 0]],
                [[1, 0], [half, half], [0, 1]],
                [[1, 0], [0, 1], [0, 0]],
                [[1, 0], [0, 0], [1, 0]],
            ]
        )
        named = [recovery.SHAPES[i] for i in recovery.classify_shapes(decoder)]
        assert named == ["local", "persistent", "drifting", "composite", "composite"]

    def test_confusion(self):
        local, persistent = [[1.0, 0], [0, 0]], [[0, 1.0], [0, 1.0]]
        truth = np.array([local, persistent, [[0, 0], [1.0, 0]]])
        found = np.array([[[1.0, 0], [0.1, 0]], [[0, 1.0], [0, 1.0]]])
        table = recovery.kind_confusion(found, np.array([0, 1, 0]), 2, recovery.assign(found, truth))
        np.testing.assert_array_equal(table, [[1, 0, 0, 0, 1], [0, 1, 0, 0, 0]])

    def test_saturation(self):
        assert recovery.is_saturated(95, 100)
        assert not recovery.is_saturated(94, 100)


def test_the_truth_itself_scores_perfectly_and_is_json(world, truth):
    order = np.random.default_rng(0).permutation(len(truth))
    scores = score(3.0 * truth[order], world, truth)  # neither order nor length of decoders matters
    assert scores["mcc"] == pytest.approx(1)
    assert scores["recall"] == scores["precision"] == 1
    assert set(scores["recall_by_kind"].values()) == set(scores["precision_by_kind"].values()) == {1.0}
    for error in ("count_error", "rho_error", "rho_error_matched", "d_eff_error"):
        assert scores[error] == pytest.approx(0, abs=1e-5)
    assert scores["rho_true"] == pytest.approx(world.rho_F.mean().item(), rel=1e-5)
    assert scores["d_eff_true"] == pytest.approx(mean_interference_dimension(world.decoder_FLD), rel=1e-5)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_planted_shapes_are_told_apart():
    # Wide spaces only: unrelated directions of 16 numbers are often nearly parallel.
    world = World(WorldConfig(n_features=200, n_layers=4, d_model=128, kinds=KINDS))
    shapes = recovery.classify_shapes(world.decoder_FLD.numpy())
    for index, (kind, shape) in enumerate(zip(KINDS, SHAPE_OF_KIND, strict=True)):
        assert (shapes[world.kind_F.numpy() == index] == recovery.SHAPES.index(shape)).all(), kind


def test_duplicates_cost_precision_and_count_but_not_recall(world, truth):
    scores = score(np.concatenate([truth, truth[:15]]), world, truth)
    assert scores["recall"] == 1
    assert scores["precision"] == pytest.approx(60 / 75)
    assert scores["count_error"] == pytest.approx(0.25)
    assert scores["d_eff_error"] < -0.01, "copies interfere"


def test_a_missing_kind_costs_that_kind_alone(world, truth):
    kept = world.kind_F.numpy() != 0
    scores = score(truth[kept], world, truth)
    assert scores["recall_by_kind"] == {"local": 0, "persistent": 1, "drifting": 1, "split": 1, "gated": 1}
    assert scores["precision"] == 1
    assert scores["rho_error"] > 0.1, "without the local ones the rest look wide"
    assert scores["kind_confusion"]["local"] == [0, 0, 0, 0, 12]


def test_per_layer_pieces_are_not_the_features(world, truth):
    """A bank that is never merged finds every direction of every layer, and must score badly all the same."""
    pieces = []
    for feature in truth:
        for layer in np.flatnonzero(np.linalg.norm(feature, axis=1)):
            piece = np.zeros_like(feature)
            piece[layer] = feature[layer]
            pieces.append(piece)
    scores = score(np.array(pieces), world, truth)
    assert scores["count_error"] > 1
    assert scores["rho"] == pytest.approx(1)
    assert scores["recall_by_kind"]["local"] == 1
    assert max(value for kind, value in scores["recall_by_kind"].items() if kind != "local") == 0


def test_noise_lowers_the_cosine_and_random_directions_score_near_chance(world, truth):
    rng = np.random.default_rng(0)
    scale = 0.5 / math.sqrt(truth[0].size)
    noisy = score(truth + scale * rng.standard_normal(truth.shape), world, truth)
    assert noisy["mcc"] == pytest.approx(1 / math.sqrt(1.25), abs=0.02)
    random = score(rng.standard_normal(truth.shape), world, truth)
    assert random["recall"] == 0
    assert random["mcc"] < 0.4
    assert random["rho_error"] > 0.2, "a random decoder lies on all layers alike"


def test_nothing_found_is_said_not_divided_by(world, truth):
    scores = score(truth[:0], world, truth)
    assert (scores["mcc"], scores["recall"], scores["count_error"]) == (0, 0, -1)
    assert all(math.isnan(scores[key]) for key in ("precision", "rho", "d_eff"))
