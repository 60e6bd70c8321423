"""The page of the library's calls is what its docstrings say now, and shows all that the package exports."""

import inspect
from pathlib import Path

import pytest

import crosscoder
from crosscoder import Crosscoder, DictionaryConfig, train, train_many, train_warm_chain

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import write_api_docs

    return write_api_docs.render()


def test_the_page_is_current(page):
    assert (ROOT / "docs" / "api.md").read_text() == page, "run scripts/write_api_docs.py"


def test_all_that_is_exported_is_on_it(page):
    for name in crosscoder.__all__:
        assert f"### {name}\n" in page, name
        assert inspect.getdoc(getattr(crosscoder, name)), name
    assert set(crosscoder.__all__) <= set(dir(crosscoder))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        crosscoder.trian  # noqa: B018


def test_signatures_name_every_setting():
    def named(function):
        return {
            name: one.default
            for name, one in inspect.signature(function).parameters.items()
            if one.kind is inspect.Parameter.KEYWORD_ONLY
        }

    fields = {name: one.default for name, one in inspect.signature(DictionaryConfig).parameters.items()}
    assert named(Crosscoder) == fields | {"shard": None}  # which is where it lies, and no setting
    for function in (Crosscoder, train, train_many, train_warm_chain):
        kinds = {one.kind for one in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert named(train_warm_chain) == named(train)
    assert named(train).items() <= named(train_many).items()
