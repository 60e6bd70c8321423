"""The README's example and commands are run as they stand; links, letters and the file tree name what exists."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from crosscoder.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HOUSE = (ROOT / "docs" / "house.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_library_example_runs_and_learns(capsys):
    example = re.search(r"## Ten lines.*?```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), {})
    shape, error = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert shape == "torch.Size([256, 128])"
    assert float(error) < 1.0  # the batch's own mean square is about 3


def test_a_newcomer_can_read_it():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(len(line.split()) for line in re.split(r"\n\n|\n- ", README)) < 120  # no walls of words
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", ["README.md", "docs/sharing.md"])
def test_its_commands_are_commands(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("$M", "m").replace("\\\n", "")
    commands = re.findall(r"^crosscoder ([^#\n]*)", blocks, re.MULTILINE)
    assert len(commands) > 3
    for command in commands:
        assert main([*command.split(), "--print-config"]) == 0, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_tests_that_pages_name_are_there():
    named = [
        one
        for page in PAGES
        for one in re.findall(r"`(?:tests/)?((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", page.read_text())
    ]
    assert len(named) > 50
    for file, test in named:
        path = ROOT / "tests" / file
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(), (file, test)


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_what_is_no_module_is_packed_too():
    """Whatever lies beside the modules is named in the list of package data, or a wheel would lack it."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("crosscoder", "triton_kernels"):
        for path in (ROOT / package).rglob("*"):
            if path.is_dir() or path.suffix in (".py", ".pyc"):
                continue
            inside = path.relative_to(ROOT).as_posix()
            names = [f"{where.replace('.', '/')}/{glob}" for where, globs in data.items() for glob in globs]
            assert any(fnmatch(inside, name) for name in names), inside


def test_the_file_tree_names_what_exists():
    tree = re.search(r"```\n(triton_kernels/.*?)```", HOUSE, re.DOTALL)[1]
    for name in re.findall(r"^(\S+/)", tree, re.MULTILINE):
        assert (ROOT / name).is_dir(), name
    for name in re.findall(r"^  (\w+/)", tree, re.MULTILINE):
        assert any((ROOT / parent / name).is_dir() for parent in ("crosscoder", "triton_kernels")), name
    for name in re.findall(r"(\w+\.py)", tree):
        assert list(ROOT.glob(f"*/{name}")), name


def test_the_letters_are_the_package_s_own():
    import crosscoder

    for letter in "BSLDFKPNGR":
        assert re.search(rf"\| {letter} \|", HOUSE)
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


def test_the_features_page_runs(tmp_path, capsys):
    from dataclasses import replace

    from crosscoder import Crosscoder, TopK
    from crosscoder.data.prepare import prepare_tokens
    from crosscoder.data.subject import build_subject
    from crosscoder.data.tokenizer import train_tokenizer

    page = (ROOT / "docs" / "features.md").read_text()
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(
            "The people of the United States of America in Congress " * (40 + number)
        )
    tokenizer = train_tokenizer(["The people of the United States of America in Congress"] * 5, vocab_size=290)
    model = build_subject(2, 32, vocab_size=len(tokenizer), context=64, seed=0).eval()
    dictionary = Crosscoder(n_layers=2, d_model=32, n_features=64, sparsity=TopK(k=16))
    tokens = prepare_tokens(str(tmp_path), tokenizer=tokenizer, sequence_length=32, held_out_fraction=0.5)
    dictionary.reads = replace(recorded(model, tokenizer), tokens=tokens.held_out.origin)
    names = {"model": model, "tokens": tokens, "dictionary": dictionary.eval()}
    exec(compile(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], "features.md", "exec"), names)
    said = capsys.readouterr().out
    assert len(re.findall(r"^[\d.]+  .*\[", said, re.MULTILINE)) == 3
    assert re.search(r"^sum \[", said, re.MULTILINE)
    assert names["profile"].read_nL.shape == (1, 2)
    from crosscoder.browser.data import FEATURE_SCHEMA

    for column in ("rate", "density", "written", "read", "direction", "layer_precision", "histogram", "nearest"):
        assert column in FEATURE_SCHEMA.names
        assert f"`{column}`" in page
