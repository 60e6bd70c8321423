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
