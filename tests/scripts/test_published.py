"""Published claims against results made up to agree, to disagree, or to lack what is asked."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from crosscoder.results.quantities import QUANTITIES
from crosscoder.results.table import LongTable, Place, rows_at

ROOT = Path(__file__).parents[2]


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("published")


@pytest.fixture
def verdicts(published):
    def judge(*parts, **variants):
        ours = published.Ours(LongTable(tuple(row for part in parts for row in part)), variants)
        return {key: comparison.verdict for key, comparison in published.compare(ours).items()}

    return judge


def cell(arm, *, site="residual", state="trained", training_seed=0, n=64, seed=0, subject="A", **values):
    at: dict[str, Any] = {
        "subject": subject,
        "training_seed": training_seed,
        "state": state,
        "site": site,
        "arm": arm,
        "role": "main",
    }
    return rows_at(Place(**at, n_features=n, k=8, seed=seed), values)


def quality(arm, ev, l0, l0_layer, dead=0.02, **place):
    numbers = {"explained_variance": ev, "l0_token": l0, "l0_token_layer": l0_layer, "dead_share": dead}
    return cell(arm, **numbers, explained_variance_per_layer=[ev] * 8, **place)


def subject(name, points=(), parameters=1000, d_model=100, n_layers=8):
    values = {"n_layers": n_layers, "d_model": d_model, "parameters_non_embedding": parameters}
    curve = {"curve_tokens": [tokens for tokens, _ in points], "curve_loss": [loss for _, loss in points]}
    return rows_at(Place(subject=name), {**values, **curve})


def test_what_is_missing_is_not_measured(verdicts):
    assert set(verdicts().values()) | set(verdicts(subject("A")).values()) == {"not measured"}


def test_crosscoder_against_bank(verdicts):
    better = verdicts(quality("crosscoder", 0.8, 20, 20), quality("layerwise", 0.7, 80, 10))
    assert better["feature-efficiency"] == "agrees"
    assert better["flop-efficiency"] == "not comparable"  # L0 a layer is 20 against 10
    matched = verdicts(quality("crosscoder", 0.6, 10, 10), quality("layerwise", 0.7, 80, 10))
    assert matched["flop-efficiency"] == "agrees"
    assert matched["feature-efficiency"] == "not comparable"  # fewer active, but explains less
    surprising = verdicts(quality("crosscoder", 0.8, 10, 10), quality("layerwise", 0.7, 80, 10))
    assert surprising["flop-efficiency"] == "disagrees"
    worse = verdicts(quality("crosscoder", 0.6, 90, 90, n=512), quality("layerwise", 0.7, 80, 10))
    assert worse["feature-efficiency"] == "disagrees"
    for found in (better, matched, surprising, worse):  # whatever was active, we had asked for it
        assert found["total-l0"] == "not comparable"


def test_dictionaries_that_differ_as_much_by_seed_are_not_told_apart(verdicts):
    bank = quality("layerwise", 0.7, 80, 10)
    above = quality("crosscoder", 0.72, 10, 10), quality("crosscoder", 0.71, 10, 10, seed=1)
    assert verdicts(*above, bank)["feature-efficiency"] == "agrees"
    around = quality("crosscoder", 0.72, 10, 10), quality("crosscoder", 0.69, 10, 10, seed=1)
    found = verdicts(*around, bank)
    assert [found[key] for key in ("feature-efficiency", "flop-efficiency")] == ["not comparable"] * 2


def test_only_dictionaries_of_one_trained_model_are_a_pair(verdicts):
    parts = quality("crosscoder", 0.8, 20, 20, training_seed=1), quality("layerwise", 0.7, 80, 10)
    assert verdicts(*parts)["feature-efficiency"] == "not measured"
    worse = quality("crosscoder", 0.6, 20, 20, training_seed=1)
    better = verdicts(quality("crosscoder", 0.8, 20, 20), worse, parts[1])
    assert better["feature-efficiency"] == "agrees"  # the worse one has no bank beside it


def test_sites_that_differ_give_no_verdict(verdicts):
    good = quality("crosscoder", 0.8, 10, 10), quality("layerwise", 0.7, 80, 10)
    bad = quality("crosscoder", 0.6, 10, 10, site="write"), quality("layerwise", 0.7, 80, 10, site="write")
    assert verdicts(*good)["flop-efficiency"] == "disagrees"
    assert verdicts(*bad)["flop-efficiency"] == "agrees"
    assert verdicts(*good, *bad)["flop-efficiency"] == "not comparable"


def test_places_that_are_not_comparable_are_counted(published):
    good = quality("crosscoder", 0.8, 20, 20), quality("layerwise", 0.7, 80, 10)
    bad = quality("crosscoder", 0.6, 20, 20, site="write"), quality("layerwise", 0.7, 80, 10, site="write")
    found = published.compare(published.Ours(LongTable(tuple(row for part in (*good, *bad) for row in part))))
    assert found["feature-efficiency"].verdict == "agrees"
    assert "not comparable in 1 of 2 places" in found["feature-efficiency"].why
    assert found["feature-efficiency"].ours.startswith("A, residual: ")


@pytest.mark.parametrize(
    ("untrained", "share", "dead", "expected"),
    [(0.65, 0.3, 0.02, ["agrees", "agrees", "not comparable"]), (0.3, 0.9, 0.4, ["disagrees"] * 3)],
)
def test_random_models_seeds_and_dead_features(untrained, share, dead, expected, verdicts):
    """Few dead features among few say nothing; many do."""
    cells = quality("layerwise", 0.7, 80, 10, dead=dead), quality("layerwise", untrained, 80, 10, state="untrained")
    found = verdicts(*cells, cell("layerwise", matched_share=share))
    assert [found[key] for key in ("random-models", "seeds", "dead")] == expected


def spread(share, cosine, acting=1.5, depth=8, **place):
    values = {"single_layer_share": 0.2, "mean_rho_share": share, "mean_adjacent_cosine": cosine, "mean_rho": 5.0}
    layers = [str(layer) for layer in range(depth)]
    return cell("crosscoder", **values, causal_layers=acting, layers=layers, **place)


@pytest.mark.parametrize(
    ("share", "cosine", "acting", "verdict"), [(0.5, 0.8, 1.5, "agrees"), (0.99, 0.999, 3.5, "disagrees")]
)
def test_spread(share, cosine, acting, verdict, verdicts):
    untrained = spread(0.9, 0.7, state="untrained")
    found = verdicts(spread(share, cosine), untrained)
    assert [found[key] for key in ("profiles", "drift")] == [verdict] * 2
    shallow = verdicts(spread(share, cosine, depth=4), untrained)
    assert shallow["profiles"] == "not comparable"
    writes = spread(share, cosine, acting, site="write"), subject("A")
    assert verdicts(*writes)["acting-layers"] == verdict


def test_layers_act_where_there_are_layers(verdicts):
    """A subject of two layers has no third one to act, and does not pull the deep one's mean down."""
    two = cell("crosscoder", site="write", subject="B", causal_layers=1.0, mean_rho=1.2), subject("B", n_layers=2)
    assert verdicts(*two)["acting-layers"] == "not comparable"
    deep = spread(0.5, 0.8, acting=2.5, site="write"), subject("A")
    assert verdicts(*two, *deep)["acting-layers"] == "disagrees"


def test_spread_is_compared_on_the_published_site_and_with_the_untrained_model(verdicts):
    found = verdicts(spread(0.5, 0.8, site="write"), spread(0.9, 0.7, site="write", state="untrained"))
    assert [found[key] for key in ("profiles", "drift")] == ["not measured"] * 2
    assert verdicts(spread(0.5, 0.8))["drift"] == "not measured"
    handed_on = verdicts(spread(0.5, 0.8), spread(0.9, 0.96, state="untrained"))
    assert handed_on["drift"] == "not comparable"


def test_shapes_are_compared_at_equal_tokens(verdicts):
    """A third subject takes no part, and a longer run is read where the shorter one ends."""
    first, third = subject("A", [(10, 4.0), (20, 3.0)]), subject("C", [(5, 9.0)])

    def against(*points, parameters=1000):
        return verdicts(first, subject("B", points, parameters), third)["shapes"]

    assert against((10, 9.0), (20, 3.05), (30, 1.0)) == "agrees"
    assert against((10, 9.0), (20, 3.2), (30, 1.0)) == "disagrees"
    assert against((10, 3.1), (40, 2.9)) == "agrees"  # 3.0 half way
    assert against((20, 3.0), parameters=2000) == "not comparable"
    assert against((21, 3.0)) == "not comparable"
    assert against() == "not measured"


@pytest.mark.parametrize(("recall", "verdict"), [(0.1, "agrees"), (0.97, "disagrees")])
def test_planted_recovery(recall, verdict, verdicts):
    worlds = [{"explained_variance": ev, "recall": r} for ev, r in ((0.9, 0.99), (0.75, recall), (0.2, 0.01))]
    rows = [rows_at(Place(role="calibration", seed=seed), world) for seed, world in enumerate(worlds)]
    merged = Place(arm="layerwise", estimator="threshold", seed=0)  # joint features, counted by a bank
    rows.append(rows_at(merged, {"explained_variance": 0.9, "recall": 0.3}))
    assert verdicts(*rows)["recovery"] == verdict


@pytest.mark.parametrize(
    ("explained", "expected"),
    [
        ((0.85, 0.92, 0.96, 0.97, 0.98), ["agrees", "agrees"]),
        ((0.85, 0.96, 0.92, 0.99, 0.98), ["disagrees", "disagrees"]),
        ((0.85, 0.92, None, 0.97, 0.98), ["agrees", "not measured"]),
    ],
)
def test_structured_crosscoders_are_held_against_both_ends(explained, expected, verdicts):
    names = ("bank", "window of 2", "window of 4", "weakly causal", "batch_topk, acausal")
    found = verdicts(**{name: ev for name, ev in zip(names, explained, strict=True) if ev is not None})
    assert [found[key] for key in ("weakly-causal", "local-windows")] == expected


def test_every_claim_can_be_judged_or_says_why_not(published):
    for key, claim in published.PUBLISHED["claims"].items():
        assert ("absent" in claim) != (key in published.RULES), key
        assert claim["checked"] in published.PUBLISHED["checked"]
        assert set(claim["ours"]) <= QUANTITIES.keys(), key
    assert published.RULES.keys() <= published.PUBLISHED["claims"].keys()


def test_the_page_is_that_of_the_committed_results(published):
    page = (ROOT / "docs" / "published.md").read_text()
    assert published.page(published.committed()) == page, "run scripts/published.py again"
