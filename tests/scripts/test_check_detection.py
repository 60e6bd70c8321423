"""Detection scores by hand: which planted feature a found one stands for, and how often it is right."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from crosscoder.measure import recovery

TRUTH = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
FOUND = np.array([[0.9, 0.1, 0.0], [-1.0, 0.0, 0.2], [0.0, 2.0, 0.0]])


@pytest.fixture
def detection(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import check_detection

    return check_detection


def test_the_sign_does_not_matter_and_two_may_share_a_planted_feature(detection):
    nearest = detection.nearest_planted(FOUND, TRUTH)
    assert nearest.tolist() == [0, 0, 1]
    assert detection.uniqueness(nearest) == pytest.approx(2 / 3)
    assert detection.uniqueness(np.array([], dtype=int)) == 0


def test_counts_by_hand(detection):
    truth = sparse.csr_array(np.array([[1.0, 0], [1, 0], [0, 1], [0, 0]]))
    code = sparse.csr_array(np.array([[0.5, 0, 0], [0, 0, 0], [0.1, 0, 2], [0, 0, 3]]))
    scores = detection.score_detection(code, truth, np.array([0, 0, 1]))
    # Found 0: one hit, one false alarm, one miss. Found 1 never fires. Found 2: one hit, one false alarm.
    assert scores.precision == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert scores.recall == pytest.approx((0.5 + 0 + 1) / 3)
    assert scores.f1 == pytest.approx((0.5 + 0 + 2 / 3) / 3)
    assert scores.accuracy == pytest.approx((2 / 4 + 2 / 4 + 3 / 4) / 3)
    with pytest.raises(ValueError, match=r"expected \[T, F\]"):
        detection.score_detection(code, truth, np.array([0, 1]))


def test_absolute_mcc_differs_from_ours_by_sign_and_by_missing_features(detection):
    assert detection.absolute_mcc(-TRUTH, TRUTH) == pytest.approx(1)
    assert recovery.mean_cosine(recovery.assign(-TRUTH[:, None], TRUTH[:, None])) == 0
    assert detection.absolute_mcc(TRUTH[:1], TRUTH) == pytest.approx(1)
    assert recovery.mean_cosine(recovery.assign(TRUTH[:1, None], TRUTH[:, None])) == pytest.approx(0.5)


def test_agrees_with_saelens(detection):
    synthetic = pytest.importorskip("sae_lens.synthetic")
    import torch

    generator = np.random.default_rng(0)
    found, truth = generator.normal(size=(12, 6)), generator.normal(size=(8, 6))
    code, acts = generator.random((200, 12)) * (generator.random((200, 12)) > 0.7), generator.random((200, 8)) > 0.8
    theirs = synthetic.compute_classification_metrics(
        *(torch.tensor(x, dtype=torch.float32) for x in (code, acts, found, truth))
    )
    nearest = detection.nearest_planted(found, truth)
    ours = detection.score_detection(sparse.csr_array(code), sparse.csr_array(acts.astype(float)), nearest)
    assert ours == pytest.approx((theirs.precision, theirs.recall, theirs.f1_score, theirs.accuracy), abs=1e-6)
    tensors = torch.tensor(found), torch.tensor(truth)
    assert detection.absolute_mcc(found, truth) == pytest.approx(synthetic.mean_correlation_coefficient(*tensors))
    assert detection.uniqueness(nearest) == pytest.approx(synthetic.feature_uniqueness(*tensors))
