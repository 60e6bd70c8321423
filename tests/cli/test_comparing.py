"""The commands that compare dictionaries and measure what their features do, on what the pipeline wrote."""

import csv
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from crosscoder import load_dictionary
from crosscoder.cli import main
from crosscoder.data.subject import load_model
from crosscoder.data.tokens import PreparedTokens
from crosscoder.foundation.artifact import read_sealed, write_sealed
from crosscoder.results.file import load_results
from tests.cli.conftest import FORTY, SMALL, K


@pytest.fixture(scope="module")
def several(pipeline):
    """A second seed, a bank, one on block writes, and one of a single layer."""
    acts, subject, tokens = (str(pipeline / name) for name in ("acts", "subject/step-62", "tokens"))
    short = [*SMALL, "--budget.steps", "40", "--budget.batch", "128"]
    for out, given in {
        "cc1": ["--activations", acts, *FORTY, "--seed", "1", "--budget.data-seed", "1"],
        "bank": ["--activations", acts, "--arm", "layerwise", *short, *K["layerwise"]],
        "writes": ["--activations", acts, "--site", "write", *FORTY],
        "last": ["--subject", subject, "--tokens-folder", tokens, "--layers", "2", *FORTY],
    }.items():
        assert main(["train", "--out", str(pipeline / out), *given]) == 0
    return pipeline


def folders(root, *names):
    return [str(root / name / "dictionary") for name in names]


def compared(root, names, out, *given):
    arguments = ["compare-dictionaries", *folders(root, *names), "--out", str(root / out), "--null-draws", "5"]
    return main([*arguments, *(given or ("--activations", str(root / "acts")))])


def test_dictionaries_of_one_text_are_compared_both_ways(several, capsys):
    assert compared(several, ("cc", "bank", "last", "cc1"), "compared") == 0
    out = several / "compared"
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    rows = load_results(out).rows
    assert len(rows.values("found_share")) == len(rows.values("found_null")) == 12
    assert rows.one("between_sites", dictionary="B", against="C") == [2]  # the layer that both read
    assert rows.one("between_sites", dictionary="A", against="B") == [1, 2]
    assert rows.one("dictionary_form", dictionary="B") == "an SAE for each layer"
    table = pq.read_table(out / "features.parquet").to_pandas()
    alive = {at.dictionary: row.value for row in rows.select("alive") for at in [row.at]}
    assert len(table) == 3 * sum(alive.values())
    shares = table.groupby(["dictionary", "other"]).correlation.agg(lambda best: (best >= 0.7).mean())
    for (a, b), share in shares.items():
        assert rows.one("found_share", dictionary=a, against=b) == pytest.approx(share)
    assert set(table[table.dictionary == "C"].layer) == {2}
    one_to_one = table[table.one_to_one]
    pairs = {(r.dictionary, r.other, r.feature, r.match) for r in one_to_one.itertuples()}
    assert pairs == {(b, a, j, i) for a, b, i, j in pairs}
    html, again = (out / "report.html").read_bytes(), several / "again"
    page, text = html.decode(), (out / "report.md").read_text()
    title = re.search("<title>(.*)</title>", page)[1]
    first = re.search('id="answer".*?<p>(.*?)</p>', page, re.DOTALL)[1]
    for letter, name in zip("ABCD", ("cc", "bank", "last", "cc1"), strict=True):
        path = folders(several, name)[0][-48:].partition("/")[2]
        assert f"{letter} (…{path})" in title
        assert f"{letter} (…{path})" in first
        assert re.search(rf'<th scope="col">.*?{letter} \(…{re.escape(path)}\)', page)
        assert f"…{path}) |" in text
    shutil.copytree(out, again)
    assert main(["report", str(again)]) == 0
    assert (again / "report.html").read_bytes() == html


def test_a_copy_is_found_whole_and_a_null_is_beside_it(several):
    assert compared(several, ("cc", "cc"), "copies") == 0
    rows = load_results(several / "copies").rows
    assert rows.values("found_share") == rows.values("partnered_share") == rows.values("written_share") == [1, 1]
    assert all(value.high < 0.5 for value in rows.values("found_null"))
    assert rows.one("found_everywhere", dictionary="A") == 1


def test_a_model_is_read_on_the_layers_that_dictionaries_need(several):
    given = ["--subject", str(several / "subject/step-62"), "--tokens-folder", str(several / "tokens")]
    assert compared(several, ("last", "writes"), "streamed", *given, "--max-held-out-tokens", "500") == 0
    assert compared(several, ("last", "writes"), "stored") == 0
    streamed, stored = (load_results(several / name).rows for name in ("streamed", "stored"))
    assert streamed.values("found_share") == pytest.approx(stored.values("found_share"), abs=0.05)
    missing = [row.missing for row in stored.select("written_share")]
    assert missing == ["the two write no layer in common"] * 2  # a stream and what a block adds to it


def test_what_does_not_belong_together_is_refused(several, own_model, tmp_path, capsys):
    other = load_dictionary(several / "cc/dictionary")
    object.__setattr__(other.reads.model, "weights", "f" * 64)
    other.save_pretrained(several / "stranger" / "dictionary")
    assert compared(several, ("cc", "stranger"), "refused") == 2
    said = capsys.readouterr().err
    assert "B (" in said
    assert "model: " in said
    assert "(ffffffff)" in said
    assert not (several / "refused").exists()
    arguments = ["harvest", "--subject", str(several / "subject/step-62"), "--tokens-folder", str(several / "tokens")]
    few = str(tmp_path / "few")
    assert main([*arguments, "--out", few, "--layers", "2", "--max-tokens", "500", "--max-held-out-tokens", "500"]) == 0
    assert compared(several, ("last", "cc"), "refused", "--activations", few) == 2
    assert "reads sites [1, 2], and of sites [2] that were harvested [1] are not among them" in capsys.readouterr().err
    assert compared(several, ("cc",), "refused") == 2
    assert "1 dictionaries are given; expected two or more" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    arguments = ["compare-dictionaries", *folders(several, "cc", "cc1"), "--activations", str(several / "acts")]
    assert main([*arguments, "--out", str(tmp_path / "mine")]) == 2
    assert "holds other things" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "dry"), "--dry-run"]) == 0
    assert "64 features, 2 layers" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


def test_a_name_that_would_be_markup_is_text(several, tmp_path):
    evil = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(several / "cc/dictionary", evil)
    arguments = ["compare-dictionaries", str(evil), str(evil), "--activations", str(several / "acts")]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--null-draws", "0"]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    assert "<img src=x" not in (tmp_path / "out" / "report.md").read_text().replace("&lt;img", "")
    assert Path(tmp_path / "out" / "figures" / "found-both-ways.png").stat().st_size > 1000


def effects(root, out, *given):
    arguments = ["effects", "--subject", str(root / "subject/step-62"), "--tokens-folder", str(root / "tokens")]
    return main([*arguments, "--out", str(root / out), "--text-rows", "40", "--draws", "2", *given])


def test_effects_are_printed_and_kept_as_data(several, capsys):
    dictionary = str(several / "cc/dictionary")
    assert effects(several, "effects", "--dictionary", dictionary, "--top", "5", "--rows", "35", "--each-layer") == 0
    *table, path = capsys.readouterr().out.strip().splitlines()
    out = several / "effects"
    assert path == str(out / "report.html")
    assert len(table) == 2 + 5 * 3  # two lines of headings; all layers, and each of two
    rows = load_results(out).rows
    lines = list(csv.DictReader((out / "effects.csv").read_text().splitlines()))
    whole = [line for line in lines if line["layer"] == "all"]
    assert len(lines) == 15
    for line in whole:
        at = {"feature": int(line["feature"]), "layer": "all"}
        assert float(line["effect_kl_active"]) > 0
        assert rows.one("steered_by", **at) == float(line["steered_by"]) > 0
        for control in ("isotropic", "activations"):
            of = at | {"kind": control}
            low, mean, high = (float(line[f"{control}_effect_kl_active{end}"]) for end in ("_low", "", "_high"))
            assert rows.one("control_kl_active", **of).value == mean
            assert low <= mean <= high
            assert rows.one("beyond_kl", **of) == (float(line["effect_kl_active"]) > high)
            highest = max(0, float(line[f"{control}_steered_promoted_high"]))
            assert line[f"{control}_beyond_steered"] == str(float(line["steered_promoted"]) > highest)
        assert re.fullmatch(r"('.*' ?|\".*\" ?){1,5}", line["effect_down"])
        assert len(rows.one("promoted_tokens", **at)) == 10
    for control in ("isotropic", "activations"):
        flags = rows.select("beyond_promoted", kind=control, layer="all").values("beyond_promoted")
        assert rows.one("beyond_promoted_share", kind=control) == sum(flags) / 5
    energies = [float(line["effect_energy"]) for line in whole]
    assert energies == sorted(energies, reverse=True)
    page = (out / "report.html").read_text()
    assert "every isotropic direction" in page
    assert "Every feature at each layer alone" in page


def test_effects_of_a_bank_and_of_named_features(several, capsys):
    dictionary = str(several / "bank/dictionary")
    assert effects(several, "of-bank", "--dictionary", dictionary, "--features", "70", "3", "--rows", "4") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["70", "3"]
    given = ["--features", "70", "3", "--rows", "4", "--json"]
    assert effects(several, "of-bank", "--dictionary", dictionary, *given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(several / "of-bank" / "report.html")
    assert [one["feature"] for one in found["features"]] == [70, 3]
    assert effects(several, "no", "--dictionary", dictionary, "--features", "128") == 2
    assert "features [128]; expected numbers from 0 to 127" in capsys.readouterr().err
    assert effects(several, "no", "--dictionary", dictionary, "--features", "3", "--by", "rate") == 2
    assert "--by would change nothing here: features are named" in capsys.readouterr().err
    assert effects(several, "no", "--dictionary", dictionary, "--layers", "1", "2") == 2
    assert "--layers would change nothing here: the dictionary's record says" in capsys.readouterr().err
    assert effects(several, "no", "--dictionary", dictionary, "--rows", "0") == 2
    assert "rows is 0, expected at least 1" in capsys.readouterr().err
    assert effects(several, "no", "--dictionary", dictionary, "--dry-run") == 0
    assert "rows of text run through the model, at most" in capsys.readouterr().out
    assert not (several / "no").exists()


def test_effects_of_another_model_s_dictionary_are_refused(several, capsys):
    arguments = ["effects", "--dictionary", str(several / "cc/dictionary"), "--tokens-folder", str(several / "tokens")]
    assert main([*arguments, "--subject", str(several / "subject/step-0"), "--out", str(several / "no")]) == 2
    assert re.search(r"the dictionary reads \S*step-62 .*give that model with --subject", capsys.readouterr().err)
    assert not (several / "no").exists()


def example(page):
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    return compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], page, "exec")


def test_the_page_on_comparing_runs(several, tmp_path, capsys):
    first, second = folders(several, "cc", "cc1")
    exec(
        example("compare-dictionaries.md"),
        {"acts": several / "acts", "first": first, "second": second, "out": tmp_path},
    )
    assert re.fullmatch(r"\d+% of A in B\n\d+% of B in A\n", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "results.json", "features.parquet"}


def test_the_page_on_effects_runs(several, capsys):
    dictionary, model = load_dictionary(several / "cc/dictionary"), load_model(several / "subject/step-62")
    exec(
        example("effects.md"),
        {"dictionary": dictionary, "model": model, "tokens": PreparedTokens.load(several / "tokens")},
    )
    line = r"feature \d+: \S+ nats, control \S+ \[\S+, \S+\]\n"
    assert re.fullmatch(line * 2, capsys.readouterr().out)


def changed_results(folder, out, change):
    """A copy of a result whose file somebody edited."""
    shutil.copytree(folder, out)
    results = read_sealed(out / "results.json")
    change(results)
    write_sealed(out / "results.json", results)
    return main(["report", str(out)])


def test_results_that_somebody_edited_are_text_or_refused(several, tmp_path, capsys):
    evil = "<script>alert(1)</script> | `x` \u202e"

    def speak(results):
        for block in results["rows"]:
            if "promoted_tokens" in block["values"]:
                block["values"]["promoted_tokens"] = [evil]

    assert effects(several, "spoken", "--dictionary", str(several / "cc/dictionary"), "--top", "1", "--rows", "2") == 0
    assert changed_results(several / "spoken", tmp_path / "spoken", speak) == 0
    page, markdown = ((tmp_path / "spoken" / name).read_text() for name in ("report.html", "report.md"))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>" not in markdown
    assert "\u202e" not in page + markdown

    def forget(results):
        for block in results["rows"]:
            block["values"].pop("found_layers", None)

    assert compared(several, ("cc", "cc1"), "forgotten") == 0
    capsys.readouterr()
    assert changed_results(several / "forgotten", tmp_path / "forgotten", forget) == 2
    assert "results.rows: found_layers of dictionary A in B is missing" in capsys.readouterr().err


def test_what_is_no_dictionary_is_told_before_a_model_is_loaded(tmp_path, capsys):
    given = ["--subject", str(tmp_path / "no model"), "--tokens-folder", str(tmp_path / "no tokens"), "--layers", "1"]
    assert main(["compare-dictionaries", str(tmp_path), str(tmp_path), *given, "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path} holds no config.json: it is no dictionary" in capsys.readouterr().err
