"""What the tests of the commands share: a small text, a pipeline over it, a model with its tokenizer."""

import json
import re

import pytest
from tokenizers import processors

from crosscoder import load_dictionary
from crosscoder.cli import main
from crosscoder.data.subject import build_subject
from crosscoder.data.tokenizer import END_OF_TEXT, train_tokenizer

K = {"crosscoder": ("--budget.k-crosscoder", "8"), "layerwise": ("--budget.k-layerwise", "8")}
SMALL = ("--budget.n-features", "64")
FORTY = (*SMALL, *K["crosscoder"], "--budget.steps", "40", "--budget.batch", "128", "--checkpoint-every", "20")


def n_parameters(folder):
    """As `--dry-run` prints it."""
    return f"{sum(p.numel() for p in load_dictionary(folder).parameters()):,}"


def measured(folder, acts, capsys):
    """What `evaluate` prints of the dictionary that was trained into `folder`."""
    capsys.readouterr()
    assert main(["evaluate", "--json", "--dictionary", str(folder / "dictionary"), "--activations", str(acts)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = re.findall(r"\w+", "the cat sat on a mat and saw one dog run past two old red barns by a slow wide river")
    for i in range(40):
        chosen = [words[(i * 7 + j * j) % len(words)] for j in range(300)]
        (folder / f"{i:02}.txt").write_text(" ".join(chosen))
    return folder


@pytest.fixture(scope="module")
def pipeline(texts, tmp_path_factory):
    """prepare, train-subject, harvest, train: each from what the one before it wrote."""
    root = tmp_path_factory.mktemp("pipeline")
    tokens, subject, acts, cc = (str(root / name) for name in ("tokens", "subject", "acts", "cc"))
    steps = [
        ["prepare", "--text", str(texts), "--vocab-size", "280", "--context", "32", "--out", tokens],
        [
            *["train-subject", "--tokens-folder", tokens, "--out", subject, "--n-layers", "2", "--d-model", "32"],
            *["--tokens", "8000", "--batch", "4", "--n-checkpoints", "2"],
        ],
        [
            *["harvest", "--subject", f"{subject}/step-62", "--tokens-folder", tokens, "--out", acts],
            *["--max-tokens", "3000", "--max-held-out-tokens", "500"],
        ],
        ["train", "--activations", acts, "--out", cc, *FORTY],
    ]
    for arguments in steps:
        assert main(arguments) == 0, arguments
    return root


@pytest.fixture(scope="module")
def own_model(texts, tmp_path_factory):
    """A model with its tokenizer, which puts `<|endoftext|>` before a text, as some do."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["some text of a cat, and of a river"], vocab_size=270)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    tokenizer.save_pretrained(folder)
    build_subject(1, 32, vocab_size=len(tokenizer), context=64, seed=0).save_pretrained(folder)
    return folder
