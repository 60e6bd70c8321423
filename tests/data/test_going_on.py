"""What was stopped while data were made goes on where it was, and ends as if nothing had happened."""

import collections
import os
import signal
from dataclasses import replace

import pytest
import torch

from crosscoder.data import prepare, shard_files, shards, spool, subject_training
from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.shards import write_shards
from crosscoder.data.subject_training import SubjectConfig, SubjectRun, train_subject
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation import signals
from crosscoder.foundation.lock import InUseError, locked

CONFIG = SubjectConfig(n_layers=1, d_model=16, context=8, head_dim=4, batch=8, tokens=12 * 64, n_checkpoints=3)


def blocks_of(n, first=0):
    starts = torch.arange(first, first + n)[:, None]
    return TokenBlocks((starts + torch.arange(8)) % 16, vocab_size=16)


def asking_at(call, function):
    """`function`, at the `call`-th call of which a signal comes."""
    calls = []

    def called(*args, **given):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **given)

    return called


def weights(run):
    return [run.load_model(index).model.embed_tokens.weight for index in range(len(run.checkpoints))]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("at", [1, 8])
def test_a_subject_goes_on_to_the_same_bits(optimizer, at, tmp_path, monkeypatch, capsys):
    config = replace(CONFIG, optimizer=optimizer)
    whole = train_subject(config, blocks_of(96), blocks_of(16), folder=tmp_path / "whole", quiet=True)
    loss, given = subject_training.next_token_loss, (config, blocks_of(96), blocks_of(16))
    monkeypatch.setattr(subject_training, "next_token_loss", asking_at(at, loss))
    with pytest.raises(signals.Stopped, match=rf"SIGTERM after \d+ of 12 steps; kept in {tmp_path}/cut"):
        train_subject(*given, folder=tmp_path / "cut", quiet=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"of other settings \(learning_rate: there 0\.003, now 0\.1\); restore them"):
        train_subject(replace(config, learning_rate=0.1), *given[1:], folder=tmp_path / "cut")
    cut = train_subject(*given, folder=tmp_path / "cut", quiet=True)
    assert "going on from step" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(cut), strict=True))
    assert cut.checkpoints == whole.checkpoints
    assert not (tmp_path / "cut" / "unfinished").exists()


def test_a_record_that_does_not_say_how_rates_fall_means_what_was_so_then(tmp_path, monkeypatch):
    config = replace(CONFIG, optimizer="muon")
    loss, given = subject_training.next_token_loss, (config, blocks_of(96), blocks_of(16))
    monkeypatch.setattr(subject_training, "next_token_loss", asking_at(8, loss))
    with pytest.raises(signals.Stopped):
        train_subject(*given, folder=tmp_path, quiet=True)
    monkeypatch.undo()
    read = subject_training.read_record

    def older(folder):
        record = read(folder)
        for name in ("decay", "muon_momentum"):
            del record["settings"][name]
        return record

    monkeypatch.setattr(subject_training, "read_record", older)
    with pytest.raises(ValueError, match=r"settings \(muon_momentum: there 0\.95, now 0\.9; decay: there 'cosine'"):
        train_subject(replace(config, muon_momentum=0.9, decay="linear"), *given[1:], folder=tmp_path)
    assert train_subject(*given, folder=tmp_path, quiet=True).checkpoints[-1].step == 12


def test_settings_of_muon_say_nothing_of_a_run_without_it(tmp_path):
    given = blocks_of(96), blocks_of(16)
    run = train_subject(CONFIG, *given, folder=tmp_path, quiet=True)
    assert train_subject(replace(CONFIG, muon_learning_rate=0.5), *given, folder=tmp_path, quiet=True) == run


def test_a_finished_subject_is_read_again_and_never_written_over(tmp_path, capsys):
    given = CONFIG, blocks_of(96), blocks_of(16)
    run = train_subject(*given, folder=tmp_path, quiet=True)
    before = (tmp_path / "step-12" / "model.safetensors").stat().st_mtime_ns
    assert train_subject(*given, folder=tmp_path, quiet=True) == run == SubjectRun.load(tmp_path)
    assert "holds this subject, trained" in capsys.readouterr().err
    assert (tmp_path / "step-12" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="seed: there 0, now 1"):
        train_subject(replace(CONFIG, seed=1), *given[1:], folder=tmp_path)
    with locked(tmp_path), pytest.raises(InUseError):
        train_subject(*given, folder=tmp_path)


def test_a_damaged_state_begins_again_and_says_so(tmp_path, monkeypatch, capsys):
    given = CONFIG, blocks_of(96), blocks_of(16)
    monkeypatch.setattr(subject_training, "KEEP_SECONDS", 0.0)
    loss = subject_training.next_token_loss
    monkeypatch.setattr(subject_training, "next_token_loss", asking_at(5, loss))
    with pytest.raises(signals.Stopped):
        train_subject(*given, folder=tmp_path, quiet=True)
    path = tmp_path / "unfinished" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run = train_subject(*given, folder=tmp_path, quiet=True)
    assert "what was kept is damaged" in capsys.readouterr().err
    assert len(run.checkpoints) == 4


def test_a_harvest_that_is_stopped_inside_a_shard_keeps_what_it_has(harvester, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr("crosscoder.data.stream.HARVEST_TOKENS", 16)
    harvest, calls, stop_at = type(harvester).harvest, [], 0

    def counted(self, *given):
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return harvest(self, *given)

    monkeypatch.setattr(type(harvester), "harvest", counted)
    whole = write_shards(harvester, blocks, tmp_path / "whole")
    given, n_calls, stop_at = (harvester, blocks, tmp_path / "s"), len(calls), len(calls) + 4
    with pytest.raises(signals.Stopped, match=r"SIGINT; what was harvested is kept in .*\.part-s-"):
        write_shards(*given)
    done = len(calls)
    store = write_shards(*given)
    assert len(calls) - done <= n_calls - 3  # what was harvested is not harvested again
    for name in ("index.json", "shard-00000.safetensors"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert store.fingerprint == whole.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "whole"]


def test_a_store_that_is_there_is_not_harvested_again(harvester, blocks, tmp_path, capsys):
    write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    before = (tmp_path / "s").stat().st_ino
    assert write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20).n_tokens == 77
    assert "holds these activations already" in capsys.readouterr().err
    assert (tmp_path / "s").stat().st_ino == before
    (tmp_path / "s" / "index.json").write_text("{}")  # damaged
    assert write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20).n_tokens == 77
    assert (tmp_path / "s").stat().st_ino != before
    with locked(tmp_path, name=".lock-s"), pytest.raises(InUseError):
        write_shards(harvester, blocks, tmp_path / "s", max_tokens=20)


def test_what_is_harvested_counts_as_room(harvester, blocks, tmp_path, monkeypatch):
    """A store of which most is there needs the rest alone."""
    needed = 77 * (4 * 16 * 4 + 12) + shards._SLACK_BYTES
    usage = collections.namedtuple("usage", "total used free")(0, 0, needed - 5000)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="the store needs"):
        write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    monkeypatch.undo()
    save = shard_files._save_whole
    monkeypatch.setattr(shard_files, "_save_whole", asking_at(4, save))
    with pytest.raises(signals.Stopped):
        write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    monkeypatch.undo()
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    assert write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20).n_tokens == 77


def texts(folder, n=24):
    folder.mkdir(exist_ok=True)
    for number in range(n):
        (folder / f"{number:02}.txt").write_text(" ".join(f"w{(number * 7 + i * i) % 97}" for i in range(200)))
    return str(folder)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_preparation_goes_on_with_the_tokens_that_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_BATCH", 2000)
    given = {"source": texts(tmp_path / "text"), "vocab_size": 270, "sequence_length": 16}
    prepare_tokens(**given, folder=tmp_path / "whole")
    encode, calls = prepare._encode, []

    def counted(*one, **how):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*one, **how)

    monkeypatch.setattr(prepare, "_encode", counted)
    with pytest.raises(signals.Stopped, match=r"SIGTERM; the tokens of what was read are kept in .*\.part-prepare-"):
        prepare_tokens(**given, folder=tmp_path / "cut")
    n_batches, calls[:] = 14, []
    trained = monkeypatch.setattr(prepare, "train_tokenizer", None)  # not called again
    assert trained is None
    prepare_tokens(**given, folder=tmp_path / "cut")
    assert len(calls) < n_batches
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_kept_tokens_of_other_documents_or_torn_ones_are_not_used(tmp_path):
    import numpy as np
    import pyarrow as pa

    path = tmp_path / "tokens.arrow"
    with spool.writing(path, pa.list_(pa.int32())) as write:
        for start in (0, 10):
            write(spool.token_array(np.arange(start, start + 5, dtype=np.int32), np.array([2, 3])), [start, start + 1])
    content = path.read_bytes()
    kept = spool.KeptTokens(path)
    assert [part.tolist() for part in kept.next_of([0, 1])] == [[0, 1, 2, 3, 4], [2, 3]]
    assert kept.next_of([10, 12]) is None
    assert kept.next_of([10, 11]) is None  # nothing after a difference
    path.write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / "tokens.arrow.kept").unlink()
    kept = spool.KeptTokens(path)
    assert kept.next_of([0, 1]) is not None
    assert kept.next_of([10, 11]) is None
    (tmp_path / "tokens.arrow.kept").unlink()
    at = content.index(np.arange(5, dtype=np.int32).tobytes())
    path.write_bytes(content[:at] + bytes(20) + content[at + 20 :])  # zeros, as of a page that was never written
    assert spool.KeptTokens(path).next_of([0, 1]) is None


def test_a_preparation_in_a_folder_in_use_is_refused(tmp_path):
    with locked(tmp_path / "out"), pytest.raises(InUseError):
        prepare_tokens(texts(tmp_path / "text"), vocab_size=270, sequence_length=16, folder=tmp_path / "out")


def test_a_torn_json_file_of_a_killed_harvest_is_no_part_of_the_store(harvester, blocks, tmp_path, monkeypatch):
    """A file that was being written when its process was killed lies in the folder that the next one goes on in."""
    monkeypatch.setattr(shard_files, "_save_whole", asking_at(2, shard_files._save_whole))
    with pytest.raises(signals.Stopped):
        write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    monkeypatch.undo()
    (part,) = tmp_path.glob(".part-s-*")
    (part / ".tmp-index.json-01234567").write_text("{")
    write_shards(harvester, blocks, tmp_path / "s", tokens_per_shard=20)
    assert not list((tmp_path / "s").glob(".tmp-*"))
