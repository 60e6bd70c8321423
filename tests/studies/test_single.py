"""A study of one model whose next-token loss says nothing."""

import pytest
import torch

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


def test_a_model_that_sees_the_future_has_no_loss_and_is_not_spliced(tmp_path, capsys):
    import transformers

    texts = tmp_path / "texts"
    texts.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        chosen = torch.randint(0, len(WORDS), (120,), generator=generator).tolist()
        (texts / f"{number}.txt").write_text(" ".join(WORDS[word] for word in chosen))
    train_tokenizer([path.read_text() for path in texts.iterdir()], vocab_size=270).save_pretrained(tmp_path / "model")
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
