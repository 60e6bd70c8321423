"""Batches by number, from a store or a stream: every token once an epoch, the same after any interruption."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from crosscoder.data.hooks import ModuleEnd, reading, replacing
from crosscoder.data.residuals import ResidualHarvester, estimate_scales
from crosscoder.data.shards import ActivationShards, stored_source, write_shards
from crosscoder.data.sources import Marked, ShuffledSource, SiteSource, Source, StackedSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import build_subject
from crosscoder.data.world import PlantedSource
from crosscoder.foundation.console import Progress
from crosscoder.studies.stores import Streamed

N_TOKENS = 77  # eleven blocks of eight, the first position skipped


@pytest.fixture(params=["one shard", "many shards", "writes", "stream", "streamed writes"])
def source(request, harvester, blocks, tmp_path):
    kind = "write" if "writes" in request.param else "residual"
    if "stream" in request.param:
        stream = ActivationStream(harvester, blocks, window_tokens=21)
        return SiteSource(stream, stream, kind)
    write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=100 if request.param == "one shard" else 20)
    return stored_source(tmp_path / "s", tmp_path / "s", kind)


def tags(x_BLD):
    """One number a token, the same wherever the token appears."""
    return (x_BLD.double() * torch.arange(1, x_BLD[0].numel() + 1).view(x_BLD.shape[1:])).sum((1, 2))


def epoch(source, seed, number):
    """The scaled tokens of one epoch, in order."""
    return source.batch(number, N_TOKENS, seed)


@pytest.fixture
def truth(harvester, blocks):
    return harvester.harvest(blocks[:])


def scaled_truth(source, truth):
    return (truth.diff(dim=1) if source.kind == "write" else truth[:, 1:]) * source.scale_L[:, None]


def test_every_token_comes_once_an_epoch_and_epochs_differ(source, truth):
    expected = scaled_truth(source, truth)
    assert len(tags(truth).round(decimals=5).unique()) == N_TOKENS, "tokens must be told apart"
    for number in (0, 1):
        found = epoch(source, 4, number)
        assert found.shape == (N_TOKENS, source.n_layers, source.d_model) == expected.shape
        torch.testing.assert_close(tags(found).sort().values, tags(expected).sort().values, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(epoch(source, 4, 0), epoch(source, 4, 1))
    assert not torch.allclose(epoch(source, 4, 0), epoch(source, 5, 0))


def test_batches_asked_for_in_any_order_run_on_through_epochs(source):
    epochs = torch.cat([epoch(source, 4, number) for number in range(3)])
    for index in (20, 7, 0, 8, 15, 7):  # 7 and 15 cross the end of an epoch
        assert torch.equal(source.batch(index, 10, 4), epochs[index * 10 : index * 10 + 10])
    resumed = list(source.batches(10, seed=4, steps=20)(18))
    assert len(resumed) == 2
    assert torch.equal(resumed[1], source.batch(19, 10, 4))


def test_usual_norm_is_the_root_of_the_width(source):
    norm_L = epoch(source, 0, 0).norm(dim=-1).mean(0)
    torch.testing.assert_close(norm_L, torch.full((source.n_layers,), 4.0), rtol=0.02, atol=0)


def test_held_out_tokens_come_in_the_order_of_the_text_at_the_scales_of_training(source, truth, harvester, blocks):
    torch.testing.assert_close(torch.cat(list(source.held_out())), scaled_truth(source, truth), rtol=1e-4, atol=1e-5)
    few = ActivationStream(harvester, blocks, max_tokens=10)
    other = SiteSource(few, source.train, source.kind)
    expected = scaled_truth(source, truth) / source.scale_L[:, None] * other.scale_L[:, None]
    torch.testing.assert_close(torch.cat(list(other.held_out())), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no held-out activations"):
        SiteSource(few, None, source.kind).held_out()


def stored_numbers(x_TLD, activations):
    """The number in stored order of each token of `x_TLD`."""
    stored_TN = activations.rows(0, activations.n_tokens).flatten(1)
    return torch.cdist(x_TLD.flatten(1), stored_TN).argmin(1)


@pytest.mark.parametrize("max_tokens", [None, 20])
def test_a_store_and_a_stream_of_the_same_tokens_give_the_same_batches(harvester, blocks, tmp_path, max_tokens):
    stream = ActivationStream(harvester, blocks, window_tokens=21, max_tokens=max_tokens)
    write_shards(harvester, blocks, tmp_path / "s", max_tokens=max_tokens, tokens_per_shard=20)
    store = ActivationShards.load(tmp_path / "s", window_tokens=21)
    assert store.n_tokens == stream.n_tokens == (21 if max_tokens else N_TOKENS)
    assert torch.equal(store.token_T, stream.token_T)
    other = ActivationShards.load(tmp_path / "s")  # in another order unless all is one window: not to be resumed
    assert (store.fingerprint != other.fingerprint) == (max_tokens is None)
    for kind in ("residual", "write"):
        torch.testing.assert_close(store.site_scale(kind), stream.site_scale(kind), rtol=1e-6, atol=0)
        stored, streamed = (SiteSource(each, each, kind) for each in (store, stream))
        assert stored.reads == replace(streamed.reads, scale=stored.reads.scale)
        for index in range(12):
            torch.testing.assert_close(stored.batch(index, 9, 6), streamed.batch(index, 9, 6), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat([*stored.held_out()]), torch.cat([*streamed.held_out()]))


def test_a_stream_read_in_order_harvests_each_block_once_and_resumes_with_one_window(harvester, blocks, monkeypatch):
    harvested = []
    original = ResidualHarvester.harvest

    def counted(self, ids_BS, kept_BS):
        harvested.append(len(ids_BS))
        return original(self, ids_BS, kept_BS)

    monkeypatch.setattr(ResidualHarvester, "harvest", counted)
    for ahead in (False, True):
        source = SiteSource(ActivationStream(harvester, blocks, window_tokens=21, ahead=ahead), None, "residual")
        harvested.clear()
        inorder = [source.batch(index, 7, 0) for index in range(33)]
        assert sum(harvested) in ((33,) if not ahead else (33 + 2, 33 + 3))  # ahead, the fourth epoch has begun
        if not ahead:
            for index in (20, 1, 12):
                harvested.clear()
                assert torch.equal(source.batch(index, 7, 0), inorder[index])
                assert 1 <= sum(harvested) <= 6  # the windows of at most two pools


def test_no_more_than_the_window_and_what_is_being_made_is_in_memory(harvester, blocks):
    stream = ActivationStream(harvester, blocks, window_tokens=28)
    most = 0
    for start in range(0, 3 * N_TOKENS, 7):
        stream.epoch_rows(start % N_TOKENS, start % N_TOKENS + 7, seed=0, epoch=start // N_TOKENS)
        kept = [rows for shares in stream._waiting.values() for rows in shares.values()]
        most = max(most, sum(map(len, kept)))
    assert 7 < most <= 28


def test_the_next_refill_is_harvested_meanwhile_by_as_many_threads(harvester, blocks, monkeypatch):
    seen = []
    original = ResidualHarvester.harvest

    def recorded(self, ids_BS, kept_BS):
        seen.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return original(self, ids_BS, kept_BS)

    stream = ActivationStream(harvester, blocks, window_tokens=21)
    plain = ActivationStream(harvester, blocks, window_tokens=21, ahead=False)
    monkeypatch.setattr(ResidualHarvester, "harvest", recorded)
    rows = [stream.epoch_rows(start, start + 7, seed=2, epoch=0) for start in range(0, N_TOKENS, 7)]
    assert torch.equal(torch.cat(rows), plain.epoch_rows(0, N_TOKENS, seed=2, epoch=0))
    beside = [n_threads for is_main, n_threads in seen if not is_main]
    assert len(beside) >= 8  # blocks: all but the first window
    assert set(beside) == {torch.get_num_threads()}


@pytest.mark.parametrize("quiet", [False, True])
def test_harvesting_is_told_while_others_wait_for_it(quiet, harvester, blocks, monkeypatch, capsys):
    """The first window with how much of it is there, then each refill that training has to wait for."""
    original = ResidualHarvester.harvest
    monkeypatch.setattr(ResidualHarvester, "harvest", lambda *given: time.sleep(0.02) or original(*given))
    monkeypatch.setattr("crosscoder.foundation.console.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("crosscoder.data.stream.SECONDS_UNTIL_SHOWN", 0.0)
    monkeypatch.setattr("crosscoder.data.stream.HARVEST_TOKENS", blocks.sequence_length)
    stream = ActivationStream(harvester, blocks, window_tokens=21, quiet=quiet)
    stream.epoch_rows(0, 1, seed=0, epoch=0)
    said = capsys.readouterr().err
    whole = sum(int(stream.order.count_B[stream.order.blocks(0, 0, one)].sum()) for one in stream.order.refills(0))
    assert (f"harvest of a window: {whole}/{whole} token" in said) is not quiet
    stream.epoch_rows(0, N_TOKENS, seed=0, epoch=0)
    assert ("waiting for the harvest: " in capsys.readouterr().err) is not quiet


def test_what_is_shown_may_end_while_the_thread_tells_of_it(harvester, blocks):
    class Ending(ActivationStream):
        _progress = property(lambda self: shown.pop() if shown else None, lambda self, _: None)

    shown = [Progress("", None, quiet=True)]
    assert sum(map(len, Ending(harvester, blocks).harvest(torch.arange(2)))) > 0
    assert not shown


def test_a_thread_reads_a_model_while_another_runs_it(harvester, blocks):
    """Hooks of one thread leave the runs of another alone."""
    ids = blocks[:4]
    alone = harvester.model(ids).logits
    begun = threading.Event()

    def read():
        begun.set()
        for _ in range(20):
            torch.testing.assert_close(harvester.harvest(ids), truth)

    truth = harvester.harvest(ids)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(read)
        begun.wait()
        while not done.done():
            assert torch.equal(harvester.model(ids).logits, alone)
        done.result()


def test_another_thread_passes_a_hook_by_before_torch_knows_of_its_keywords(harvester):
    module = harvester.blocks[0]
    with reading([ModuleEnd(module, "input")], pytest.fail), replacing([module], pytest.fail):
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        with ThreadPoolExecutor(1) as pool:
            assert [pool.submit(hook, module, ()).result() for hook in hooks] == [None, None]


def test_a_stream_mixes_sequences(harvester, blocks):
    stream = ActivationStream(harvester, blocks, window_tokens=77)
    order_T = stored_numbers(stream.epoch_rows(0, N_TOKENS, seed=0, epoch=0), stream)
    assert len((order_T[:14] // 7).unique()) > 2, "the tokens of a sequence must not stay together"


def test_a_folder_of_tokens_is_streamed(harvester, blocks, llama, tmp_path, monkeypatch):
    for split in ("train", "held_out"):
        blocks.save(tmp_path / split)
    monkeypatch.setattr(Streamed, "model", lambda self, device: llama)
    source = Streamed("", tmp_path, (10**6, 10), layers=(1, 2, 3)).source("write", "cpu")
    assert source.sites == (2, 3)
    assert sum(len(x_BLD) for x_BLD in source.held_out()) == 14
    stream = ActivationStream(ResidualHarvester(llama, layers=[1, 2, 3]), blocks)
    again = SiteSource(stream, None, "write")
    assert torch.equal(source.batch(3, 10, 0), again.batch(3, 10, 0))
    assert source.fingerprint == again.fingerprint
    other = ActivationStream(ResidualHarvester(llama, layers=[1, 2, 3]), blocks, window_tokens=14)
    assert len({source.fingerprint, SiteSource(stream, None, "residual").fingerprint, other.fingerprint}) == 3


def test_views_drop_the_embedding_or_take_differences(harvester, blocks, truth, tmp_path):
    write_shards(harvester, blocks, tmp_path / "s")
    residual, write = (stored_source(tmp_path / "s", None, kind) for kind in ("residual", "write"))
    assert residual.sites == write.sites == (1, 2, 3)
    torch.testing.assert_close(write.scale_L, estimate_scales(truth.diff(dim=1)))
    torch.testing.assert_close(residual.scale_L, estimate_scales(truth)[1:])
    gap = ActivationStream(ResidualHarvester(harvester.model, layers=[0, 2]), blocks)
    with pytest.raises(ValueError, match="neighbours"):
        SiteSource(gap, None, "write")
    embedding = ActivationStream(ResidualHarvester(harvester.model, layers=[0]), blocks)
    with pytest.raises(ValueError, match="no block output"):
        SiteSource(embedding, None, "residual")
    with pytest.raises(ValueError, match="kind is 'other'"):
        SiteSource(gap, None, "other")


def test_settings_that_cannot_work_are_refused(harvester, blocks, llama):
    with pytest.raises(ValueError, match="leaves nothing"):
        ActivationStream(ResidualHarvester(llama, skip_positions=8), blocks)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        ActivationStream(harvester, blocks, max_tokens=0)
    with pytest.raises(ValueError, match="batch=0"):
        SiteSource(ActivationStream(harvester, blocks), None, "residual").batch(0, 0, 0)


class Numbered(Source):
    """Batches whose number at every layer is the token's own."""

    n_layers, d_model, scale_L = 3, 2, torch.ones(3)

    def batch(self, index, size, seed):
        return torch.arange(float(size))[:, None, None].expand(size, 3, 2) + torch.tensor([0, 1000, 2000])[:, None]

    def marked(self):
        return iter([Marked.plain(self.batch(0, 512, 0), torch.arange(512))] * 2)


def test_in_the_shuffled_null_every_layer_keeps_its_vectors_and_loses_its_partners():
    source = Numbered()
    null = ShuffledSource(source, 7)
    for y in (null.batch(0, 512, 0), *null.held_out()):
        for layer in range(3):
            torch.testing.assert_close(y[:, layer, 0].sort().values, source.batch(0, 512, 0)[:, layer, 0])
        torch.testing.assert_close(y[..., 0], y[..., 1])  # vectors stay whole
        for a, b in ((0, 1), (0, 2), (1, 2)):
            together = (y[:, a, 0] % 1000 == y[:, b, 0] % 1000).float().mean()
            assert together < 0.02, "layers were permuted alike"


def test_shuffled_batches_are_functions_of_their_numbers():
    null, other = ShuffledSource(Numbered(), 7), ShuffledSource(Numbered(), 8)
    batch = null.batch(3, 512, 0)
    assert torch.equal(batch, null.batch(3, 512, 0))
    for different in (null.batch(4, 512, 0), null.batch(3, 512, 1), other.batch(3, 512, 0)):
        assert not torch.equal(batch, different)
    first, second = null.held_out()
    assert not torch.equal(first, second)
    assert torch.equal(next(null.held_out()), first)
    assert not torch.equal(next(other.held_out()), first)


def test_stacked_models_keep_their_tokens_together_and_share_the_energy(harvester, blocks):
    wide = build_subject(1, 32, vocab_size=40, context=8, head_dim=4, seed=0).eval().requires_grad_(False)
    models = harvester, ResidualHarvester(wide)
    streams = [ActivationStream(model, blocks, window_tokens=28) for model in models]
    parts = [SiteSource(stream, stream, "residual") for stream in streams]
    stacked = StackedSource(parts)
    assert (stacked.n_layers, stacked.d_model) == (4, 32)
    x_BLD = stacked.batch(1, 20, 3)
    first, second = (part.batch(1, 20, 3) * weight for part, weight in zip(parts, stacked.weights, strict=True))
    assert torch.equal(x_BLD[:, :3, :16], first)
    assert not x_BLD[:, :3, 16:].any()
    assert torch.equal(x_BLD[:, 3:], second)
    assert stacked.energy_L[:3].sum() == pytest.approx(stacked.energy_L[3:].sum()) == pytest.approx((3 * 16 + 32) / 2)
    held_out = torch.cat(list(stacked.held_out()))
    assert len(held_out) == N_TOKENS
    few = SiteSource(ActivationStream(harvester, blocks, max_tokens=20), streams[0], "residual")
    with pytest.raises(ValueError, match=r"77 tokens, the other 21.*same tokens in the same order"):
        StackedSource([parts[1], few])


def test_planted_tokens_come_again_and_are_held_out_to_the_last():
    def draw(n, stream, index):
        return torch.full((n, 2, 3), float(index)) + (100 if stream == "other" else 0)

    settings = {"scale_L": torch.ones(2), "d_model": 3, "held_out_stream": "other", "held_out_tokens": 5000}
    source = PlantedSource(draw, distinct_tokens=30, **settings)
    assert [int(x_BLD[0, 0, 0]) for x_BLD in source.batches(10, seed=0, steps=7)(1)] == [1, 2, 0, 1, 2, 0]
    assert int(PlantedSource(draw, **settings).batch(9, 10, 0)[0, 0, 0]) == 9
    assert [(len(x_BLD), int(x_BLD[0, 0, 0])) for x_BLD in source.held_out()] == [(4096, 100), (904, 101)]


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_raw_activations_have_the_outliers_that_scaled_ones_have(factor, harvester, blocks, tmp_path):
    """A dictionary that was not trained here may read raw activations, whose norms say nothing by themselves."""

    class Loud(ActivationShards):
        """As a model whose streams are this much larger, with one sink."""

        def rows(self, start, stop):
            x_TLD = factor * super().rows(start, stop)
            if start == 0:
                x_TLD[5, -1] *= 1e3
            return x_TLD

        def site_scale(self, kind):
            return super().site_scale(kind) / factor

    write_shards(harvester, blocks, tmp_path / "s")
    store = Loud.load(tmp_path / "s")
    usual, raw = (
        SiteSource(store, store, "residual", scale_L=scale) for scale in (None, torch.ones(len(store.sites) - 1))
    )
    for one, other in zip(usual.marked(), raw.marked(), strict=True):
        assert one.kept_B.tolist() == other.kept_B.tolist()
        assert torch.equal(one.outlier_BL, other.outlier_BL)
        assert (~one.kept_B).nonzero().flatten().tolist() == [5]
