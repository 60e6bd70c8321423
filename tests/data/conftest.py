import numpy as np
import pytest
import torch

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.subject import build_subject
from crosscoder.data.tokens import TokenBlocks

VOCAB = 40


@pytest.fixture(scope="session")
def llama():
    return build_subject(3, 16, vocab_size=VOCAB, context=8, head_dim=4, seed=0).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def harvester(llama):
    return ResidualHarvester(llama)


@pytest.fixture(scope="session")
def blocks():
    """Eleven blocks of eight tokens, all different, so that every activation has a value of its own."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (11, 8), generator=generator)
    return TokenBlocks(ids, vocab_size=VOCAB, documents=np.arange(11) // 2)
