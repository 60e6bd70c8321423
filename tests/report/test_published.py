"""Published claims against results made up to agree, to disagree, or to lack what is asked."""

from pathlib import Path

import pytest

from crosscoder.report.published import CHECKED, CLAIMS, compare_published, published_table

ROOT = Path(__file__).parents[2]


def summary(**values):
    return {name: {"mean": value, "low": value, "high": value} for name, value in values.items()}


def quality(arm, ev, l0, l0_layer, n=64, state="trained", dead=0.02, site="residual"):
    layers = {"per_seed": [{"seed": 0, "explained_variance_per_layer": [ev] * 8}]}
    place = {"subject": "A", "state": state, "site": site, "arm": arm, "role": "main", "n_features": n}
    numbers = summary(explained_variance=ev, l0_token=l0, l0_token_layer=l0_layer, dead_share=dead)
    return {**place, **layers, "summary": numbers}


def results(*cells, counts=(), spread=(), subjects=None):
    sections = {"quality": cells, "counts": counts, "spread": spread}
    return {**{name: {"cells": list(part)} for name, part in sections.items()}, "subjects": subjects or {}}


def verdicts(given):
    return {key: comparison.verdict for key, comparison in compare_published(given).items()}


@pytest.mark.parametrize("given", [{}, {"quality": None}, {"quality": {"cells": []}, "subjects": {}}, results()])
def test_what_is_missing_is_not_measured(given):
    assert set(verdicts(given).values()) == {"not measured"}


def test_crosscoder_against_bank():
    better = verdicts(results(quality("crosscoder", 0.8, 20, 20), quality("layerwise", 0.7, 80, 10)))
    assert (better["feature-efficiency"], better["total-l0"]) == ("agrees", "agrees")
    assert better["flop-efficiency"] == "not comparable"  # L0 a layer is 20 against 10
    matched = verdicts(results(quality("crosscoder", 0.6, 10, 10), quality("layerwise", 0.7, 80, 10)))
    assert matched["flop-efficiency"] == "agrees"
    assert matched["total-l0"] == "not comparable"  # fewer active, but explains less
    surprising = verdicts(results(quality("crosscoder", 0.8, 10, 10), quality("layerwise", 0.7, 80, 10)))
    assert surprising["flop-efficiency"] == "disagrees"
    worse = verdicts(results(quality("crosscoder", 0.6, 90, 90, n=512), quality("layerwise", 0.7, 80, 10)))
    assert worse["feature-efficiency"] == "disagrees"
    worse = verdicts(results(quality("crosscoder", 0.6, 90, 90), quality("layerwise", 0.7, 80, 10)))
    assert worse["total-l0"] == "disagrees"


def test_sites_that_differ_give_no_verdict():
    good = quality("crosscoder", 0.8, 20, 20), quality("layerwise", 0.7, 80, 10)
    bad = quality("crosscoder", 0.6, 90, 90, site="write"), quality("layerwise", 0.7, 80, 10, site="write")
    assert verdicts(results(*good, *bad))["total-l0"] == "not comparable"


@pytest.mark.parametrize(("untrained", "verdict"), [(0.65, "agrees"), (0.3, "disagrees")])
def test_random_models(untrained, verdict):
    cells = quality("layerwise", 0.7, 80, 10), quality("layerwise", untrained, 80, 10, state="untrained")
    assert verdicts(results(*cells))["random-models"] == verdict


def test_seeds_and_dead_features():
    place = {"arm": "layerwise", "state": "trained", "role": "main"}
    pair = {"matched_share": 0.3, "pw_mcc": 0.8}
    few = results(quality("layerwise", 0.7, 80, 10), counts=[{**place, "pair": pair}])
    assert [verdicts(few)[key] for key in ("seeds", "pw-mcc", "dead")] == ["agrees"] * 3
    pair = {"matched_share": 0.9, "pw_mcc": 0.4}
    many = results(quality("layerwise", 0.7, 80, 10, dead=0.4), counts=[{**place, "pair": pair}])
    assert [verdicts(many)[key] for key in ("seeds", "pw-mcc", "dead")] == ["disagrees"] * 3
    assert verdicts(results(counts=[{**place, "pair": None}]))["seeds"] == "not measured"


def test_spread():
    def cell(layers=8, functional_rho=None, **values):
        functional = functional_rho and {"functional_rho": functional_rho, "decoder_rho": values["mean_rho"]}
        return {
            "state": "trained",
            "layers": [str(layer) for layer in range(layers)],
            "summary": summary(**values),
            "per_seed": [{"functional": functional}],
        }

    subjects = {"A": {"d_model": 100}}
    usual = {"single_layer_share": 0.2, "mean_rho_share": 0.5, "mean_adjacent_cosine": 0.8, "mean_rho": 4.0}
    given = results(spread=[cell(**usual, functional_rho=1.5)], subjects=subjects)
    assert [verdicts(given)[key] for key in ("profiles", "drift", "functional-layers")] == ["agrees"] * 3
    other = {"single_layer_share": 0.2, "mean_rho_share": 0.99, "mean_adjacent_cosine": 0.1, "mean_rho": 4.0}
    given = results(spread=[cell(**other, functional_rho=3.5)], subjects=subjects)
    assert [verdicts(given)[key] for key in ("profiles", "drift", "functional-layers")] == ["disagrees"] * 3
    assert verdicts(results(spread=[cell(4, **usual)], subjects=subjects))["profiles"] == "not comparable"


@pytest.mark.parametrize(("loss", "verdict"), [(3.05, "agrees"), (3.2, "disagrees")])
def test_shapes_are_compared_at_equal_tokens(loss, verdict):
    def subject(*points, parameters=1000):
        curve = [{"step": 1, "tokens": tokens, "held_out_loss": value} for tokens, value in points]
        return {"curve": curve, "parameters": {"non_embedding": parameters}}

    pair = {"A": subject((10, 4.0), (20, 3.0)), "B": subject((10, 9.0), (20, loss), (30, 1.0))}
    assert verdicts(results(subjects=pair))["shapes"] == verdict
    pair["B"] = subject((20, loss), parameters=2000)
    assert verdicts(results(subjects=pair))["shapes"] == "not comparable"


@pytest.mark.parametrize(("recall", "verdict"), [(0.1, "agrees"), (0.97, "disagrees")])
def test_planted_recovery(recall, verdict):
    rows = [{"explained_variance": 0.9, "recall": 0.99}, {"explained_variance": 0.75, "recall": recall}]
    assert verdicts({"rows": [*rows, {"explained_variance": 0.2, "recall": 0.01}]})["recovery"] == verdict


def test_the_page_holds_every_claim():
    page = (ROOT / "docs" / "published.md").read_text()
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.checked in CHECKED
        assert claim.figure in page, f"{claim.key}: run scripts/published.py again"
        assert claim.where in page
    lines = published_table([("one", {}), ("two", {})])
    assert len({line.count(" | ") for line in lines}) == 1
    assert lines[0].endswith("| ours: one | ours: two |")


@pytest.mark.parametrize(
    ("explained", "expected"),
    [
        ((0.85, 0.92, 0.96, 0.97, 0.98), ["agrees", "agrees"]),
        ((0.85, 0.96, 0.92, 0.99, 0.98), ["disagrees", "disagrees"]),
        ((0.85, 0.92, None, 0.97, 0.98), ["agrees", "not measured"]),
    ],
)
def test_structured_crosscoders_are_held_against_both_ends(explained, expected):
    names = ("bank", "window of 2", "window of 4", "weakly causal", "batch_topk, acausal")
    rows = [{"variant": name, "explained_variance": ev} for name, ev in zip(names, explained, strict=True)]
    found = compare_published({"table": rows})
    assert [found[key].verdict for key in ("weakly-causal", "local-windows")] == expected
