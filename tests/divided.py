"""Dictionaries of every kind that ranks may divide, small ones, and how they are trained."""

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, TopK
from crosscoder.dictionary import Diffing, ReLU, WeaklyCausal
from crosscoder.dictionary.shard import Shard
from crosscoder.dictionary.sparsity import L0Penalty, TanhPenalty
from crosscoder.foundation.ranks import Ranks
from crosscoder.training import TrainConfig

B, L, D, F, STEPS = 32, 3, 8, 29, 8
DATA = [torch.randn(B, L, D, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]
DATA[3] = DATA[3][:21]  # batches need not be of one size
CONFIG = TrainConfig(
    steps=STEPS,
    log_every=1,
    dead_after_tokens=64,
    warmup_steps=2,
    learning_rate=3e-3,
    grad_clip=0.05,
    checkpoint_every=2,
)
CASES = {
    "TopK": (Crosscoder, {"sparsity": TopK(k=4)}),
    "BatchTopK": (Crosscoder, {"sparsity": BatchTopK(k=4)}),
    "k above a shard": (Crosscoder, {"sparsity": TopK(k=17)}),
    "bank TopK": (LayerwiseSAE, {"sparsity": TopK(k=3)}),
    "bank BatchTopK": (LayerwiseSAE, {"sparsity": BatchTopK(k=3)}),
    "few of many dead": (LayerwiseSAE, {"sparsity": BatchTopK(k=1), "aux_k": 2}),
    "weighed, free": (Crosscoder, {"sparsity": BatchTopK(k=4), "selection_weight": "l2", "decoder": "free"}),
    "nested": (Crosscoder, {"sparsity": BatchTopK(k=4), "prefixes": (0.25, 0.5)}),
    "nested TopK": (LayerwiseSAE, {"sparsity": TopK(k=2), "prefixes": (0.5,)}),
    "JumpReLU": (Crosscoder, {"sparsity": JumpReLU()}),
    "bank JumpReLU": (LayerwiseSAE, {"sparsity": JumpReLU()}),
    "ReLU": (Crosscoder, {"sparsity": ReLU(), "decoder": "free"}),
    "weakly causal": (Crosscoder, {"sparsity": BatchTopK(k=4), "structure": WeaklyCausal()}),
    "diffing": (Crosscoder, {"sparsity": TopK(k=4), "structure": Diffing((1, 2), (8, 6), (0.25, 0.25))}),
    "shared": (LayerwiseSAE, {"sparsity": BatchTopK(k=3), "shared": True}),
    "bank ReLU": (LayerwiseSAE, {"sparsity": ReLU(penalty=TanhPenalty()), "decoder": "free"}),
    "bank L0": (LayerwiseSAE, {"sparsity": JumpReLU(penalty=L0Penalty())}),
}
BANKS = [case for case, (form, settings) in CASES.items() if form is LayerwiseSAE and "shared" not in settings]


def new(case):
    form, settings = CASES[case]
    dictionary = form(n_layers=L, d_model=D, n_features=F, **settings)
    if case == "bank L0":  # with a centre in one layer, which says of all that they are not to be set
        dictionary.decoder_bias.data[0] = 0.1
    return dictionary


def of_rank(rank, stops, along="features"):
    ranks = Ranks()
    ranks.rank, ranks.size = rank, len(stops)
    return Shard(stops, ranks, along)


def assert_close(metrics, wanted, what="", tolerance=1e-6):
    for entry, one in zip(metrics, wanted, strict=True):
        assert entry.keys() == one.keys()
        for name, value in one.items():
            if name == "explained_variance":  # a difference: what is left unexplained has the accuracy
                entry, value = {**entry, name: 1 - entry[name]}, 1 - value
            assert entry[name] == pytest.approx(value, rel=tolerance), (what, entry["step"], name)
