import itertools
import json

import pytest
import torch

from crosscoder.data import shards as shards_module
from crosscoder.data.residuals import ResidualHarvester, estimate_scales
from crosscoder.data.shards import ActivationShards, store_fingerprint, write_shards
from crosscoder.data.store import ReplayableBuffer
from crosscoder.foundation.artifact import DamagedArtifactError

N_TOKENS = 77  # eleven blocks of eight, the first position skipped


@pytest.fixture(params=["buffer", "one shard", "many shards", "memory", "writes", "buffer writes"])
def source(request, harvester, blocks, tmp_path):
    match request.param:
        case "buffer":
            return ReplayableBuffer(harvester, blocks, sequences_per_refill=3)
        case "buffer writes":
            return ReplayableBuffer(harvester, blocks, sequences_per_refill=3).view("write")
        case "one shard":
            return write_shards(harvester, blocks, tmp_path / "s")
    store = write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    match request.param:
        case "many shards":
            return store
        case "memory":
            return ActivationShards.load(tmp_path / "s", in_memory=True)
        case "writes":
            return store.view("write")


def tags(x_BLD):
    """One number a token, the same wherever the token appears."""
    return (x_BLD.double() * torch.arange(1, x_BLD[0].numel() + 1).view(x_BLD.shape[1:])).sum((1, 2))


def same_tokens(x_BLD, y_BLD):
    return torch.allclose(tags(x_BLD).sort().values, tags(y_BLD).sort().values, rtol=1e-4, atol=1e-4)


@pytest.fixture
def truth(harvester, blocks):
    return harvester.harvest(blocks[:]).x_TLD


def test_every_token_once_an_epoch_and_epochs_differ(source, truth):
    epochs = [torch.cat(list(source.batches(10, seed=4, epoch=epoch))) for epoch in (0, 1)]
    expected = truth.diff(dim=1) if source.n_layers == 3 else truth
    for x_BLD in epochs:
        assert x_BLD.shape == (N_TOKENS, source.n_layers, source.d_model) == (source.n_tokens, *x_BLD.shape[1:])
        assert same_tokens(x_BLD, expected * source.scale_L[:, None])
    assert len(tags(truth).round(decimals=5).unique()) == N_TOKENS, "tokens must be told apart"
    assert not torch.allclose(epochs[0], epochs[1])


def test_order_follows_the_seed_alone(source):
    first = list(source.batches(10, seed=4))
    assert [len(x_BLD) for x_BLD in first] == [10] * 7 + [7]
    for x_BLD, again in zip(first, source.batches(10, seed=4)):
        assert torch.equal(x_BLD, again)
    assert not torch.allclose(first[0], next(source.batches(10, seed=5)))


def test_starting_anywhere_equals_not_having_stopped(source):
    whole = list(source.batches(10, seed=4, epoch=2))
    for start in (7, 1, 4):
        resumed = list(source.batches(10, seed=4, epoch=2, start=start))
        assert len(resumed) == 8 - start
        assert all(torch.equal(x_BLD, y_BLD) for x_BLD, y_BLD in zip(resumed, whole[start:]))


def test_global_batches_run_on_through_epochs_in_any_order(source):
    epochs = torch.cat([x for epoch in range(3) for x in source.batches(10, seed=4, epoch=epoch)])
    for index in (20, 7, 0, 8, 15, 7):  # 7 and 15 cross the end of an epoch
        assert torch.equal(source.batch(index, 10, 4), epochs[index * 10 : index * 10 + 10])


def test_usual_norm_is_the_root_of_the_width(source):
    x_BLD = torch.cat(list(source.batches(16, seed=0)))
    torch.testing.assert_close(x_BLD.norm(dim=-1).mean(0), torch.full((source.n_layers,), 4.0), rtol=0.02, atol=0)


def test_a_shuffled_batch_mixes_sequences(harvester, blocks, tmp_path):
    """A store shuffles over all of its tokens, not within a shard."""
    store = write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    plain = tags(store.rows(0, N_TOKENS))
    batch = tags(next(store.batches(30, seed=0)) / store.scale_L[:, None])
    numbers = (batch[:, None] - plain[None]).abs().argmin(1)
    assert len((numbers // 20).unique()) == 4
    assert not torch.equal(numbers, numbers.sort().values)


def test_a_refill_is_shuffled_anew_each_time(harvester, blocks, truth):
    buffer = ReplayableBuffer(harvester, blocks, sequences_per_refill=11)
    plain = tags(truth)

    def sequences(seed, epoch):
        raw = next(buffer.batches(N_TOKENS, seed=seed, epoch=epoch)) / buffer.scale_L[:, None]
        return (tags(raw)[:, None] - plain[None]).abs().argmin(1) // 7

    assert len(sequences(0, 0)[:14].unique()) > 2, "the tokens of a sequence must not stay together"
    ranks = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        numbers = sequences(seed, epoch)
        appearance = {number: rank for rank, number in enumerate(dict.fromkeys(numbers.tolist()))}
        ranks.append([appearance[number] for number in numbers.tolist()])
    assert ranks[0] != ranks[1] != ranks[2] != ranks[0]


def test_reading_in_order_harvests_each_sequence_once(harvester, blocks, monkeypatch):
    buffer = ReplayableBuffer(harvester, blocks, sequences_per_refill=3)
    counted = []
    original = ResidualHarvester.harvest
    monkeypatch.setattr(ResidualHarvester, "harvest", lambda self, ids: counted.append(len(ids)) or original(self, ids))
    list(itertools.islice((buffer.batch(index, 10, 0) for index in range(100)), 7))
    assert sum(counted) == 11
    counted.clear()
    ReplayableBuffer(harvester, blocks, sequences_per_refill=3, scale_L=torch.ones(4)).batch(5, 5, 0)
    assert sum(counted) - 11 <= 3, "beginning in the middle harvests one refill besides the sample"


def test_rows_documents_and_positions_are_in_stored_order(harvester, blocks, truth, tmp_path):
    store = write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20, metadata={"model": "tiny"})
    torch.testing.assert_close(store.rows(0, N_TOKENS), truth)
    torch.testing.assert_close(store.rows(15, 45), truth[15:45])
    assert store.documents_T.tolist() == [number // 2 for number in range(11) for _ in range(7)]
    assert store.sequences_T.tolist() == [number for number in range(11) for _ in range(7)]
    assert store.positions_T.tolist() == list(range(1, 8)) * 11
    assert store.index.dropped == {"padding": 0, "first_positions": 11, "beyond_max_tokens": 0}
    assert store.index.metadata == {"model": "tiny"}
    assert [shard.tokens for shard in store.index.shards] == [20, 20, 20, 17]
    with pytest.raises(ValueError, match="rows 70 to 78"):
        store.rows(70, 78)


def test_max_tokens_takes_spread_blocks_and_never_repeats(harvester, blocks, tmp_path):
    store = write_shards(harvester, blocks, tmp_path / "s", max_tokens=20)
    assert store.n_tokens == 20
    assert store.sequences_T.unique().tolist() == [0, 5, 10]
    assert store.index.dropped["beyond_max_tokens"] == 1
    assert write_shards(harvester, blocks, tmp_path / "all", max_tokens=10_000).n_tokens == N_TOKENS


def test_bfloat16_round_trip(harvester, blocks, truth, tmp_path):
    store = write_shards(harvester, blocks, tmp_path / "s", dtype="bfloat16", tokens_per_shard=30)
    assert torch.equal(store.rows(0, N_TOKENS), truth.bfloat16().float())
    assert store.batch(0, 4, 0).dtype == torch.float32
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        write_shards(harvester, blocks, tmp_path / "t", dtype="int8")


def test_views_drop_the_embedding_or_take_differences(harvester, blocks, truth, tmp_path):
    store = write_shards(harvester, blocks, tmp_path / "s")
    residual, write = store.view("residual"), store.view("write")
    assert residual.sites == write.sites == (1, 2, 3)
    scaled = store.batch(3, 10, 0)
    torch.testing.assert_close(residual.batch(3, 10, 0), scaled[:, 1:])
    raw = scaled / store.scale_L[:, None]
    torch.testing.assert_close(write.batch(3, 10, 0), raw.diff(dim=1) * write.scale_L[:, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(write.scale_L, estimate_scales(truth.diff(dim=1)))
    assert len({store.fingerprint, residual.fingerprint, write.fingerprint}) == 3
    gap = write_shards(ResidualHarvester(harvester.model, layers=[0, 2]), blocks, tmp_path / "gap")
    with pytest.raises(ValueError, match="neighbours"):
        gap.view("write")
    with pytest.raises(ValueError, match="no block output"):
        write_shards(ResidualHarvester(harvester.model, layers=[0]), blocks, tmp_path / "e").view("residual")


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_and_missing_shards_are_refused_by_name(harvester, blocks, tmp_path, verify):
    write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    shard = tmp_path / "s" / "shard-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(DamagedArtifactError, match="shard-00002"):
        ActivationShards.load(tmp_path / "s", verify=verify)
    shard.unlink()
    with pytest.raises(DamagedArtifactError, match="shard-00002"):
        ActivationShards.load(tmp_path / "s", verify=verify)
    shard.write_bytes(content)
    index = tmp_path / "s" / "index.json"
    index.write_text(index.read_text() + "\n")
    with pytest.raises(DamagedArtifactError, match=r"index\.json"):
        ActivationShards.load(tmp_path / "s", verify=verify)


def test_an_altered_shard_and_a_forged_index_are_refused(harvester, blocks, tmp_path):
    write_shards(harvester, blocks, tmp_path / "s")
    shard = tmp_path / "s" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedArtifactError, match="does not match its sha256"):
        ActivationShards.load(tmp_path / "s")
    text = (tmp_path / "s" / "index.json").read_text()
    index = json.loads(text)
    index["shards"][0]["tokens"] = 76
    (tmp_path / "s" / "index.json").write_text(text.replace('"tokens": 77', '"tokens": 76'))
    with pytest.raises(DamagedArtifactError, match=r"says float32 \[76, 4, 16\]"):
        ActivationShards.load(tmp_path / "s", verify=False)


def test_a_harvest_that_dies_leaves_nothing(harvester, blocks, tmp_path, monkeypatch):
    original = shards_module._write_shard

    def fail_on_third(folder, number, tensors):
        if number == 2:
            raise KeyboardInterrupt
        return original(folder, number, tensors)

    monkeypatch.setattr(shards_module, "_write_shard", fail_on_third)
    with pytest.raises(KeyboardInterrupt):
        write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        ActivationShards.load(tmp_path / "s", verify=False)


def test_a_store_of_something_else_is_refused(harvester, blocks, tmp_path):
    write_shards(harvester, blocks, tmp_path / "s")
    expected = store_fingerprint(harvester, blocks)
    assert ActivationShards.load(tmp_path / "s", expected_fingerprint=expected).n_tokens == N_TOKENS
    other = ResidualHarvester(harvester.model, layers=[1, 2])
    wrong = {
        store_fingerprint(other, blocks),
        store_fingerprint(harvester, blocks, dtype="bfloat16"),
        store_fingerprint(harvester, blocks, max_tokens=20),
    }
    assert len(wrong | {expected}) == 4
    for fingerprint in wrong:
        with pytest.raises(ValueError, match="another model, layers"):
            ActivationShards.load(tmp_path / "s", expected_fingerprint=fingerprint)


def test_a_store_larger_than_the_disk_is_refused_before_it_is_begun(harvester, blocks, tmp_path, monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda path: usage(10**6, 0, 10**6))
    with pytest.raises(OSError, match=r"77 tokens x 4 layers x 16 wide x 4 bytes.*free"):
        write_shards(harvester, blocks, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_nan_is_named_and_stored_nowhere(blocks, tmp_path):
    from crosscoder.data.subject import build_subject

    model = build_subject(2, 16, vocab_size=40, context=8, head_dim=4, seed=0).eval().requires_grad_(False)
    harvester = ResidualHarvester(model)
    buffer = ReplayableBuffer(harvester, blocks, scale_L=torch.ones(3))
    rare = int(blocks[10][-1])
    model.model.embed_tokens.weight[rare] = float("nan")
    assert torch.cat(list(buffer.batches(10, seed=0))).isnan().any()
    block, position = (blocks[:][:, 1:] == rare).nonzero()[0].tolist()
    with pytest.raises(ValueError, match=f"site 0, block {block}, position {position + 1} is not finite"):
        write_shards(harvester, blocks, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_settings_that_cannot_work_are_refused(harvester, blocks, llama, tmp_path):
    with pytest.raises(ValueError, match="positive scales"):
        ReplayableBuffer(harvester, blocks, scale_L=torch.ones(3))
    with pytest.raises(ValueError, match="positive scales"):
        ReplayableBuffer(harvester, blocks, scale_L=torch.tensor([1.0, 1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="pad_token_id"):
        ReplayableBuffer(ResidualHarvester(llama, pad_token_id=0), blocks)
    with pytest.raises(ValueError, match="leaves nothing"):
        write_shards(ResidualHarvester(llama, skip_positions=8), blocks, tmp_path / "s")
    with pytest.raises(ValueError, match="batch_size >= 1"):
        next(ReplayableBuffer(harvester, blocks).batches(0, seed=0))
    with pytest.raises(ValueError, match="kind is 'other'"):
        ReplayableBuffer(harvester, blocks).view("other")
