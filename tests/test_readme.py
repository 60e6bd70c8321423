"""The README's example is run as it stands, and its file tree names what exists."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs_and_learns(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), {})
    shape, error = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert shape == "torch.Size([256, 128])"
    assert float(error) < 1.0  # the batch's own mean square is about 3


def test_the_file_tree_names_what_exists():
    tree = re.search(r"```\n(triton_kernels/.*?)```", README, re.DOTALL)[1]
    for name in re.findall(r"^(\S+/)", tree, re.MULTILINE):
        assert (ROOT / name).is_dir(), name
    for name in re.findall(r"^  (\w+/)", tree, re.MULTILINE):
        assert any((ROOT / parent / name).is_dir() for parent in ("crosscoder", "triton_kernels")), name
    for name in re.findall(r"(\w+\.py)", tree):
        assert list(ROOT.glob(f"*/{name}")), name


def test_the_letters_are_the_package_s_own():
    import crosscoder

    for letter in "BSLDFKPNGR":
        assert re.search(rf"\| {letter} \|", README)
        assert re.search(rf"(^|\s){letter}  ", crosscoder.__doc__)


def test_the_interventions_page_runs(tmp_path, capsys):
    from crosscoder import Crosscoder, TopK
    from crosscoder.data.subject import build_subject
    from crosscoder.data.tokenizer import train_tokenizer
    from crosscoder.interventions import Where, replace

    example = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "interventions.md").read_text(), re.DOTALL)[1]
    tokenizer = train_tokenizer(["The people of the United States of America"] * 5, vocab_size=270)
    model = build_subject(2, 32, vocab_size=len(tokenizer), context=64, seed=0).eval()
    dictionary = Crosscoder(n_layers=2, d_model=32, n_features=64, sparsity=TopK(k=64))
    dictionary.reads = recorded(model, tokenizer)
    names = {"model": model, "tokenizer": tokenizer, "dictionary": dictionary}
    exec(compile(example, "interventions.md", "exec"), names)
    assert len(capsys.readouterr().out) > 20
    plain = model(**names["text"], labels=names["text"]["input_ids"])
    assert not torch.equal(names["without"], plain.logits)
    assert names["spliced"] != plain.loss
    with replace(model, dictionary, where=Where("write", (1, 2))):
        assert model(**names["text"], labels=names["text"]["input_ids"]).loss == names["spliced"]


def recorded(model, tokenizer):
    """What a dictionary of both blocks' writes keeps of what it reads."""
    from crosscoder.data.subject import model_origin
    from crosscoder.data.tokenizer import tokenizer_hash
    from crosscoder.foundation.origin import Reads, TokenOrigin

    tokens = TokenOrigin(tokenizer=tokenizer_hash(tokenizer), context=64, special_ids=tuple(tokenizer.all_special_ids))
    return Reads(model=model_origin(model, "tiny"), tokens=tokens, site="write", sites=(1, 2))
