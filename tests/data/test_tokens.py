import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from crosscoder.data.prepare import pack_documents, prepare_tokens
from crosscoder.data.tokenizer import END_OF_TEXT, tokenizer_hash, train_tokenizer
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.foundation.artifact import DamagedArtifactError, committed_directory, read_json, write_json

DOCUMENTS = [
    "the cat sat on the mat",
    "a dog, the dog, ran on",
    "naïve café \U0001f600 text",
    "on and on and on",
] * 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, vocab_size=280)


def test_tokenizer_is_deterministic_reversible_and_covers_all_text(tokenizer):
    again = train_tokenizer(DOCUMENTS, vocab_size=280)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(train_tokenizer(DOCUMENTS[:2], vocab_size=280)) != tokenizer_hash(tokenizer)
    text = "unseen: Ωmega \U0001f680\n\tend"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 280
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(DOCUMENTS, vocab_size=256)


def test_packing_keeps_every_token_in_order_and_counts_the_rest(tokenizer, monkeypatch):
    monkeypatch.setattr("crosscoder.data.prepare._BATCH", 50)
    blocks = pack_documents(DOCUMENTS, tokenizer, sequence_length=7)
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in DOCUMENTS]
    flat = [token for document in ids for token in document]
    origin = [number for number, document in enumerate(ids) for _ in document]
    assert blocks.n_dropped == len(flat) % 7
    assert blocks[:].flatten().tolist() == flat[: len(flat) - len(flat) % 7]
    assert blocks.documents.tolist() == origin[::7][: len(blocks)]
    assert blocks[torch.tensor([2, 0])].tolist() == [blocks[2].tolist(), blocks[0].tolist()]


def test_text_that_spells_the_end_token_does_not_become_it(tokenizer):
    blocks = pack_documents([f"a{END_OF_TEXT}b"] * 3, tokenizer, sequence_length=2)
    flat = blocks[:].flatten().tolist()
    assert flat.count(tokenizer.eos_token_id) <= 3
    assert tokenizer.decode([token for token in flat if token != tokenizer.eos_token_id]).startswith(f"a{END_OF_TEXT}b")


def test_packing_refuses_what_it_cannot_do(tokenizer):
    with pytest.raises(ValueError, match="fewer than one block of 5000"):
        pack_documents(DOCUMENTS, tokenizer, sequence_length=5000)
    with pytest.raises(ValueError, match="sequence_length is 1"):
        pack_documents(DOCUMENTS, tokenizer, sequence_length=1)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="run from 0 to 9, expected 0 to 8"):
        TokenBlocks(np.arange(10).reshape(2, 5), vocab_size=9)
    with pytest.raises(ValueError, match="run from -1"):
        TokenBlocks(np.arange(10).reshape(2, 5) - 1, vocab_size=9)
    with pytest.raises(ValueError, match="whole numbers"):
        TokenBlocks(np.zeros((2, 5)), vocab_size=9)


def test_save_and_load_and_datasets_reads_the_same(tmp_path, tokenizer):
    blocks = pack_documents(DOCUMENTS, tokenizer, sequence_length=7)
    blocks.save(tmp_path / "t")
    loaded = TokenBlocks.load(tmp_path / "t")
    assert torch.equal(loaded[:], blocks[:])
    assert loaded.documents.tolist() == blocks.documents.tolist()
    assert loaded.fingerprint == blocks.fingerprint
    assert (loaded.vocab_size, loaded.n_dropped, loaded.sequence_length) == (280, blocks.n_dropped, 7)
    loaded[0].fill_(1)  # a copy, not the file
    assert torch.equal(loaded[:], blocks[:])
    record = json.loads((tmp_path / "t" / "tokens.json").read_text())
    assert (record["n_blocks"], record["n_documents"]) == (len(blocks), len(set(blocks.documents.tolist())))
    datasets = pytest.importorskip("datasets")
    table = datasets.load_from_disk(str(tmp_path / "t"))
    assert table["input_ids"][:] == blocks[:].tolist()


def test_blocks_in_chunks_are_the_same_as_in_one(tmp_path, monkeypatch):
    """As they are in memory, on disk, and indexed in every way; looked through a few ids at a time."""
    monkeypatch.setattr("crosscoder.data.tokens._RUN", 10)
    ids, documents = np.arange(60).reshape(12, 5), np.arange(12) // 2
    whole = TokenBlocks(ids, vocab_size=60, documents=documents)
    parts = TokenBlocks(np.split(ids, [3, 4, 10]), vocab_size=60, documents=documents)
    parts.save(tmp_path / "t")
    for blocks in (parts, TokenBlocks.load(tmp_path / "t")):
        assert (len(blocks), blocks.n_tokens) == (12, 60)
        assert blocks.fingerprint == whole.fingerprint
        for at in (0, -1, 9, slice(None), slice(1, 11, 3), slice(None, None, -2), slice(5, 5)):
            assert torch.equal(blocks[at], whole[at]), at
        for at in (torch.tensor([11, 0, 3, 3]), torch.tensor([], dtype=torch.int64)):
            assert torch.equal(blocks[at], whole[at]), at
    with pytest.raises(IndexError):
        parts[12]
    with pytest.raises(ValueError, match="run from 0 to 59, expected 0 to 58"):
        TokenBlocks(np.split(ids, 3), vocab_size=59)


def test_what_is_loaded_stays_on_disk(tmp_path):
    """Of 80 MB of ids, loading, checking and reading a few leave a few in memory."""
    rows = 20_000
    part = np.arange(rows * 200, dtype=np.int32).reshape(rows, 200) % 1000
    TokenBlocks([part] * 5, vocab_size=1000).save(tmp_path / "t")
    code = (
        "import resource, sys, numpy, pyarrow\n"
        "from crosscoder.data.tokens import TokenBlocks\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        f"blocks = TokenBlocks.load({str(tmp_path / 't')!r})\n"
        "assert len(blocks) == 100_000 and blocks[::50_000].shape == (2, 200)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40e6


def test_a_folder_without_a_record_of_its_origin_still_loads(tmp_path, corpus):
    prepared = prepare_tokens(corpus, vocab_size=270, sequence_length=8)
    prepared.save(tmp_path / "p")
    for side in ("train", "held_out"):
        with committed_directory(tmp_path / "old" / side, schema="crosscoder.tokens/1") as folder:
            for path in (tmp_path / "p" / side).iterdir():
                if path.name != "MANIFEST.json":
                    shutil.copy(path, folder)
            record = read_json(folder / "tokens.json")
            assert record.pop("origin")["context"] == 8
            write_json(folder / "tokens.json", record)
    shutil.copytree(tmp_path / "p" / "tokenizer", tmp_path / "old" / "tokenizer")
    old = PreparedTokens.load(tmp_path / "old")
    assert old.train.origin is None
    assert old.train.n_text_tokens == old.train.n_tokens
    assert old.train.fingerprint == prepared.train.fingerprint
    prepared.save(tmp_path / "old")  # the same ids, and now their record
    assert PreparedTokens.load(tmp_path / "old").train.origin == prepared.train.origin


def test_fingerprint_depends_on_everything_that_matters():
    ids = np.arange(12).reshape(2, 6)
    base = TokenBlocks(ids, vocab_size=20).fingerprint
    assert TokenBlocks(ids.copy(), vocab_size=20).fingerprint == base
    others = [
        TokenBlocks(ids.reshape(3, 4), vocab_size=20, documents=[0, 1, 1]),
        TokenBlocks(ids[::-1], vocab_size=20),
        TokenBlocks(ids, vocab_size=21),
        TokenBlocks(ids, vocab_size=20, documents=[0, 0]),
        TokenBlocks(ids, vocab_size=20, tokenizer_hash="other"),
    ]
    assert len({base, *(blocks.fingerprint for blocks in others)}) == 6


def test_a_flipped_bit_and_a_forged_record_are_refused(tmp_path, blocks):
    blocks.save(tmp_path / "t")
    arrow = next((tmp_path / "t").glob("*.arrow"))
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)
    with pytest.raises(DamagedArtifactError, match="arrow does not match"):
        TokenBlocks.load(tmp_path / "t")


def test_ids_that_are_not_those_of_the_record_are_refused(tmp_path, blocks):
    """A folder put together from two others, with a manifest that agrees."""
    blocks.save(tmp_path / "a")
    TokenBlocks(blocks[:].flip(0), vocab_size=blocks.vocab_size).save(tmp_path / "b")
    with committed_directory(tmp_path / "c", schema="crosscoder.tokens/1") as folder:
        shutil.copy(tmp_path / "a" / "tokens.json", folder)
        shutil.copy(next((tmp_path / "b").glob("*.arrow")), folder)
    with pytest.raises(DamagedArtifactError, match="do not match the fingerprint"):
        TokenBlocks.load(tmp_path / "c")


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"document {i} says {'word ' * i} and {i * i} more")
    return str(folder)


def test_prepared_tokens_round_trip_and_saving_twice_changes_nothing(tmp_path, corpus):
    prepared = prepare_tokens(corpus, vocab_size=270, sequence_length=8, held_out_fraction=0.2)
    again = prepare_tokens(corpus, tokenizer=prepared.tokenizer, sequence_length=8, held_out_fraction=0.2)
    assert again.train.fingerprint == prepared.train.fingerprint
    assert again.held_out.fingerprint == prepared.held_out.fingerprint
    prepared.save(tmp_path / "p")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")}
    again.save(tmp_path / "p")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")} == stamps
    loaded = PreparedTokens.load(tmp_path / "p")
    assert loaded.train.fingerprint == prepared.train.fingerprint
    assert loaded.tokenizer("document 3")["input_ids"] == prepared.tokenizer("document 3")["input_ids"]


def test_parts_of_different_preparations_are_refused(tmp_path, corpus):
    prepared = prepare_tokens(corpus, vocab_size=270, sequence_length=8)
    prepared.save(tmp_path / "p")
    other = prepare_tokens(corpus, vocab_size=260, sequence_length=8)
    other.train.save(tmp_path / "p" / "train")
    with pytest.raises(DamagedArtifactError, match="train was made by another tokenizer"):
        PreparedTokens.load(tmp_path / "p")


def test_prepare_needs_one_tokenizer(corpus):
    with pytest.raises(ValueError, match="either a tokenizer or the vocab_size"):
        prepare_tokens(corpus)
