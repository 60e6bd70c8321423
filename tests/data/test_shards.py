import collections
import copy

import pytest
import torch
from safetensors.torch import save_file

from crosscoder.data import shards as shards_module
from crosscoder.data import stream as stream_module
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.sources import SiteSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import build_subject
from crosscoder.foundation.artifact import DamagedArtifactError, read_json, write_json

N_TOKENS = 77  # eleven blocks of eight, the first position skipped


@pytest.fixture
def truth(harvester, blocks):
    return harvester.harvest(blocks[:])


def test_a_shuffled_batch_mixes_sequences(harvester, blocks, tmp_path):
    """A store shuffles over all of its tokens, not within a shard."""
    store = write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    plain = store.rows(0, N_TOKENS).flatten(1)
    numbers = torch.cdist(store.epoch_rows(0, 30, seed=0, epoch=0).flatten(1), plain).argmin(1)
    assert len((numbers // 14).unique()) == 6
    assert not torch.equal(numbers, numbers.sort().values)


def test_rows_and_where_they_come_from_are_in_stored_order(harvester, blocks, truth, tmp_path):
    store = write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20, metadata={"model": "tiny"})
    torch.testing.assert_close(store.rows(0, N_TOKENS), truth)
    torch.testing.assert_close(store.rows(15, 45), truth[15:45])
    assert store.sequences_T.tolist() == [number for number in range(11) for _ in range(7)]
    assert store.positions_T.tolist() == list(range(1, 8)) * 11
    assert store.index.dropped == {"first_positions": 11, "special_tokens": 0}
    assert store.index.metadata == {"model": "tiny", "tokens": blocks.fingerprint}
    assert [shard.tokens for shard in store.index.shards] == [14, 14, 14, 14, 14, 7]  # whole blocks
    with pytest.raises(ValueError, match="rows 70 to 78"):
        store.rows(70, 78)


def test_max_tokens_takes_spread_blocks_and_never_repeats(harvester, blocks, tmp_path):
    store = write_shards(harvester, blocks, tmp_path / "s", max_tokens=20)
    assert store.n_tokens == 21
    assert store.sequences_T.unique().tolist() == [0, 5, 10]
    assert write_shards(harvester, blocks, tmp_path / "all", max_tokens=10_000).n_tokens == N_TOKENS


def test_bfloat16_round_trip(harvester, blocks, truth, tmp_path):
    store = write_shards(harvester, blocks, tmp_path / "s", dtype="bfloat16", tokens_per_shard=30)
    assert torch.equal(store.rows(0, N_TOKENS), truth.bfloat16().float())
    assert store.epoch_rows(0, 4, seed=0, epoch=0).dtype == torch.float32
    half = ResidualHarvester(copy.deepcopy(harvester.model).bfloat16())
    assert write_shards(half, blocks, tmp_path / "half").index.dtype == "bfloat16"  # as the model's
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        write_shards(harvester, blocks, tmp_path / "t", dtype="int8")


def test_fingerprint_follows_the_model_the_sites_the_dtype_and_the_tokens(harvester, blocks, tmp_path):
    settings = [
        (harvester, {}),
        (ResidualHarvester(harvester.model, layers=[1, 2]), {}),
        (harvester, {"dtype": "bfloat16"}),
        (harvester, {"max_tokens": 20}),
    ]
    stores = [write_shards(reader, blocks, tmp_path / str(i), **given) for i, (reader, given) in enumerate(settings)]
    assert len({store.fingerprint for store in stores}) == 4
    assert write_shards(harvester, blocks, tmp_path / "again").fingerprint == stores[0].fingerprint


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
    index = tmp_path / "s" / "index.json"
    text = index.read_text()
    forged = [
        ('"tokens": 77', '"tokens": 76', r"says torch.float32 \[76, 4, 16\]"),
        ('"shard-00000.safetensors"', '"../0.safetensors"', r"shards\[0\]: file is"),
        ('"sites": [', '"sites": [\n    0,', r"4 scales and 3 of writes, expected 5 and 0 for sites \[0, 0, 1"),
    ]
    for true, false, message in forged:
        manifest = tmp_path / "s" / "MANIFEST.json"
        size = f'"bytes": {index.stat().st_size}'
        index.write_text(text.replace(true, false))
        manifest.write_text(manifest.read_text().replace(size, f'"bytes": {index.stat().st_size}'))
        with pytest.raises(ValueError, match=message):
            ActivationShards.load(tmp_path / "s", verify=False)


def test_a_killed_harvest_goes_on_from_its_last_whole_shard(harvester, blocks, tmp_path, monkeypatch):
    whole = write_shards(harvester, blocks, tmp_path / "whole", tokens_per_shard=20)
    written = []

    def fail_on_third(tensors, path):
        written.append(path.name)
        if len(written) == 3:
            path.write_bytes(b"torn")
            raise KeyboardInterrupt
        save_file(tensors, path)

    monkeypatch.setattr("safetensors.torch.save_file", fail_on_third)
    (tmp_path / ".part-s-0123456789ab").mkdir()  # what a harvest of other settings left
    (tmp_path / ".part-s-more-0123456789ab").mkdir()  # another store's
    with pytest.raises(KeyboardInterrupt):
        write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    with pytest.raises(FileNotFoundError):
        ActivationShards.load(tmp_path / "s", verify=False)
    store = write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    assert len(written) == 3 + 4  # two shards were kept
    assert torch.equal(store.rows(0, N_TOKENS), whole.rows(0, N_TOKENS))
    assert store.fingerprint == whole.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == [".part-s-more-0123456789ab", "s", "whole"]


def test_a_harvest_holds_one_shard_and_one_call_of_the_model(harvester, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "HARVEST_TOKENS", 8)
    sizes = []
    whole = torch.empty

    def counted(*shape, **given):
        made = whole(*shape, **given)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(torch, "empty", counted)
    write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    assert max(sizes) <= 14 * 4 * 16


def test_a_store_larger_than_the_disk_is_refused_before_it_is_begun(harvester, blocks, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda path: usage(10**6, 0, 10**6))
    with pytest.raises(OSError, match=r"77 tokens x 4 layers x 16 wide x 4 bytes.*free"):
        write_shards(harvester, blocks, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_writes_nothing_leaves_its_residual_stream_to_be_stored(blocks, tmp_path, capsys):
    model = build_subject(2, 16, vocab_size=40, context=8, head_dim=4, seed=0).eval().requires_grad_(False)
    for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        projection.weight.zero_()
    store = write_shards(ResidualHarvester(model), blocks, tmp_path / "s")
    assert "what blocks write will not be readable" in capsys.readouterr().err
    assert SiteSource(store, None, "residual").batch(0, 10, 0).shape == (10, 2, 16)
    with pytest.raises(ValueError, match=r"some block of sites \[0, 1, 2\] writes nothing"):
        SiteSource(store, None, "write")
    with pytest.raises(ValueError, match="tokens_per_shard is 0"):
        write_shards(ResidualHarvester(model), blocks, tmp_path / "t", tokens_per_shard=0)


def test_nan_is_named_and_stored_nowhere(blocks, tmp_path):
    model = build_subject(2, 16, vocab_size=40, context=8, head_dim=4, seed=0).eval().requires_grad_(False)
    harvester = ResidualHarvester(model)
    rare = int(blocks[10][-1])
    model.model.embed_tokens.weight[rare] = float("nan")
    stream = ActivationStream(harvester, blocks)
    assert stream.epoch_rows(0, N_TOKENS, seed=0, epoch=0).isnan().any()
    with pytest.raises(ValueError, match="not finite; check the model's weights"):
        SiteSource(stream, None, "residual")
    block, position = (blocks[:][:, 1:] == rare).nonzero()[0].tolist()
    with pytest.raises(ValueError, match=f"site 0, block {block}, position {position + 1} is not finite"):
        write_shards(harvester, blocks, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["residual", "write"])
def test_what_is_not_finite_in_a_store_is_named_by_document_token_and_site(harvester, blocks, tmp_path, kind):
    store = write_shards(harvester, blocks, tmp_path / "s")
    source = SiteSource(store, store, kind)
    x_TLD, token = store._shards[0]["x_TLD"], 17
    x_TLD[token, 2, 3] = torch.nan
    block, position = divmod(int(store.token_T[token]), store.context)
    document = int(blocks.documents[block])
    said = rf"document {document} \(block {block}, position {position}\) at site 2;"
    with pytest.raises(ValueError, match=said):
        list(source.batches(8, seed=0, steps=store.n_tokens // 8 + 1)(0))
    with pytest.raises(ValueError, match=said):
        list(source.marked())


def test_a_store_that_names_other_shards_than_its_manifest_is_refused(harvester, blocks, tmp_path):
    write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=24)
    manifest = read_json(tmp_path / "s" / "MANIFEST.json")
    del manifest["files"]["shard-00001.safetensors"]
    write_json(tmp_path / "s" / "MANIFEST.json", manifest)
    with pytest.raises(DamagedArtifactError, match=r"shards are not the files that MANIFEST\.json lists"):
        ActivationShards.load(tmp_path / "s")


def test_less_text_than_asked_is_said(harvester, blocks, tmp_path, capsys):
    write_shards(harvester, blocks, tmp_path / "s", max_tokens=10_000)
    assert "77 of the 10,000 tokens that were asked for" in capsys.readouterr().err
    write_shards(harvester, blocks, tmp_path / "t", max_tokens=20)
    assert "asked for" not in capsys.readouterr().err
