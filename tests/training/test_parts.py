"""A checkpoint of ranks is written and read a few numbers at a time, and its bytes are those of one process."""

import contextlib
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosscoder.dictionary import ModelCard
from crosscoder.dictionary import shard as shards
from crosscoder.dictionary.division import divided, gathered, save_whole, shard_for
from crosscoder.dictionary.shard import Shard
from crosscoder.foundation.ranks import DataRanks, Ranks
from crosscoder.training import together
from crosscoder.training.checkpoint import load_checkpoint, save_checkpoint
from crosscoder.training.parts import tensors_of
from crosscoder.training.state import MOMENTS, TrainState
from tests.divided import D, F, L, new
from tests.ranks import on_ranks

PIECE = 16


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that was made with memory of its own."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if is_real(one)}
        made = [one for one in tree_leaves(found) if is_real(one) and one.untyped_storage().data_ptr() not in given]
        self.most = max([self.most, *(one.numel() for one in made)])
        return found


def is_real(one):
    return isinstance(one, torch.Tensor) and not one.is_meta


def state_of(dictionary, *, seed=None):
    """A state, whose numbers are all drawn."""
    state = TrainState.start(dictionary, frozen="soft_decoder")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in (*dictionary.state_dict().values(), state.start_RN):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        state.firing.silent_GF += torch.arange(state.firing.silent_GF.numel()).view(state.firing.silent_GF.shape)
        for parameter in dictionary.parameters():
            moments = {name: torch.rand(parameter.shape, generator=generator) for name in MOMENTS}
            state.optimizer.state[parameter] |= {"step": torch.tensor(3.0), **moments}
    return state


def kept(ranks, folder, case, along):
    """Rank 0 writes the whole state, all ranks read their parts, write them, and read them again."""
    shards.PIECE = PIECE
    whole = state_of(new(case), seed=0)
    if ranks.is_first:
        save_checkpoint(whole, folder / "one", settings={})
        whole.dictionary.save_pretrained(folder / "one/dictionary")
    ranks.add(torch.zeros(1), "numbers")
    form, config = type(whole.dictionary), whole.dictionary.config
    part = state_of(divided(new(case), shard_for(form, config, ranks, along)))
    with Largest() as read:
        load_checkpoint(folder / "one/step-000000000", part)
    with Largest() as written:
        save_checkpoint(part, folder / "two", settings={})
    if ranks.is_first:  # in the place of another, with its card
        new(case).save_pretrained(folder / "two/dictionary", card=ModelCard())
    with contextlib.redirect_stderr(io.StringIO()) as said:
        save_whole(part.dictionary, folder / "two/dictionary")
    assert ("is the card of other weights" in said.getvalue()) == ranks.is_first
    again, own = gathered(part.dictionary), max(one.numel() for one in tensors_of(part).values())
    if ranks.is_first:
        expected = whole.dictionary.state_dict()
        assert all(torch.equal(one, expected[name]) for name, one in again.state_dict().items())
    return read.most, written.most, own


def test_ranks_that_hold_the_same_compare_it_a_piece_at_a_time(monkeypatch):
    monkeypatch.setattr(together, "PIECE", PIECE)
    data = DataRanks()
    data.size, data.largest = 2, lambda bounds, _: bounds
    state = TrainState.start(divided(new("TopK"), Shard.of(F, Ranks(data=data))))
    with Largest() as compared:
        together.require_same_replicas([state])
    assert compared.most <= -(-F * L * D // PIECE)


@pytest.mark.parametrize(
    ("case", "along"), [("JumpReLU", "features"), ("bank JumpReLU", "features"), ("bank JumpReLU", "layers")]
)
def test_no_rank_holds_more_than_its_part_and_the_files_are_those_of_one(case, along, tmp_path):
    for read, written, own in on_ranks(2, kept, tmp_path, case, along):
        assert read <= own < F * L * D
        assert written <= max(PIECE, L * D)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
