"""The folder of features: its files say the same, come back the same, and hold nothing that a reader could mistake."""

import json
import unicodedata

import datasets
import numpy as np
import pytest
from feature_folder import HOSTILE, made

from crosscoder.browser.folder import ASSETS, SCHEMA
from crosscoder.browser.tokens import HIDDEN, TokenTexts, visible
from crosscoder.data.tokenizer import train_tokenizer
from crosscoder.foundation.artifact import verify_directory


def test_datasets_reads_both_files(folder, tmp_path):
    home = folder.parent
    verify_directory(home, schema=SCHEMA, required=(*ASSETS, "features.parquet", "examples.parquet", "features.json"))
    given = {"split": "train", "cache_dir": str(tmp_path)}
    features = datasets.load_dataset("parquet", data_files=str(home / "features.parquet"), **given)
    examples = datasets.load_dataset("parquet", data_files=str(home / "examples.parquet"), **given)
    assert features["feature"] == list(range(300))
    record = json.loads((home / "features.json").read_text())
    assert record["alive"] == sum(fired > 10 for fired in features["fired"]) == 263
    assert record["sites"] == [5, 6, 7, 8]
    one = examples[0]
    assert one["tokens"][one["peak"]] in HOSTILE  # as it is, for whoever computes
    assert one["activations"][one["peak"]] == pytest.approx(one["activation"])
    assert np.shape(one["layer_parts"]) == (len(one["ids"]), 4)
    assert {row["kind"] for row in examples} == {"strongest", "quantile"}
    bands = {row["band"] for row in examples if row["feature"] == 3 and row["kind"] == "quantile"}
    assert bands == {0, 1, 2, 3}


def test_scripts_are_plain_ascii_and_hold_no_markup_that_could_end_them(folder):
    for path in folder.parent.glob("data-*.js"):
        text = path.read_text(encoding="ascii")
        assert text.startswith(f'crosscoder.put("{path.stem.removeprefix("data-")}",')
        assert text.count("\n") == 1
    page = folder.read_text()
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in page
    assert "unsafe" not in page
    code = (folder.parent / "browser.js").read_text()
    for word in ("innerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "XMLHttpRequest", "http"):
        assert word not in code.replace("http://www.w3.org/2000/svg", ""), word


def test_the_same_findings_give_the_same_bytes_and_replace_an_older_folder(tmp_path):
    first = made(tmp_path / "a", 20).parent
    kept = {path.name: path.read_bytes() for path in first.iterdir()}
    again = made(tmp_path / "a", 20).parent
    assert {path.name: path.read_bytes() for path in again.iterdir()} == kept
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not ours to replace"):
        made(tmp_path / "b", 20)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["thesis.txt"]


def test_nothing_that_is_shown_is_unseen_or_moves_other_text():
    for text in HOSTILE:
        assert not any(unicodedata.category(c) in HIDDEN for c in visible(text))
    assert visible("a\u202eb\n\tc\x00") == "a⟨U+202E⟩b⏎⇥c⟨U+0000⟩"
    assert visible(" Größe 模型 <b>") == " Größe 模型 <b>"


def test_tokens_have_their_spaces_and_parts_of_characters_their_names():
    tokenizer = train_tokenizer(["the river 模型 the river"], vocab_size=268)
    texts = TokenTexts(tokenizer)
    ids = tokenizer("the river 模", add_special_tokens=False)["input_ids"]
    assert "".join(texts.of(ids)).startswith("the river")
    assert texts.of(tokenizer(" r", add_special_tokens=False)["input_ids"])[0].startswith(" ")
    assert not any("\ufffd" in one for one in texts.of(ids))
    assert texts[10_000] == ""
