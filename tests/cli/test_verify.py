"""`verify` names every fault of everything that is kept, and ends with 3; `doctor` tests the kernels."""

import json
import shutil

import pytest
import torch

import triton_kernels
from crosscoder.cli import main
from crosscoder.commands import doctor
from crosscoder.commands.verify import KINDS, check
from crosscoder.data.subject import load_subject
from crosscoder.data.subject_training import SubjectRun
from crosscoder.foundation.artifact import MANIFEST, DamagedArtifactError


@pytest.fixture
def copied(pipeline, tmp_path):
    """All that the pipeline wrote, to be damaged."""
    return shutil.copytree(pipeline, tmp_path / "all")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_everything_of_a_pipeline_is_looked_at_and_good(pipeline, capsys):
    assert main(["verify", str(pipeline)]) == 0
    said = capsys.readouterr()
    assert "DAMAGED" not in said.out
    assert {line.split()[1] for line in said.out.splitlines()} >= {
        *("token", "tokenizer", "subject", "activations", "checkpoint", "dictionary"),
    }
    assert "all as they were written" in said.err
    assert main(["verify", str(pipeline), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["path"] for one in listed] == [line.split()[-1] for line in said.out.splitlines()]
    assert {str(one["faults"]) for one in listed} == {"[]"}


def manifests(folder):
    return sorted(path.parent for path in folder.rglob(MANIFEST))


def test_every_file_of_every_artifact_is_missed_if_one_bit_of_it_changes(copied, capsys):
    names = [
        (folder, name) for folder in manifests(copied) for name in json.loads((folder / MANIFEST).read_text())["files"]
    ]
    assert len(names) > 30
    for folder, name in names:
        before = (folder / name).read_bytes()
        flip(folder / name)
        faults = [line for _, _, said in check(folder) for line in said]
        assert any(name in line for line in faults), (folder, name)
        (folder / name).write_bytes(before)


def test_every_fault_is_named_and_the_status_is_3(copied, capsys):
    acts, subject = copied / "acts" / "train", copied / "subject" / "step-62"
    flip(acts / "index.json")
    (acts / "shard-00000.safetensors").unlink()
    (subject / "adapter_config.json").write_text("{}")
    flip(copied / "subject" / "run.json")
    assert main(["verify", str(copied)]) == 3
    said = capsys.readouterr()
    for name in ("index.json", "shard-00000.safetensors", "adapter_config.json", "run.json"):
        assert name in said.out
    assert "4 faults" in said.err or "5 faults" in said.err


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": "crosscoder.tokens/9", "files": {"a": {}}}', '{"schema": "x/1"}']
)
def test_a_manifest_that_is_none_is_a_fault(tmp_path, content, capsys):
    (tmp_path / MANIFEST).write_text(content)
    assert main(["verify", str(tmp_path)]) == 3
    assert "DAMAGED" in capsys.readouterr().out


def test_nothing_to_look_at_is_no_success(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert main(["verify"]) == 2
    assert "holds nothing" in capsys.readouterr().err


def test_every_schema_of_a_manifest_has_a_loader(pipeline):
    seen = {json.loads((folder / MANIFEST).read_text())["schema"] for folder in manifests(pipeline)}
    assert seen <= set(KINDS)
    assert len(seen) == 6


@pytest.mark.parametrize("damage", ["weights", "config", "listed", "planted"])
def test_a_subject_s_weights_are_not_loaded_past_their_manifest(copied, damage):
    step = copied / "subject" / "step-62"
    if damage == "planted":
        (step / "adapter_config.json").write_text("{}")
    elif damage == "listed":
        manifest = json.loads((step / MANIFEST).read_text())
        del manifest["files"]["model.safetensors"]
        (step / MANIFEST).write_text(json.dumps(manifest))
    else:
        flip(step / {"weights": "model.safetensors", "config": "config.json"}[damage])
    with pytest.raises(DamagedArtifactError, match="step-62"):
        load_subject(step)


def test_one_changed_digit_of_a_subject_run_is_found(copied):
    path = copied / "subject" / "run.json"
    text = path.read_text()
    digit = text.index('"held_out_loss": ') + len('"held_out_loss": ') + 3
    path.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    with pytest.raises(DamagedArtifactError, match=r"run\.json was changed since it was written"):
        SubjectRun.load(path.parent)


def test_the_doctor_finds_kernels_that_compute_something_else(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "WRONG" not in said
    for word in ("torch", "gather_sum, cpu", "decode_loss, cpu", "encode_batch_top_k, cpu", "memory", "disk here"):
        assert word in said
    right = triton_kernels.gather_sum
    monkeypatch.setattr(triton_kernels, "gather_sum", lambda *arguments: 1.001 * right(*arguments))
    assert main(["doctor"]) == 2
    assert "WRONG  gather_sum, cpu" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 2
    assert [one["what"] for one in json.loads(capsys.readouterr().out) if one["is_wrong"]] == ["gather_sum, cpu"]


def test_the_doctor_finds_a_kernel_that_chooses_other_features(monkeypatch):
    right = triton_kernels.encode_top_k

    def other(*arguments):
        values, features, *rest = right(*arguments)
        return (values, features.roll(1), *rest)

    monkeypatch.setattr(triton_kernels, "encode_top_k", other)
    assert "encode_top_k, cpu" in [one.what for one in doctor.self_test("cpu") if one.is_wrong]
    assert torch.isfinite(torch.ones(1)).all()
