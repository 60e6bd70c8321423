"""N-gram tables against a definition spelt out in dictionaries; token lookup against subjects that are one."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crosscoder.data.order import batch_indices
from crosscoder.data.residuals import find_blocks
from crosscoder.data.subject import build_subject
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.origin import MismatchError
from crosscoder.measure import baselines
from crosscoder.measure.baselines import KneserNey, ngram_losses, token_lookup

VOCAB = 5


def text(n_blocks, length, seed, vocab=VOCAB):
    """Tokens that depend on the two before them; one id never occurs."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(vocab - 1, 0.4), size=(vocab - 1, vocab - 1))
    ids = rng.integers(0, vocab - 1, size=(n_blocks, length))
    rng = np.random.default_rng([seed, 1])
    for block in ids:
        for at in range(2, length):
            block[at] = rng.choice(vocab - 1, p=table[block[at - 2], block[at - 1]])
    return ids


class Reference:
    """Kneser-Ney as Chen and Goodman write it, with a dictionary for each count."""

    def __init__(self, blocks):
        self.raw = {n: Counter() for n in (1, 2, 3)}
        for block in blocks:
            for at, n in itertools.product(range(1, len(block)), (1, 2, 3)):
                if at >= n - 1:
                    self.raw[n][tuple(block[at - n + 1 : at + 1])] += 1
        self.preceded = {n: Counter(gram[1:] for gram in self.raw[n + 1]) for n in (1, 2)}

    def probability(self, history, word, *, top=True):
        counts = (self.raw if top else self.preceded)[len(history) + 1]
        lower = self.probability(history[1:], word, top=False) if history else 1 / VOCAB
        after = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == history}
        if not after:
            return lower
        of = Counter(counts.values())
        discount = of[1] / (of[1] + 2 * of[2]) if of[1] and of[2] else 0.5
        total = sum(after.values())
        return (max(after.get(word, 0) - discount, 0) + discount * len(after) * lower) / total


@pytest.mark.parametrize("n_blocks", [2, 30])  # contexts that never came; counts of which none is one
def test_tables_are_the_definition_spelt_out(n_blocks):
    train, held_out = text(n_blocks, 12, 0), text(6, 9, 1)
    held_out[0, 3] = VOCAB - 1  # an id that the training text does not have
    reference, model = Reference(train.tolist()), KneserNey(train, vocab_size=VOCAB)
    for order in (1, 2, 3):
        wanted = [
            [-math.log(reference.probability(tuple(b[max(0, at - order + 1) : at]), b[at])) for at in range(1, 9)]
            for b in held_out.tolist()
        ]
        np.testing.assert_allclose(model.nats(held_out, order), wanted, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one_after_any_context(order):
    model = KneserNey(text(4, 12, 0), vocab_size=VOCAB)
    contexts = np.array(list(itertools.product(range(VOCAB), repeat=2)))
    total = np.zeros(len(contexts))
    for word in range(VOCAB):
        total += np.exp(-model.nats(np.column_stack([contexts, np.full(len(contexts), word)]), order)[:, -1])
    np.testing.assert_allclose(total, 1)


def test_a_longer_context_pays_where_the_text_has_one():
    blocks = [TokenBlocks(text(n, 32, 3), vocab_size=VOCAB) for n in (400, 100)]
    losses = {name: loss_B.mean() for name, loss_B in ngram_losses(*blocks).items()}
    assert list(losses) == ["unigram", "bigram", "trigram"]
    table = np.random.default_rng(3).dirichlet(np.full(4, 0.4), size=(4, 4))
    held_out = blocks[1][:].numpy()
    best = -np.log(table[held_out[:, :-2], held_out[:, 1:-1], held_out[:, 2:]]).mean()
    assert best < losses["trigram"] < best + 0.06 < losses["bigram"] < losses["unigram"] < math.log(4) + 0.01
    few = ngram_losses(*blocks, seen=np.arange(5))
    assert few["trigram"].mean() > losses["trigram"] + 0.02


def test_the_blocks_that_a_subject_saw():
    seen = baselines.seen_blocks(10, batch=4, seed=3, steps=2)
    order = torch.cat([batch_indices(10, batch=4, seed=3, index=i) for i in range(2)])
    assert seen.tolist() == sorted(order.tolist())
    assert len(seen) == 8
    assert baselines.seen_blocks(10, batch=4, seed=3, steps=7).tolist() == list(range(10))


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="64-bit"):
        KneserNey(text(2, 9, 0), vocab_size=2**22)
    with pytest.raises(MismatchError, match="different tokenizers"):
        ngram_losses(TokenBlocks(text(2, 9, 0), vocab_size=5), TokenBlocks(text(2, 9, 0), vocab_size=6))
    short = TokenBlocks(text(2, 2, 0), vocab_size=VOCAB)  # whose trigrams would be bigrams, and lookup of nothing
    with pytest.raises(ValueError, match="blocks of 2 tokens hold no trigram"):
        ngram_losses(short, short)


SETTINGS = {"vocab_size": 12, "context": 10, "head_dim": 8, "seed": 0}


@pytest.fixture
def subject():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build_subject(2, 16, **SETTINGS).eval().requires_grad_(False)
        for block in model.model.layers:  # writes large enough to matter
            block.mlp.down_proj.weight.normal_(0, 0.5)
            block.self_attn.o_proj.weight.normal_(0, 0.5)
            block.self_attn.v_proj.weight.normal_(0, 0.5)
        model.lm_head.weight.normal_(0, 1)
    return model


@pytest.fixture
def tokens():
    return TokenBlocks(text(40, 10, 5, 12), vocab_size=12), TokenBlocks(text(9, 10, 6, 12), vocab_size=12)


def test_a_subject_of_the_current_token_alone_is_a_lookup(subject, tokens):
    for block in subject.model.layers:
        block.self_attn.o_proj.weight.zero_()
    found = token_lookup(subject, find_blocks(subject), *tokens)
    assert found.lookup_B == pytest.approx(found.clean_B, abs=1e-5)
    assert found.share_kept == pytest.approx(1, abs=1e-4)


def writes_of(subject, ids):
    sites = subject(ids, output_hidden_states=True).hidden_states[:-1]
    last = []
    with torch.no_grad():
        hook = subject.model.layers[-1].register_forward_hook(lambda m, a, out: last.append(out))
        subject(ids)
        hook.remove()
    sites = [*sites, last[0] if isinstance(last[0], torch.Tensor) else last[0][0]]
    return torch.stack([b - a for a, b in itertools.pairwise(sites)], dim=2).double()


@pytest.mark.parametrize("limit", [2**28, 1])  # all rows at once, and one at a time
def test_lookup_is_the_embedding_and_the_means_by_hand(subject, tokens, monkeypatch, limit):
    monkeypatch.setattr(baselines, "LOGIT_BYTES", limit)
    monkeypatch.setattr(baselines, "SMALLEST_HARM", -math.inf)
    train, held_out = (blocks[:] for blocks in tokens)
    ids, writes = train[:3], writes_of(subject, train[:3])
    sums, counts = defaultdict(lambda: 0), Counter()
    for block, at in itertools.product(range(3), range(1, 10)):
        sums[int(ids[block, at])] += writes[block, at]
        counts[int(ids[block, at])] += 1
    overall = writes[:, 1:].flatten(0, 1).mean(0)
    mean = torch.stack([sums[t] / counts[t] if counts[t] else overall for t in range(12)])
    target = held_out[:, 2:].flatten()
    losses = [F.cross_entropy(subject(held_out).logits[:, 1:-1].flatten(0, 1), target)]
    for new in (mean[held_out], overall.expand(*held_out.shape, 2, 16)):
        hidden = subject.model.norm(subject.model.embed_tokens(held_out) + new.sum(2).float())
        losses.append(F.cross_entropy(subject.lm_head(hidden)[:, 1:-1].flatten(0, 1), target))
    found = token_lookup(subject, find_blocks(subject), *tokens, seen=np.arange(3))
    clean, lookup, ablated = (loss.item() for loss in losses)
    assert all(len(one) == len(held_out) for one in (found.clean_B, found.lookup_B, found.ablated_B))
    means = found.clean_B.mean(), found.lookup_B.mean(), found.ablated_B.mean()
    assert means == pytest.approx((clean, lookup, ablated), abs=1e-5)
    assert found.share_kept == pytest.approx((ablated - lookup) / (ablated - clean), rel=1e-3)
    assert any(counts[int(token)] == 0 for token in held_out[:, 1:].flatten()), "some never came"


def test_lookup_refuses_what_it_cannot_say(subject, tokens, monkeypatch):
    blocks = find_blocks(subject)
    for block in blocks:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    assert "costs" in token_lookup(subject, blocks, *tokens).share_kept
    monkeypatch.setattr(baselines, "TABLE_BYTES", 12 * 2 * 16 * 8 - 1)
    with pytest.raises(ValueError, match="small subjects"):
        token_lookup(subject, blocks, *tokens)
    short = TokenBlocks(tokens[0][:, :2], vocab_size=tokens[0].vocab_size)
    with pytest.raises(ValueError, match="blocks of 2 tokens"):
        token_lookup(subject, blocks, short, short)
