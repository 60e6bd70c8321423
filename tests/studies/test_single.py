"""A study of one model whose next-token loss says nothing."""

import pytest
import torch

from crosscoder.data.subject import Loading
from crosscoder.data.tokenizer import train_tokenizer
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.single import SubjectStudyConfig, run_subject_study

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "box",
    "quietly",
]


def write_texts(tmp_path):
    """A folder of texts, and a tokenizer of them in `model`."""
    texts = tmp_path / "texts"
    texts.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        chosen = torch.randint(0, len(WORDS), (120,), generator=generator).tolist()
        (texts / f"{number}.txt").write_text(" ".join(WORDS[word] for word in chosen))
    train_tokenizer([path.read_text() for path in texts.iterdir()], vocab_size=270).save_pretrained(tmp_path / "model")
    return texts


def test_a_model_that_sees_the_future_has_no_loss_and_is_not_spliced(tmp_path, capsys):
    import transformers

    texts = write_texts(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        model = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=270, **sizes))
    model.save_pretrained(tmp_path / "model")
    budget = DictionaryBudget(n_features=16, k_crosscoder=4, k_layerwise=2, steps=5, batch=32)
    config = SubjectStudyConfig(
        subject=str(tmp_path / "model"),
        text=str(texts),
        context=16,
        dictionaries=budget,
        seeds=(0,),
        nulls=(),
        tokens_train=400,
        tokens_held_out=100,
        splice_blocks=2,
    )
    results = run_subject_study(config, folder=tmp_path / "study", workers=1)
    said = capsys.readouterr()
    assert "no loss is measured: not causal: token" in said.out + said.err
    assert [row.value for row in results.rows.select("held_out_loss")] == [None]
    assert not results.rows.select("clean_loss")


def test_a_model_that_is_not_there_leaves_no_folder(tmp_path):
    config = SubjectStudyConfig(subject=str(tmp_path / "no-model.gguf"))
    with pytest.raises((OSError, ValueError), match=r"no-model\.gguf"):
        run_subject_study(config, folder=tmp_path / "runs" / "study")
    assert not (tmp_path / "runs").exists()


def test_weights_too_coarse_for_single_features_have_a_reason_and_the_study_goes_on(tmp_path):
    import transformers

    texts = write_texts(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    with torch.random.fork_rng():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=270, **sizes))
    model.save_pretrained(tmp_path / "model")
    config = SubjectStudyConfig(
        subject=str(tmp_path / "model"),
        text=str(texts),
        context=16,
        loading=Loading(dtype="bfloat16"),
        dictionaries=DictionaryBudget(n_features=16, k_crosscoder=4, k_layerwise=2, steps=5, batch=32),
        seeds=(0,),
        nulls=("frozen_encoder", "gaussian"),
        causal_features=2,
        tokens_train=400,
        tokens_held_out=100,
        splice_blocks=2,
    )
    rows = run_subject_study(config, folder=tmp_path / "study", workers=1).rows
    found = {row.at.state: row for row in rows.select("causal_layers")}
    assert set(found) == {"trained", "frozen_encoder"}
    assert all(row.value is None and "load it in float32" in row.missing for row in found.values())
    assert rows.values("clean_loss", state="trained")
