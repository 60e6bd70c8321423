import importlib.util

import pytest
import torch

from crosscoder.data.subject import (
    build_subject,
    count_parameters,
    find_packaged_gguf,
    load_subject,
    swiglu_width,
)
from crosscoder.data.tokenizer import train_tokenizer


@pytest.mark.parametrize(("n_layers", "d_model"), [(4, 64), (8, 64), (4, 192)])
def test_shapes_of_one_size_hold_exactly_as_many_numbers(n_layers, d_model):
    with torch.device("meta"):
        narrow = count_parameters(build_subject(n_layers, d_model, vocab_size=50, context=8, seed=0))
        wide = count_parameters(build_subject(n_layers // 4, 2 * d_model, vocab_size=50, context=8, seed=0))
    assert narrow.non_embedding_matrices == wide.non_embedding_matrices
    assert abs(narrow.non_embedding_matrices / (12 * n_layers * d_model**2) - 1) < 0.002
    assert (narrow.embedding, wide.embedding) == (50 * d_model, 100 * d_model)
    assert narrow.norms == d_model * (2 * n_layers + 1)
    assert swiglu_width(48) == 128, "a width that is not a multiple of 64"


def test_untied_output_matrix_and_position_table_count_as_embedding():
    import transformers

    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=12, tie_word_embeddings=False
    )
    with torch.random.fork_rng():
        model = transformers.GPT2LMHeadModel(config)
    counts = count_parameters(model)
    assert counts.embedding == 2 * 30 * 16 + 12 * 16
    assert sum(counts) == sum(parameter.numel() for parameter in model.parameters())


def test_building_follows_the_seed_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    sizes = {"vocab_size": 20, "context": 8, "head_dim": 4}
    models = [build_subject(1, 16, **sizes, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("sizes", [{"d_model": 18}, {"head_dim": 3}, {"head_dim": 0}])
def test_impossible_shapes_are_refused(sizes):
    good = {"n_layers": 1, "d_model": 16, "vocab_size": 20, "context": 8, "head_dim": 4, "seed": 0}
    with pytest.raises(ValueError, match="not a multiple"):
        build_subject(**{**good, **sizes})


def test_loaded_folder_is_frozen_and_in_evaluation_mode(tmp_path):
    model = build_subject(1, 16, vocab_size=260, context=8, head_dim=4, seed=0)
    model.save_pretrained(tmp_path)
    train_tokenizer(["some text"], vocab_size=260).save_pretrained(tmp_path)
    subject = load_subject(tmp_path, dtype=torch.bfloat16)
    assert not subject.model.training
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    assert subject.model.dtype == torch.bfloat16
    assert subject.tokenizer("text")["input_ids"]
    assert subject.name == str(tmp_path)


def test_gguf_needs_its_file_and_its_packages(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load_subject(tmp_path / "none.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"crosscoder\[gguf\]"):
        load_subject(tmp_path / "a.gguf")


def test_packaged_gguf_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "model_in_a_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \.gguf"):
        find_packaged_gguf("model-in-a-package")
    (package / "b.gguf").touch()
    (package / "a.gguf").touch()
    assert find_packaged_gguf("model-in-a-package") == package / "a.gguf"
    with pytest.raises(ModuleNotFoundError, match="pip install not-there"):
        find_packaged_gguf("not-there")
