"""Dictionaries on disk: what goes in comes out, and nothing damaged is read as good."""

import json
import os

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE, TopK, load_dictionary
from crosscoder.foundation.artifact import MANIFEST, DamagedArtifactError, file_sha256, read_json, write_json


@pytest.fixture
def saved(tmp_path):
    cc = Crosscoder(n_layers=2, d_model=4, n_features=16, sparsity=BatchTopK(k=3), seed=7)
    cc(torch.randn(32, 2, 4))
    cc.input_scale.copy_(torch.tensor([0.5, 2.0]))
    cc.save_pretrained(tmp_path / "cc")
    return cc, tmp_path / "cc"


def reseal(folder):
    """Make the manifest agree with altered files, so that only the check under test can object."""
    manifest = read_json(folder / MANIFEST)
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(folder / MANIFEST, manifest)


def alter(folder, change):
    """Change the saved settings, with a manifest that agrees."""
    config = read_json(folder / "config.json")
    change(config["settings"])
    write_json(folder / "config.json", config)
    reseal(folder)


def test_round_trip(saved):
    cc, folder = saved
    again = Crosscoder.from_pretrained(folder)
    assert again.config == cc.config
    assert not again.training
    x = torch.randn(9, 2, 4)
    assert torch.equal(again(x).recon, cc.eval()(x).recon)
    assert torch.equal(again.input_scale, cc.input_scale)
    assert type(load_dictionary(folder)) is Crosscoder


@pytest.mark.parametrize("scale", [[1.0], [1.0, 0.0], [1.0, float("nan")]])
def test_scales_that_are_none_are_refused(scale):
    cc = Crosscoder(n_layers=2, d_model=4, n_features=16, sparsity=TopK(k=3))
    with pytest.raises(ValueError, match="expected 2 positive numbers"):
        cc.set_input(torch.tensor(scale), None)


def test_saving_again_replaces_the_folder(saved):
    cc, folder = saved
    with torch.no_grad():
        cc.decoder.mul_(2)
    cc.save_pretrained(folder)
    assert torch.equal(Crosscoder.from_pretrained(folder).decoder, cc.decoder)
    assert [p.name for p in folder.parent.iterdir()] == ["cc"]


def test_the_other_class_is_refused_by_name(saved):
    with pytest.raises(ValueError, match="holds a Crosscoder, not a LayerwiseSAE"):
        LayerwiseSAE.from_pretrained(saved[1])


def test_damaged_weights_are_refused(saved):
    path = saved[1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedArtifactError, match=r"model.safetensors"):
        Crosscoder.from_pretrained(saved[1])


def test_weights_that_are_not_finite_are_refused(saved):
    cc, folder = saved
    with torch.no_grad():
        cc.encoder[3, 1, 2] = torch.nan
    cc.save_pretrained(folder)
    with pytest.raises(DamagedArtifactError, match="encoder holds values that are not finite"):
        Crosscoder.from_pretrained(folder)


def test_shapes_that_disagree_with_the_config_are_refused_before_allocating(saved):
    folder = saved[1]
    alter(folder, lambda settings: settings.update(n_features=10**12))
    with pytest.raises(DamagedArtifactError, match=r"encoder: file \(16, 2, 4\), config \(1000000000000, 2, 4\)"):
        Crosscoder.from_pretrained(folder)


def test_unknown_setting_names_the_nearest(saved):
    folder = saved[1]
    alter(folder, lambda settings: settings.update(n_feature=settings.pop("n_features")))
    with pytest.raises(ValueError, match="unknown setting 'n_feature'; did you mean 'n_features'"):
        Crosscoder.from_pretrained(folder)


def test_a_pickle_named_safetensors_is_never_executed(saved, tmp_path):
    folder, sentinel = saved[1], tmp_path / "executed"
    payload = f"cos\nsystem\n(S'touch {sentinel}'\ntR.".encode()
    (folder / "model.safetensors").write_bytes(payload)
    reseal(folder)
    with pytest.raises(DamagedArtifactError):
        Crosscoder.from_pretrained(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize("theirs", [MANIFEST, "config.json"])
def test_a_folder_whose_files_would_be_replaced_is_left_alone(tmp_path, theirs):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / theirs).write_text('{"name": "my web extension"}')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="not ours to replace"):
        Crosscoder(n_layers=1, d_model=2, n_features=4, sparsity=TopK(k=1)).save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; check the path"):
        Crosscoder.from_pretrained(tmp_path / "nowhere")


def test_a_repository_is_saved_into_and_what_else_it_holds_stays(saved, tmp_path, monkeypatch):
    cc, _ = saved
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    for name in ("README.md", ".git/HEAD"):
        (tmp_path / "repo" / name).write_text("mine")
    monkeypatch.chdir(tmp_path / "repo")
    for _ in range(2):
        cc.save_pretrained(".")
        assert (tmp_path / "repo" / "README.md").read_text() == (tmp_path / "repo" / ".git/HEAD").read_text() == "mine"
        assert torch.equal(load_dictionary(tmp_path / "repo").encoder, cc.encoder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cc", "repo"]


def test_a_folder_without_a_manifest_is_loaded_and_it_is_said(saved, capsys):
    cc, folder = saved
    (folder / MANIFEST).unlink()
    assert torch.equal(load_dictionary(folder).encoder, cc.encoder)
    assert "nobody can tell whether its files are as they were written" in capsys.readouterr().err
    (folder / "config.json").write_text("{}")
    with pytest.raises(DamagedArtifactError, match="does not name a dictionary class"):
        load_dictionary(folder)


@pytest.fixture
def cached(saved, tmp_path, monkeypatch):
    """The client's cache as it lies after a download of two revisions of a repository; no network."""
    cc, folder = saved
    home = tmp_path / "hub" / "models--lab--cc"
    for commit, scale in (("a" * 40, 1.0), ("b" * 40, 2.0)):
        cc.input_scale.fill_(scale)
        cc.save_pretrained(folder)
        snapshot = home / "snapshots" / commit
        for name in ("blobs", "refs", f"snapshots/{commit}"):
            (home / name).mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            blob = home / "blobs" / file_sha256(path)
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    for name, commit in (("main", "a"), ("v2", "b")):
        (home / "refs" / name).write_text(commit * 40)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


def test_a_repository_on_the_hub_is_loaded_from_its_cache(cached):
    assert Crosscoder.from_pretrained("lab/cc").input_scale.tolist() == [1.0, 1.0]
    for revision in ("v2", "b" * 40):
        assert load_dictionary("lab/cc", revision=revision).input_scale.tolist() == [2.0, 2.0]
    blob = (cached / "snapshots" / ("a" * 40) / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + bytes([blob.read_bytes()[-1] ^ 1]))
    with pytest.raises(DamagedArtifactError, match="does not match its sha256"):
        load_dictionary("lab/cc")


@pytest.mark.usefixtures("cached")
def test_what_is_not_on_the_hub_is_named(saved):
    with pytest.raises(FileNotFoundError, match="no repository lab/other on the Hub or in its cache"):
        load_dictionary("lab/other")
    with pytest.raises(FileNotFoundError, match="no repository lab/cc at v9"):
        load_dictionary("lab/cc", revision="v9")
    with pytest.raises(ValueError, match="no repository on the Hub; leave it out"):
        load_dictionary(saved[1], revision="main")


def test_an_empty_manifest_verifies_nothing(saved):
    manifest = read_json(saved[1] / MANIFEST)
    write_json(saved[1] / MANIFEST, {**manifest, "files": {}})
    with pytest.raises(DamagedArtifactError, match=r"does not list config.json, model.safetensors"):
        Crosscoder.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "header",
    [b"[1]", b'{"encoder": "x"}', b'{"encoder": {"dtype": "F32", "shape": 5}}', b"[" * 100_000],
    ids=["list", "string", "shape", "deep"],
)
def test_malformed_headers_are_refused(saved, header):
    (saved[1] / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    reseal(saved[1])
    with pytest.raises(DamagedArtifactError, match="not a safetensors file"):
        Crosscoder.from_pretrained(saved[1])


def test_shapes_that_only_the_header_claims_are_refused(saved):
    folder, huge = saved[1], 10**12
    alter(folder, lambda settings: settings.update(n_features=huge))
    shapes = Crosscoder.tensor_shapes(Crosscoder(n_layers=2, d_model=4, n_features=4, sparsity=TopK(k=1)).config)
    header, start = {}, 0
    for name, shape in shapes.items():
        shape = tuple(huge if size == 4 and name != "decoder_bias" else size for size in shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start := start + 4]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(start))
    reseal(folder)
    with pytest.raises(DamagedArtifactError):
        Crosscoder.from_pretrained(folder)


def test_integer_weights_are_refused(saved):
    path = saved[1] / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"encoder":{"dtype":"F32"', b'"encoder":{"dtype":"I32"'))
    reseal(saved[1])
    with pytest.raises(DamagedArtifactError, match=r"encoder is torch\.int32"):
        Crosscoder.from_pretrained(saved[1])
