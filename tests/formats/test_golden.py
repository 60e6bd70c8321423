"""What other libraries' own code wrote and computed, read by us: the same codes and reconstructions."""

import pytest
import torch
from folders import GOLDEN, relative
from safetensors.torch import load_file

from crosscoder import Crosscoder, LayerwiseSAE
from crosscoder.formats.convert import detect, import_dictionary

REFUSED = {
    "saelens/gated": "architecture is 'gated': a gate and a magnitude",
    "saelens/before_6_normalised": "normalize_activations is 'expected_average_only_in'",
    "sparsify/skip": "skip_connection is True: a linear map of the input",
    "sparsify/groupmax": "activation is 'groupmax'",
    "dictionary_learning/GatedAutoEncoder": "dict_class is 'GatedAutoEncoder': a gate and a magnitude",
    "dictionary_learning/GatedAutoEncoder_adversarial": "dict_class is 'GatedAutoEncoder'",
}
FOLDERS = {
    path.parent.relative_to(GOLDEN).as_posix(): path.parent
    for path in sorted(GOLDEN.rglob("expected.safetensors"))
    if path.parent.name != "delphi"
}


def test_golden_folders_are_of_every_library():
    assert {name.split("/")[0] for name in FOLDERS} == {"saelens", "sparsify", "dictionary_learning", "gemma-scope-2"}
    assert REFUSED.keys() < FOLDERS.keys()


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in REFUSED])
def test_codes_and_reconstructions_are_theirs(name):
    folder = FOLDERS[name]
    assert detect(folder) == name.split("/")[0]
    dictionary, expected = import_dictionary(folder, allow_pickle=True), load_file(folder / "expected.safetensors")
    x_BLD = expected["x"] if expected["x"].ndim == 3 else expected["x"][:, None]
    missing = dictionary.config.n_layers - x_BLD.shape[1]  # outputs of transcoders are not read
    x_BLD = torch.cat([x_BLD, torch.full((len(x_BLD), missing, x_BLD.shape[2]), 7.0)], dim=1)
    with torch.no_grad():
        out = dictionary(x_BLD)
    code, recon = out.code.to_dense(), out.recon
    if expected["code"].ndim == 3:  # feature j * L + i is their column j of file i
        expected["code"] = expected["code"].permute(0, 2, 1).flatten(1)
    if isinstance(dictionary, LayerwiseSAE):
        code = code[:, 0]
    recon = recon[:, -expected["recon"].shape[1] :] if expected["recon"].ndim == 3 else recon[:, -1]
    assert 0 < (expected["code"] > 0).float().mean() < 1 or "AutoEncoder" in name
    assert torch.equal(code > 0, expected["code"] > 0)
    assert relative(code, expected["code"]) < 1e-6
    assert relative(recon, expected["recon"]) < 1e-6
    # The comparison can fail: one bias that differs shows.
    with torch.no_grad():
        dictionary.encoder_bias[...] += 1e-2
        assert relative(dictionary(x_BLD).code.to_dense().flatten(), out.code.to_dense().flatten()) > 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_another_function_is_refused_by_name(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        import_dictionary(FOLDERS[name], allow_pickle=True)


def test_records_say_what_publishers_say():
    reads = import_dictionary(FOLDERS["saelens/topk"]).reads
    assert (reads.model.name, reads.model.weights, reads.site, reads.sites) == ("tiny", "", "residual", (5,))
    assert reads.tokens.context == 64
    reads = import_dictionary(FOLDERS["saelens/before_6"]).reads
    assert (reads.model.name, reads.site, reads.sites) == ("tiny", "residual", (4,))
    reads = import_dictionary(FOLDERS["dictionary_learning/BatchTopKSAE"], allow_pickle=True).reads
    assert (reads.model.name, reads.site, reads.sites) == ("tiny", "residual", (5,))
    reads = import_dictionary(FOLDERS["sparsify/layers.10"]).reads
    assert (reads.model.name, reads.site, reads.sites) == ("", "residual", (11,))
    reads = import_dictionary(FOLDERS["sparsify/layers.3.mlp"]).reads
    assert (reads.site, reads.sites) == ("mlp", (4, 4))
    reads = import_dictionary(FOLDERS["gemma-scope-2/crosscoder/layer_5_9_12_width_16k_l0_medium"]).reads
    assert (reads.model.name, reads.site, reads.sites) == ("google/gemma-3-270m-pt", "residual", (6, 10, 13))
    clt = import_dictionary(FOLDERS["gemma-scope-2/clt/width_16k_l0_medium"])
    assert type(clt) is Crosscoder
    assert clt.reads.site == "other"
    assert "post_feedforward_layernorm.output" in str(clt.reads)


def test_a_root_of_sparsify_is_a_bank_in_the_order_of_layers(tmp_path):
    for name in ("layers.10", "layers.2"):
        (tmp_path / name).symlink_to(FOLDERS[f"sparsify/{name}"])
    bank = import_dictionary(tmp_path)
    assert type(bank) is LayerwiseSAE
    assert bank.reads.sites == (3, 11)
    for layer, name in enumerate(("layers.2", "layers.10")):
        alone = import_dictionary(FOLDERS[f"sparsify/{name}"])
        assert torch.equal(bank.encoder[layer], alone.encoder[0])
