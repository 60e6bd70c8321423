"""What the package shows of itself: names at the top, and objects that say what they are."""

import subprocess
import sys

import torch

import crosscoder
from crosscoder import Crosscoder, LayerwiseSAE, TopK, WeaklyCausal, train
from crosscoder.data.tokens import TokenBlocks
from crosscoder.data.world import PlantedSource
from crosscoder.foundation.origin import TextOrigin, TokenOrigin


def test_what_is_imported_later_is_there_and_costs_nothing_before():
    code = "import sys, crosscoder; before = 'crosscoder.interventions' in sys.modules; crosscoder.steer; print(before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    for name in crosscoder.__all__:
        assert getattr(crosscoder, name).__module__.startswith("crosscoder."), name


def test_objects_say_what_they_are():
    cc = Crosscoder(n_layers=2, d_model=4, n_features=8, sparsity=TopK(k=2), structure=WeaklyCausal())
    assert "2 layers x 4, 8 features, TopK(k=2)" in repr(cc)
    bank = LayerwiseSAE(n_layers=2, d_model=4, n_features=8, sparsity=TopK(k=2))
    x = torch.randn(5, 2, 4)
    assert repr(cc.encode(x)).startswith("SparseCode(5 rows of 8 features, ")
    assert repr(bank.encode(x)).startswith("SparseCode(5 x 2 rows of 8 features, ")
    result = train(cc, [x] * 3, quiet=True)
    assert repr(result).startswith("TrainResult(3 steps, 15 tokens; last: loss ")
    assert len(repr(result)) < 400
    text = TokenOrigin(tokenizer="t", context=3, text=TextOrigin(source="my_texts", content="c"))
    blocks = TokenBlocks(torch.zeros(2, 3, dtype=torch.int64), vocab_size=9, origin=text)
    assert repr(blocks) == "TokenBlocks(2 blocks of 3 tokens, 9 ids, of my_texts)"
    options = {"scale_L": torch.ones(2), "d_model": 8, "held_out_stream": 1, "held_out_tokens": 4}
    source = PlantedSource(lambda n, stream, index: torch.zeros(n, 2, 8), **options)
    assert repr(source) == "PlantedSource(2 layers x 8)"
