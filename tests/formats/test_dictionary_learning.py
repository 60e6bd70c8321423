"""Crosscoders of dictionary_learning's fork, and of ckkissane's replication, by their published formulas."""

import json

import pytest
import torch
from folders import numbers, relative, write

from crosscoder import BatchTopK, Crosscoder, JumpReLU, ReLU, load_dictionary
from crosscoder.dictionary import Diffing
from crosscoder.formats.convert import detect, import_dictionary
from crosscoder.foundation.artifact import DamagedArtifactError

L, D, F, K = 3, 8, 40, 5
NORMS = {1: lambda W: W.norm(dim=2).sum(0), 2: lambda W: W.norm(dim=(0, 2)), 4: lambda W: torch.ones(W.shape[1])}


def state(norm=1, *, batch=True, normalised=False, seed=0):
    held = {
        "encoder.weight": numbers(L, D, F, seed=seed),
        "encoder.bias": numbers(F, seed=seed + 1),
        "decoder.weight": numbers(L, F, D, seed=seed + 2) * torch.logspace(-1, 1, F)[:, None],
        "decoder.bias": numbers(L, D, seed=seed + 3),
        "code_normalization_id": torch.tensor(norm),
        "target_rms": torch.tensor(1.0),
        "activation_mean": torch.full((L, D), torch.nan),
        "activation_std": torch.full((L, D), torch.nan),
        "activation_global_scale": torch.ones(L),
    }
    if batch:
        held |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(6.0 if norm != 4 else 2.0)}
    if normalised:
        held["activation_mean"], held["activation_std"] = 3 * numbers(L, D, seed=8), numbers(L, D, seed=9).abs()
        held["activation_global_scale"] = torch.tensor([0.5, 2.0, 0.01])
    return held


def output(held, x_BLD):
    """As published: normalise, encode all layers into one code, select by code times norm, decode, denormalise."""
    held = {name: tensor.double() for name, tensor in held.items()}
    x_BLD, scale_L1, mean_LD = x_BLD.double(), held["activation_global_scale"][:, None], held["activation_mean"]
    is_normalised = not bool(mean_LD.isnan().any())
    if is_normalised:
        x_BLD = (x_BLD - mean_LD) * scale_L1
    code = torch.relu(torch.einsum("bld,ldf->bf", x_BLD, held["encoder.weight"]) + held["encoder.bias"])
    if "threshold" in held:
        norm_F = NORMS[int(held["code_normalization_id"])](held["decoder.weight"])
        code = code * (code * norm_F > held["threshold"])
    recon = torch.einsum("bf,lfd->bld", code, held["decoder.weight"]) + held["decoder.bias"]
    return code, recon / (scale_L1 + 1e-8) + mean_LD if is_normalised else recon


def require_same(dictionary, held, x_BLD):
    code, recon = output(held, x_BLD)
    with torch.no_grad():
        out = dictionary(x_BLD)
    assert 0 < (code > 0).float().mean() < 1
    assert torch.equal(out.code.to_dense() > 0, code > 0)
    assert relative(out.code.to_dense(), code) < 1e-6
    assert relative(out.recon, recon) < 1e-6


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch", [True, False])
def test_a_crosscoder_is_the_published_formula(norm, batch, normalised, tmp_path):
    held = state(norm, batch=batch, normalised=normalised)
    config = {"activation_dim": D, "dict_size": F, "num_layers": L, "norm_init_scale": 1.0, "latent_processor": None}
    config["code_normalization"] = {1: "CROSSCODER", 2: "SAE", 4: "NONE"}[norm]
    folder = write(tmp_path / "cc", config, held)
    assert detect(folder) == "dictionary_learning"
    dictionary = import_dictionary(folder, sites=[3, 4, 5], model="google/gemma-2-2b")
    rule = JumpReLU if batch and normalised else BatchTopK if batch else ReLU
    assert type(dictionary.config.sparsity) is rule
    assert (dictionary.reads.site, dictionary.reads.sites) == ("residual", (3, 4, 5))
    require_same(dictionary, held, 2 * numbers(200, L, D, seed=5))
    dictionary.save_pretrained(tmp_path / "ours")
    require_same(load_dictionary(tmp_path / "ours"), held, 2 * numbers(200, L, D, seed=6))


def test_a_pickled_one_that_was_compiled(tmp_path, capsys):
    held = state()
    tmp_path.mkdir(exist_ok=True)
    named = {f"_orig_mod.{name}": tensor for name, tensor in held.items() if name != "code_normalization_id"}
    torch.save(named, tmp_path / "ae.pt")
    dictionary = import_dictionary(tmp_path, allow_pickle=True)
    assert "the l1 norm is taken" in capsys.readouterr().err
    require_same(dictionary, held, numbers(64, L, D))
    assert dictionary.reads.site == "other"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"code_normalization_id": torch.tensor(3)}, {}, r"is 3, expected one of.*MIXED"),
        ({"code_normalization_id": torch.tensor(5)}, {}, r"is 5, expected one of.*DECOUPLED"),
        ({"threshold": torch.tensor([1.0, 1, 1])}, {}, r"threshold is of shape \(3,\)"),
        ({"threshold": torch.tensor(torch.nan)}, {}, "threshold is nan"),
        ({}, {"encoder_layers": [0, 2]}, r"encoder_layers is \[0, 2\]"),
        ({}, {"latent_processor": "clip"}, "latent_processor is 'clip'"),
        ({}, {"code_normalization": "SAE"}, "code_normalization is 'SAE'.*file of weights says CROSSCODER"),
        ({}, {"dict_size": 10**12}, "dict_size is 1000000000000, the file holds 40"),
        ({"W_skip": torch.ones(2)}, {}, "tensors that are not known here.*W_skip"),
        ({"activation_mean": torch.full((L, D), torch.inf), "activation_std": torch.ones(L, D)}, {}, "infinite"),
    ],
)
def test_what_is_another_function_is_refused(change, config, message, tmp_path):
    write(tmp_path, {"dict_size": F, **config}, {**state(), **change})
    with pytest.raises(ValueError, match=message):
        import_dictionary(tmp_path)


def kissane(dtype=torch.bfloat16):
    return {
        "W_enc": numbers(2, D, F).to(dtype),
        "W_dec": numbers(F, 2, D, seed=1).to(dtype),
        "b_enc": numbers(F, seed=2).to(dtype),
        "b_dec": numbers(2, D, seed=3).to(dtype),
    }


@pytest.mark.parametrize("scale", [(), (0.25, 3.0)])
def test_a_diffing_crosscoder_of_ckkissane(scale, tmp_path, capsys):
    held = kissane()
    config = {"d_in": D, "dict_size": F, "enc_dtype": "bf16", "seed": 49, "hook_point": "blocks.14.hook_resid_pre"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    torch.save(held, tmp_path / "cc_weights.pt")
    assert detect(tmp_path) == "ckkissane"
    dictionary = import_dictionary(tmp_path, scale=scale, allow_pickle=True)
    said = capsys.readouterr().err
    assert "4 tensors of cc_weights.pt are bfloat16" in said
    assert type(dictionary) is Crosscoder
    assert dictionary.config.structure == Diffing((1, 1), (D, D))
    a_BLD, held = numbers(64, 2, D, seed=5), {name: tensor.double() for name, tensor in held.items()}
    factor = torch.tensor(scale or (1.0, 1.0), dtype=torch.float64)[:, None]
    code = torch.relu(torch.einsum("bmd,mdf->bf", a_BLD.double() * factor, held["W_enc"]) + held["b_enc"])
    recon = (torch.einsum("bf,fmd->bmd", code, held["W_dec"]) + held["b_dec"]) / factor
    with torch.no_grad():
        out = dictionary(a_BLD)
    assert relative(out.code.to_dense(), code) < 1e-6
    assert relative(out.recon, recon) < 1e-6
    assert "blocks.14.hook_resid_pre of 2 models" in str(dictionary.reads)
    assert bool((dictionary.input_scale == 1).all())


def test_a_scale_that_does_not_fit_is_refused(tmp_path):
    write(tmp_path, {"dict_size": F}, state())
    for scale, message in (([1.0, 2.0], "expected 3 positive"), ([0.0], "expected 3"), ([2.0], "a scale would change")):
        with pytest.raises(ValueError, match=message):
            import_dictionary(tmp_path, scale=scale)


def test_two_files_of_weights_are_not_chosen_between(tmp_path):
    write(tmp_path, {"dict_size": F}, state())
    torch.save(state(seed=50), tmp_path / "ae.pt")
    with pytest.raises(FileNotFoundError, match=r"holds model.safetensors, ae.pt; leave one"):
        import_dictionary(tmp_path)


def test_shapes_that_disagree(tmp_path):
    write(tmp_path, {"dict_size": F}, {**state(), "decoder.weight": numbers(L + 1, F, D)})
    with pytest.raises(DamagedArtifactError, match=r"decoder.weight is of shape \[4, 40, 8\]; expected \[3, 40, 8\]"):
        import_dictionary(tmp_path)


def sae(**changed):
    """An SAE of the fork, as its `save_pretrained` writes it: without a table of the trainer."""
    held = {
        "encoder.weight": numbers(F, D),
        "encoder.bias": numbers(F, seed=1),
        "decoder.weight": numbers(D, F, seed=2),
        "b_dec": numbers(D, seed=3),
        "k": torch.tensor(K, dtype=torch.int),
        "threshold": torch.tensor(1.5),
        "activation_mean": torch.full((D,), torch.nan),
        "activation_std": torch.full((D,), torch.nan),
        "activation_global_scale": torch.tensor(1.0),
        "target_rms": torch.tensor(1.0),
    }
    return {**held, **changed}


def test_an_sae_of_the_fork(tmp_path):
    held = sae()
    folder = write(tmp_path, {"activation_dim": D, "dict_size": F, "k": K, "dict_class": "BatchTopKSAE"}, held)
    bank, x_BD = import_dictionary(folder), numbers(64, D, seed=9)
    score = (x_BD - held["b_dec"]) @ held["encoder.weight"].T + held["encoder.bias"]
    code = score.relu() * (score > 1.5)
    with torch.no_grad():
        out = bank(x_BD[:, None])
    assert relative(out.code.to_dense()[:, 0], code) < 1e-6
    assert relative(out.recon[:, 0], code @ held["decoder.weight"].T + held["b_dec"]) < 1e-6


@pytest.mark.parametrize(
    ("changed", "config", "message"),
    [
        ({"activation_mean": torch.ones(D), "activation_std": torch.ones(D)}, {}, "inputs are normalised"),
        ({}, {"k": K + 1}, "k is 6, .* holds 5"),
        ({}, {"dict_size": F + 1}, "dict_size is 41, the file holds 40"),
        ({}, {"dict_class": None}, "dict_class is missing|dict_class is None"),
        ({}, {"dict_class": "CrossCoder"}, "dict_class is 'CrossCoder': expected one of AutoEncoder"),
    ],
)
def test_an_sae_that_does_not_fit_is_refused(changed, config, message, tmp_path):
    said = {"activation_dim": D, "dict_size": F, "k": K, "dict_class": "BatchTopKSAE", **config}
    with pytest.raises(ValueError, match=message):
        import_dictionary(write(tmp_path, said, sae(**changed)))
