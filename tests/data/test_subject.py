import importlib.util
import json

import pytest
import torch

from crosscoder.data.probe import meaningless_loss, probe_model
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.subject import (
    build_subject,
    count_parameters,
    find_packaged_gguf,
    hash_weights,
    load_model,
    load_subject,
    load_tokenizer,
    load_untrained,
    model_origin,
    swiglu_width,
)
from crosscoder.data.tokenizer import train_tokenizer
from crosscoder.needs import harvest_needs


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


SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}


@pytest.fixture
def folder(tmp_path):
    build_subject(2, 16, vocab_size=40, context=8, head_dim=4, seed=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("where", ["parameter", "saved nowhere"])
def test_origins_differ_with_every_weight_and_buffer(folder, where):
    model, other = load_model(folder), load_model(folder)
    origin = model_origin(model, "me/model", "v1")
    assert origin == model_origin(other, "me/model", "v1")
    assert (origin.name, origin.revision, origin.dtype) == ("me/model", "v1", "float32")
    fingerprints = ResidualHarvester(model).fingerprint, ResidualHarvester(other).fingerprint
    assert fingerprints[0] == fingerprints[1]
    changed = other.model.norm.weight if where == "parameter" else other.model.rotary_emb.inv_freq
    changed[-1] += 1e-3
    assert hash_weights(other) != origin.weights
    assert ResidualHarvester(other).fingerprint != fingerprints[0]
    assert model_origin(load_model(folder, dtype="bfloat16"), "me/model").dtype == "bfloat16"
    model.config._commit_hash = "0123abcd"
    assert model_origin(model, "me/model", "v1").revision == "0123abcd"


def test_weights_are_hashed_in_parts_as_in_one(folder, monkeypatch):
    model = load_model(folder)
    whole = hash_weights(model)
    monkeypatch.setattr("crosscoder.data.subject.HASHED_AT_ONCE", 7)
    assert hash_weights(model) == whole
    with pytest.raises(ValueError, match="is not loaded"):
        hash_weights(model.to("meta"))


def test_dtypes_and_revisions_are_passed_on(folder):
    load_model(folder, dtype="bfloat16").save_pretrained(folder)
    assert load_model(folder).dtype == torch.float32
    assert load_model(folder, dtype="auto").dtype == torch.bfloat16
    assert load_untrained(folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"--revision main would change nothing: .* is not a model on the Hub"):
        load_model(folder, revision="main")


def test_models_spread_by_accelerate_are_neither_moved_nor_read_elsewhere(folder, tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    ids = torch.randint(0, 40, (2, 6))
    plain = load_model(folder)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", lambda *_: pytest.fail("moved"))
        spread = load_model(folder, device_map="auto")
    offloaded = load_model(folder)
    accelerate.disk_offload(offloaded, offload_dir=tmp_path / "offloaded")
    assert next(offloaded.parameters()).is_meta
    assert hash_weights(offloaded) == hash_weights(spread) == hash_weights(plain)
    assert probe_model(offloaded).mlp == probe_model(plain).mlp
    for model in (spread, offloaded):
        assert torch.equal(ResidualHarvester(model).harvest(ids), ResidualHarvester(plain).harvest(ids))


def test_quantised_checkpoints_load_as_they_are(folder):
    pytest.importorskip("accelerate")
    config = json.loads((folder / "config.json").read_text())
    kind = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": kind}))
    model = load_model(folder)
    assert model.is_quantized
    assert "BitLinear" in type(model.model.layers[0].mlp.up_proj).__name__
    assert probe_model(model).n_blocks == 2
    assert type(load_untrained(folder).model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_weights_that_the_checkpoint_lacks_are_said_and_the_loss_means_nothing(tmp_path, capsys):
    import transformers

    headless = transformers.LlamaModel(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False))
    headless.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.missing_weights == ("lm_head.weight",)
    said = capsys.readouterr()
    assert "1 weights are not in the checkpoint and stay random: lm_head.weight" in said.out + said.err
    assert "lm_head.weight" in meaningless_loss(model, probe_model(model))
    tied = transformers.LlamaModel(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path)
    assert load_model(tmp_path).missing_weights == ()
    assert meaningless_loss(load_model(tmp_path), probe_model(load_model(tmp_path))) is None


@pytest.mark.parametrize("kind", ["Gemma3Config", "LlavaConfig"])
def test_models_of_images_and_text_are_read_at_their_text_tower(kind, tmp_path):
    import transformers

    sees = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    parts = {"Gemma3Config": ("gemma3_text", "siglip_vision_model"), "LlavaConfig": ("llama", "clip_vision_model")}
    text, vision = parts[kind]
    config = getattr(transformers, kind)(
        text_config={**SIZES, "model_type": text},
        vision_config={**sees, "model_type": vision, "image_size": 8, "patch_size": 4},
        image_token_index=39,
    )
    with torch.random.fork_rng():
        transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    found = probe_model(model)
    assert model.missing_weights == ()
    assert "language_model" in found.path
    assert (found.n_blocks, found.width, found.causal) == (3, 16, True)
    assert ("width", "16") in harvest_needs(str(tmp_path), None, "residual", 100, 4)
    assert ("sites", "4") in harvest_needs(str(tmp_path), None, "residual", 100, 4)
    assert probe_model(load_untrained(tmp_path)).n_blocks == 3


def test_models_of_no_next_token_are_refused_in_one_line(tmp_path):
    import transformers

    transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=40).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        ValueError, match=r"no model of T5Config that predicts the next token of a text; give a decoder"
    ):
        load_model(tmp_path)


def test_a_setting_of_another_type_is_one_line(tmp_path):
    settings = {"model_type": "llama", "rms_norm_eps": [[]]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"is not a model's: .*'rms_norm_eps' expected float, got list") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
