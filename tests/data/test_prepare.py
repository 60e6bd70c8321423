"""From documents to token blocks: the split, BOS, markup, ids that are given, memory, and what is recorded."""

import json
import random
import re
import subprocess
import sys

import pytest
import torch
from tokenizers import AddedToken, processors
from transformers import LlamaConfig, LlamaForCausalLM

from crosscoder.data import prepare
from crosscoder.data.model_loss import describe_policies, loss_of_policies
from crosscoder.data.prepare import pack_documents, prepare_tokens
from crosscoder.data.split import split_documents
from crosscoder.data.text import Documents
from crosscoder.data.tokenizer import find_bos, own_bos, special_ids, tokenizer_hash, train_tokenizer
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.foundation.origin import TokenOrigin

WORDS = re.findall(r"\w+", "the cat sat on a mat and saw one dog run past two old red barns by a slow wide river")


def sentences(n, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 30))) for _ in range(n)]


def with_bos(vocab_size=300):
    """A tokenizer of our own that puts `<bos>` before a text, and has markup for chats."""
    tokenizer = train_tokenizer(sentences(50), vocab_size=vocab_size)
    tokenizer.add_tokens([AddedToken("<bos>", special=True), AddedToken("<|turn|>", special=True)])
    tokenizer.bos_token = "<bos>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return with_bos()


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.txt"
    path.write_text("\n\n".join(sentences(200)))
    return str(path)


def test_a_single_file_is_split_by_its_blocks(page, tokenizer):
    """In batches or at once, with a new tokenizer or a given one, the split is that of `split_documents`."""
    documents = sentences(200)
    train, held_out = split_documents(documents, held_out_fraction=0.1, seed=3)
    found = prepare_tokens(page, tokenizer=tokenizer, sequence_length=16, held_out_fraction=0.1, seed=3, bos=False)
    for blocks, texts in ((found.train, train), (found.held_out, held_out)):
        expected = pack_documents(texts, tokenizer, sequence_length=16)
        assert blocks.fingerprint == expected.fingerprint
        assert blocks.n_dropped == expected.n_dropped
    trained = prepare_tokens(page, vocab_size=290, sequence_length=16, held_out_fraction=0.1, seed=3)
    assert trained.train.tokenizer_hash == tokenizer_hash(train_tokenizer(train, vocab_size=290))


@pytest.mark.parametrize("batch", [1, 300, 10**6])
def test_batches_change_nothing(page, tokenizer, batch, monkeypatch):
    expected = prepare_tokens(page, tokenizer=tokenizer, sequence_length=16)
    own = prepare_tokens(page, vocab_size=290, sequence_length=16)
    monkeypatch.setattr(prepare, "_BATCH", batch)
    again = prepare_tokens(page, tokenizer=tokenizer, sequence_length=16)
    assert again.train.fingerprint == expected.train.fingerprint
    assert again.held_out.fingerprint == expected.held_out.fingerprint
    assert again.train.origin == expected.train.origin
    assert prepare_tokens(page, vocab_size=290, sequence_length=16).train.fingerprint == own.train.fingerprint


def test_bos_is_put_where_the_tokenizer_itself_puts_it(page, tokenizer):
    found = prepare_tokens(page, tokenizer=tokenizer, sequence_length=16)
    without = prepare_tokens(page, tokenizer=tokenizer, sequence_length=15, bos=False)
    begin = tokenizer.bos_token_id
    for blocks, plain in ((found.train, without.train), (found.held_out, without.held_out)):
        assert (blocks[:][:, 0] == begin).all()
        assert not (blocks[:][:, 1:] == begin).any()
        assert torch.equal(blocks[:][:, 1:], plain[:])
        assert blocks.n_text_tokens == plain.n_tokens == plain.n_text_tokens
        assert (blocks.origin.bos, plain.origin.bos) == (begin, None)
        assert blocks.documents.tolist() == plain.documents.tolist()
    own = prepare_tokens(page, vocab_size=290, sequence_length=16)
    assert own.train.origin.bos is None
    assert prepare_tokens(page, vocab_size=290, sequence_length=16, bos=True).train[0][0] == 0


def test_bos_is_found_by_what_the_tokenizer_does_and_not_by_its_name(tokenizer):
    plain = train_tokenizer(sentences(5), vocab_size=260)
    assert own_bos(plain) is None
    assert find_bos(plain, True) == plain.bos_token_id
    plain.bos_token = None
    with pytest.raises(ValueError, match="has no BOS token to begin blocks with; leave out --bos"):
        find_bos(plain, True)
    assert (own_bos(tokenizer), find_bos(tokenizer), find_bos(tokenizer, False)) == (300, 300, None)
    both, behind = with_bos(), with_bos()
    both.bos_token = None  # as [CLS] of tokenizers that call it so
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <|turn|>", special_tokens=[("<bos>", 300), ("<|turn|>", 301)]
    )
    assert own_bos(both) == 300
    behind.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <bos>", special_tokens=[("<bos>", 300)]
    )
    assert own_bos(behind) is None


def test_markup_is_text_unless_asked_for(tmp_path, tokenizer):
    turns = "\n\n".join(f"<|turn|>{sentence}" for sentence in sentences(40))
    (tmp_path / "chat.txt").write_text(turns)
    found = [
        prepare_tokens(str(tmp_path / "chat.txt"), tokenizer=tokenizer, sequence_length=16, special_tokens=kept)
        for kept in (False, True)
    ]
    assert [int((one.train[:] == 301).sum() > 0) for one in found] == [0, 1]
    assert [one.train.origin.special_tokens for one in found] == [False, True]
    assert "<|turn|>" in tokenizer.decode(found[0].train[:][:, 1:].flatten().tolist())
    assert found[0].train.origin.special_ids == special_ids(tokenizer) == (0, 300, 301)


def test_ids_that_are_given_are_taken_as_they_are(page, tokenizer, tmp_path):
    """With a BOS and an end token of their own or without, they become the blocks of the text itself."""
    expected = prepare_tokens(page, tokenizer=tokenizer, sequence_length=16)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in sentences(200)]
    for name, before, behind in (("bare", [], []), ("whole", [300], [0])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"input_ids": [*before, *row, *behind]}) + "\n" for row in rows))
        documents = Documents(str(path), column="input_ids")
        found = prepare_tokens(documents, tokenizer=tokenizer, sequence_length=16)
        flat = torch.cat([found.train[:][:, 1:], found.held_out[:][:, 1:]]).flatten()
        wanted = torch.cat([expected.train[:][:, 1:], expected.held_out[:][:, 1:]]).flatten()
        assert abs(len(flat) - len(wanted)) < 64  # other documents are held out, and so other ends are dropped
        assert found.train.origin.text.column == "input_ids"
    with pytest.raises(ValueError, match="mean nothing without the tokenizer"):
        prepare_tokens(Documents(str(path), column="input_ids"), vocab_size=280)
    path.write_text(json.dumps({"input_ids": [1, 2]}) + "\n" + json.dumps({"input_ids": [302]}))
    with pytest.raises(ValueError, match="row 1: token id 302 is outside the tokenizer's 0 to 301"):
        prepare_tokens(Documents(str(path), column="input_ids"), tokenizer=tokenizer)


@pytest.mark.parametrize("rows", [([1, 2], "1234"), ("text", [1, 2])])
def test_a_column_of_text_and_of_ids_is_refused(rows, tokenizer, tmp_path):
    """The digits of a text are no token ids."""
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="text in some rows and token ids in others"):
        prepare_tokens(str(path), tokenizer=tokenizer, sequence_length=4)


@pytest.mark.parametrize("given", [{"vocab_size": 290}, {"tokenizer": None}])
def test_a_text_of_one_document_is_cut_at_its_end(tmp_path, given, capsys):
    (tmp_path / "a.txt").write_text("\n".join(sentences(100)))
    given = given if "vocab_size" in given else {"tokenizer": with_bos()}
    found = prepare_tokens(str(tmp_path / "a.txt"), sequence_length=8, held_out_fraction=0.2, bos=False, **given)
    assert "the text is one document; its end is held out" in capsys.readouterr().err
    assert found.train.origin.text.n_documents == 1
    texts = [found.tokenizer.decode(blocks[:].flatten().tolist()) for blocks in (found.train, found.held_out)]
    assert texts[0].startswith(sentences(100)[0])
    assert texts[1].split("\n")[0] in sentences(100)[70:90]
    assert sentences(100)[99] not in texts[0]


def test_tokens_that_end_before_any_held_out_document_are_said_to(tmp_path):
    """With a new tokenizer the split is that of all the text that it was trained on."""
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(sentences(40)) + str(i)}) + "\n" for i in range(40)))
    given = {"vocab_size": 290, "sequence_length": 8, "held_out_fraction": 0.03}
    with pytest.raises(ValueError, match="--max-tokens 300 is reached after 1 documents, none of which is held out"):
        prepare_tokens(str(path), max_tokens=300, **given)


def test_max_tokens_stops_reading_with_the_document_that_reaches_it(page, tokenizer):
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in sentences(200)]
    for given in ({"tokenizer": tokenizer, "bos": False}, {"vocab_size": 290}):
        found = prepare_tokens(page, sequence_length=8, max_tokens=1000, **given)
        total = sum(blocks.n_tokens + blocks.n_dropped for blocks in (found.train, found.held_out))
        assert 1000 <= total < 1000 + 2 * max(lengths)
        assert found.train.origin.text.n_documents < 200
    assert sum(lengths[: found.train.origin.text.n_documents]) > 500


def test_what_the_tokens_are_made_of_is_recorded_and_kept(page, tokenizer, tmp_path):
    found = prepare_tokens(page, tokenizer=tokenizer, sequence_length=16, name="org/model", folder=tmp_path / "p")
    origin = PreparedTokens.load(tmp_path / "p").held_out.origin
    assert origin == found.train.origin
    assert (origin.name, origin.context, origin.bos) == ("org/model", 16, 300)
    assert origin.tokenizer == tokenizer_hash(tokenizer)
    assert (origin.text.source, origin.text.n_documents, origin.text.skipped) == (page, 200, {})
    assert not list((tmp_path / "p").glob(".*"))
    with open(page, "a") as file:
        file.write("\n\nmore")
    assert prepare_tokens(page, tokenizer=tokenizer).train.origin.text.content != origin.text.content


def test_a_folder_that_holds_something_else_is_refused_before_the_work(page, tmp_path, monkeypatch):
    (tmp_path / "p" / "train").mkdir(parents=True)
    (tmp_path / "p" / "train" / "mine").write_text("keep")
    monkeypatch.setattr(prepare, "_encode", None)
    with pytest.raises(FileExistsError, match="not ours to replace"):
        prepare_tokens(page, vocab_size=290, folder=tmp_path / "p")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["train"]


def test_too_little_text_leaves_an_older_folder_as_it_was(page, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    old = prepare_tokens(page, tokenizer=tokenizer, sequence_length=16, folder=tmp_path / "p")
    with pytest.raises(
        ValueError, match=r"held-out documents give \d+ tokens, fewer than one block of 1023.*--context"
    ):
        prepare_tokens(page, tokenizer=tokenizer, sequence_length=1024, folder=tmp_path / "p")
    with pytest.raises(ValueError, match="fewer than one block"):  # with a tokenizer of its own, too
        prepare_tokens(page, vocab_size=280, sequence_length=1024, folder=tmp_path / "p")
    assert PreparedTokens.load(tmp_path / "p").train.fingerprint == old.train.fingerprint
    with pytest.raises(ValueError, match="neither a file or folder"):
        prepare_tokens("no/such-text", vocab_size=280, folder=tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["p"]


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Twenty-five times the text takes hardly more memory; all of it at once would take hundreds of megabytes."""
    page = " ".join(sentences(20))
    for times in (1, 25):
        (tmp_path / f"{times}.txt").write_text("".join(f"{i}: {page}\n\n" for i in range(times * 100)))
    code = (
        "import resource, sys\nfrom crosscoder.data import prepare\nprepare._BATCH = 100_000\n"
        "for text, folder in (sys.argv[1:3], sys.argv[3:5]):\n"
        "    prepare.prepare_tokens(text, vocab_size=300, folder=folder)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    paths = [str(tmp_path / name) for name in ("1.txt", "out-1", "25.txt", "out-25")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    small, large = map(float, done.stdout.split())
    assert large - small < 40


class Counting(LlamaForCausalLM):
    """A model whose loss is known: certain of the token one higher when it has seen BOS at the start, else of none."""

    def forward(self, input_ids, **_):
        logits = torch.zeros(*input_ids.shape, 50)
        seen = input_ids[:, 0] == 40
        logits[seen] = 20 * torch.nn.functional.one_hot((input_ids[seen] + 1) % 50, 50).float()
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("used", [True, False])
def test_the_loss_is_of_text_alone_and_a_better_policy_is_named(used):
    model = Counting(LlamaConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    text = torch.arange(10)[None] + torch.arange(20)[:, None]
    text[:, 5] = 41  # a special token: neither it nor what follows from it is known, and only the latter counts
    ids = torch.cat([torch.full((20, 1), 40), text], dim=1) if used else text
    origin = TokenOrigin(tokenizer="t", bos=40 if used else None, special_ids=(40, 41), context=ids.shape[1])
    blocks = TokenBlocks(ids, vocab_size=50, origin=origin)
    losses = loss_of_policies(model, blocks, bos=40)
    n_counted = 8 if used else 7
    assert losses[False] == pytest.approx(torch.tensor(50.0).log().item())
    assert losses[True] == pytest.approx(20 / n_counted, rel=1e-3)  # wrong once, after the special token
    said = describe_policies(losses, with_bos=used)
    assert said.startswith(f"held-out loss of the model: {losses[used]:.3f} nats/token with{'' if used else 'out'} BOS")
    assert ("warning" in said) == (not used)
    assert ("--bos" in said) == (not used)
    assert loss_of_policies(model, blocks, bos=None).keys() == {False}
