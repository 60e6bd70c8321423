"""docs/formats.md: its example runs, and it names every library that is read and every refusal that has a name."""

import re
from pathlib import Path
from typing import get_args

from folders import GOLDEN

from crosscoder.formats import saelens
from crosscoder.formats.convert import IMPORTERS, Library, import_dictionary
from crosscoder.formats.dictionary_learning import SAES

PAGE = (Path(__file__).parents[2] / "docs/formats.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {"folder": GOLDEN / "saelens" / "topk"}
    exec(compile(example, "formats.md", "exec"), names)
    assert "sha256" in capsys.readouterr().out
    assert import_dictionary("runs/imported").reads == names["dictionary"].reads


def test_every_library_and_class_is_named():
    assert IMPORTERS.keys() | {"crosscoder"} == set(get_args(Library))
    said = PAGE.lower()
    for name in (*IMPORTERS, *saelens.ARCHITECTURES, *saelens.WHY_NOT, *SAES):
        assert name.lower().replace("-", " ") in said or name.lower() in said, name
