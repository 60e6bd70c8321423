"""What is left without a document is what the same dictionary gives on the other documents alone."""

import math

import numpy as np
import pytest
import torch

from crosscoder import Crosscoder, TopK
from crosscoder.data.residuals import find_blocks
from crosscoder.data.sources import Marked
from crosscoder.data.subject import build_subject
from crosscoder.data.tokens import TokenBlocks
from crosscoder.measure import counting
from crosscoder.measure.fidelity import SweepPoint, read_at
from crosscoder.measure.reading import load_reading, measure_dictionary, read_dictionary, save_reading
from crosscoder.measure.splice import splice_losses

DOCUMENTS = [4, 4, 7, 9, 7]  # of blocks; numbers of a larger text, one of them in two pieces


@pytest.fixture
def text():
    ids = torch.randint(0, 64, (len(DOCUMENTS), 16), generator=torch.Generator().manual_seed(0))
    return TokenBlocks(ids, vocab_size=64, documents=DOCUMENTS)


@pytest.fixture
def batches():
    """All tokens but the first of each block, in batches that cut documents."""
    token_T = torch.tensor([t for t in range(len(DOCUMENTS) * 16) if t % 16])
    x_TLD = torch.randn(len(token_T), 2, 32, generator=torch.Generator().manual_seed(1))
    outlier_TL = torch.zeros(len(token_T), 2, dtype=torch.bool)
    outlier_TL[[3, 40], 1] = True
    all_of = x_TLD, outlier_TL, ~outlier_TL.any(1), token_T
    return [Marked(*parts) for parts in zip(*(one.split(20) for one in all_of), strict=True)]


def without(batches, text, document):
    """The same batches without a document's tokens."""
    kept = [torch.from_numpy(text.document_groups[b.token_B.numpy() // 16] != document) for b in batches]
    return [Marked(*(one[k] for one in batch)) for batch, k in zip(batches, kept, strict=True)]


def test_loads_and_explained_variance(text, batches, tmp_path):
    dictionary = Crosscoder(n_layers=2, d_model=32, n_features=12, sparsity=TopK(k=2))
    reading = read_dictionary(dictionary, batches, text)
    save_reading(reading, tmp_path / "reading")
    assert (load_reading(tmp_path / "reading").explained_left_E == reading.explained_left_E).all()
    assert reading.explained_variance == pytest.approx(measure_dictionary(dictionary, batches).explained_variance)
    load_E = counting.load_left(reading, text)
    assert len(load_E) == len(reading.explained_left_E) == 3
    for document in range(3):
        alone = measure_dictionary(dictionary, without(batches, text, document))
        assert reading.explained_left_E[document] == pytest.approx(alone.explained_variance)
        alive_F = alone.probability_F[reading.index_F]
        assert load_E[document] == pytest.approx(counting.binary_entropy(alive_F).sum())


def test_many_documents_are_left_out_in_groups():
    """Whole ones, wherever their blocks lie; a text of thousands has as many numbers as one of sixty-four."""
    documents = np.random.default_rng(0).permutation(np.repeat(np.arange(200) * 3, 2))
    many = TokenBlocks(torch.zeros(400, 16, dtype=torch.int64), vocab_size=8, documents=documents)
    assert (many.n_documents, many.n_groups) == (200, 64)
    assert len(np.unique(many.document_groups)) == 64
    assert all(len(set(many.document_groups[documents == one])) == 1 for one in np.unique(documents))


def test_losses(text):
    model = build_subject(3, 32, vocab_size=64, context=16, seed=0).eval().requires_grad_(False)
    dictionary = Crosscoder(n_layers=2, d_model=32, n_features=12, sparsity=TopK(k=2))
    how = {"layers": [1, 2], "kind": "write", "ablation": "zero"}
    found = splice_losses(
        dictionary, model, list(find_blocks(model)), text[:].split(2), document_R=text.document_groups, **how
    )
    for document in range(3):
        ids = text[:][torch.from_numpy(text.document_groups != document)]
        alone = splice_losses(dictionary, model, list(find_blocks(model)), [ids], **how)
        assert found.clean["clean_loss_left"][document] == pytest.approx(alone.clean["clean_loss"])
        for key in ("spliced_loss", "ablated_loss"):
            assert found.sites["all"][f"{key}_left"][document] == pytest.approx(alone.sites["all"][key])


def test_what_is_read_at_a_fidelity():
    """Between the two dictionaries that enclose the target on the whole text, also where one of them moves past it."""
    left = {2: [[0.3, 0.18], [4, 5]], 4: [[0.12, 0.16], [8, 7]]}
    points = [SweepPoint(k, 0.8 / k**0.9, 2.0 * k, np.array(left[k]) if k in left else None) for k in (1, 2, 4, 8)]
    found = read_at(points, 0.25)
    slope = math.log(8 / 4) / math.log(0.12 / 0.3)
    assert found.left_E[0] == pytest.approx(4 * (0.25 / 0.3) ** slope)
    assert found.left_E[1] == pytest.approx(5 * (0.25 / 0.18) ** (math.log(7 / 5) / math.log(0.16 / 0.18)))
    assert read_at(points, 0.15).left_E is None  # k 8 does not say
