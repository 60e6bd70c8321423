"""Candidates by scores rounded to bf16 in stock torch operators: for tables that C does not serve.

The same candidates as those of `prefilter`, without a certificate: only what `product` asks for, never a shortcut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.cpu import selection
from triton_kernels.cpu.lists import Candidates, keys_of, keys_reaching
from triton_kernels.cpu.prefilter import SLAB_ELEMENTS, UnsafeError
from triton_kernels.cpu.problem import Problem
from triton_kernels.reference import starts


def _in_bf16(problem: Problem) -> Problem:
    """The problem in bf16, the scale within the encoder: its z are the rounded scores."""
    weight_FN, bias_F, scale_F = problem.encoder_FN, problem.bias_F, problem.scale_F
    if scale_F is not None:
        weight_FN, bias_F = weight_FN * scale_F[:, None], bias_F * scale_F
    low = torch.bfloat16
    return Problem(problem.x_RN.to(low), weight_FN.to(low), bias_F.to(low), None, low)


def _stacked(kept: list[Tensor]) -> Candidates:
    """The marked pairs of successive slabs of rows."""
    columns = torch.cat([kept_RF.nonzero()[:, 1] for kept_RF in kept])
    counts_R = torch.cat([kept_RF.sum(1) for kept_RF in kept])
    return Candidates(columns.to(torch.int32), starts(counts_R))


def top_k(problem: Problem, k: int) -> Candidates:
    """At least k features of each row, the k best rounded scores among them."""
    kept = []
    for score_RF in _in_bf16(problem).slabs(SLAB_ELEMENTS):
        kth_R1 = score_RF.topk(k, dim=1).values[:, -1:]
        kept.append(~(score_RF < kth_R1))  # where some are NaN they stay
    return _stacked(kept)


def above(problem: Problem, threshold: float) -> Candidates:
    """Every feature whose rounded score reaches `threshold`."""
    if not threshold > 0:
        raise UnsafeError
    least = keys_reaching(torch.tensor(threshold))
    return _stacked([keys_of(score_RF) >= least for score_RF in _in_bf16(problem).slabs(SLAB_ELEMENTS)])


def batch(problem: Problem, wanted: int) -> Candidates:
    """At least `wanted` pairs, the `wanted` largest positive rounded scores of the batch among them."""
    kept, scores, bound = [], [], 0.0
    for score_RF in _in_bf16(problem).slabs(SLAB_ELEMENTS):
        if not kept:
            bound = selection.sampled_bound(score_RF, None, wanted / (problem.x_RN.shape[0] * score_RF.shape[1]))
            if not bound > 0:
                raise UnsafeError
        kept.append(keys_of(score_RF) >= keys_reaching(torch.tensor(bound)))
        scores.append(score_RF[kept[-1]])
    score_P = torch.cat(scores)
    if int((score_P >= bound).sum()) < wanted:
        raise UnsafeError
    least = score_P[selection.keep_largest(score_P, wanted)].amin()
    return _stacked(kept).only((score_P >= least).nonzero().squeeze(1))
