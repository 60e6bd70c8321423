"""A crosscoder over two subjects tells planted features of one subject alone from features of both."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import write_shards
from crosscoder.data.sources import Marked, StackedSource
from crosscoder.data.subject import build_subject
from crosscoder.data.tokens import TokenBlocks
from crosscoder.dictionary import stack_subjects
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cells import Cell, Stores, joint_rows, run_cell

SHARED, OWN = 16, 8  # features of both subjects, and of each one alone
HELD_OUT = 6000


class PlantedPair(StackedSource):
    """Two subjects, 3 layers of 16 and 1 of 32, with planted features."""

    n_layers, d_model, layer_counts, widths = 4, 32, (3, 1), (16, 32)
    scale_L = torch.ones(4)
    context, reads = 64, None

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        first = torch.nn.functional.normalize(torch.randn(SHARED + OWN, 1, 16, generator=generator), dim=-1)
        second = torch.nn.functional.normalize(torch.randn(SHARED + OWN, 1, 32, generator=generator), dim=-1)
        self.decoders = first.expand(-1, 3, -1), second
        energy = [3 * 16, 32]
        self.weights = [math.sqrt(sum(energy) / 2 / one) for one in energy]

    def batch(self, index, size, seed):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        firing = torch.rand(size, SHARED + 2 * OWN, generator=generator) < 3 / (SHARED + 2 * OWN)
        value = firing * (0.7 + 0.6 * torch.rand(size, SHARED + 2 * OWN, generator=generator))
        codes = value[:, : SHARED + OWN], torch.cat([value[:, :SHARED], value[:, SHARED + OWN :]], dim=1)
        parts = []
        for code, decoder, weight in zip(codes, self.decoders, self.weights, strict=True):
            x = torch.einsum("bf,fld->bld", code, decoder)
            usual = math.sqrt(len(decoder) * (3 / (SHARED + 2 * OWN)) * 1.03)
            parts.append(x / usual * math.sqrt(x.shape[2]) * weight)
        return stack_subjects(parts)

    def marked(self):
        numbers = torch.arange(HELD_OUT).split(HELD_OUT // 2)
        return iter([Marked.plain(self.batch(index, HELD_OUT // 2, 9), numbers[index]) for index in range(2)])


def pair_cell(budget, **changes):
    where = {"subject": "A", "state": "trained", "site": "write", "arm": "crosscoder", "role": "main"}
    return Cell(**{**where, "other": ("B", 0), "budget": budget, "seeds": (0,), **changes})


def test_planted_features_of_one_subject_alone_are_found():
    budget = DictionaryBudget(n_features=34, k_crosscoder=3, k_layerwise=3, steps=500, batch=512, learning_rate=1e-2)
    row = {one.key: one.value for one in joint_rows(pair_cell(budget), PlantedPair(), 0)}
    true = OWN / (SHARED + 2 * OWN)  # .25
    assert row["alive"] >= 30
    assert min(row["explained_variance_first"], row["explained_variance_second"]) > 0.9
    for name in ("exclusive_first", "exclusive_second", "hidden_first", "hidden_second"):
        assert row[name] == pytest.approx(true, abs=0.07), name


def store(folder, n_tokens):
    model = build_subject(2, 16, vocab_size=40, context=8, head_dim=4, seed=0).eval().requires_grad_(False)
    ids = torch.randint(0, 40, (12, 8), generator=torch.Generator().manual_seed(1))
    tokens = TokenBlocks(ids, vocab_size=40, documents=np.arange(12) // 2)
    write_shards(ResidualHarvester(model), tokens, folder, max_tokens=n_tokens)
    return Stores(train=folder, held_out=folder)


def test_both_subjects_must_hold_the_same_tokens(tmp_path):
    whole, part = store(tmp_path / "whole", None), store(tmp_path / "part", 40)
    pair = StackedSource([whole.source("write", "cpu"), whole.source("write", "cpu")])
    x_BLD = pair.batch(0, 16, 0)
    assert x_BLD.shape == (16, 4, 16)
    assert torch.equal(x_BLD[:, :2], x_BLD[:, 2:])
    with pytest.raises(ValueError, match=r"84 tokens, the other 42.*same tokens in the same order"):
        run_cell(pair_cell(DictionaryBudget()), [whole, part], tmp_path)


def test_a_joint_cell_has_a_name_of_its_own():
    cell = pair_cell(DictionaryBudget(n_features=160, k_crosscoder=5, k_layerwise=2))
    assert cell.name == "A0+B0-trained-write-joint-n160-k5"
    assert replace(cell, other=("A", 1), state="untrained").name == "A0+A1-untrained-write-joint-n160-k5"
    assert cell.runs == (("A", 0), ("B", 0))
    assert not cell.compared, "the verdict reads crosscoders of one subject"
