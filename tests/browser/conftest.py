"""A tiny subject with its own text, dictionaries that read it, and a real browser where there is one."""

from __future__ import annotations

import re

import pytest
from chromium import Chromium, find_browser
from feature_folder import SITES, made

from crosscoder import Crosscoder, LayerwiseSAE, TopK
from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.sources import SiteSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import build_subject, load_model, model_origin
from crosscoder.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def subject(tmp_path_factory):
    """A folder with `model`, its `tokens`, and dictionaries of its residual stream and of what its blocks write."""
    root = tmp_path_factory.mktemp("subject")
    words = re.findall(r"\w+", "the cat sat on a mat and saw one dog run past two old red barns by a slow wide river")
    (root / "texts").mkdir()
    for i in range(24):
        chosen = " ".join(words[(i * 7 + j * j) % len(words)] for j in range(200))
        (root / "texts" / f"{i:02}.txt").write_text(chosen)
    tokenizer = train_tokenizer([path.read_text() for path in (root / "texts").iterdir()], vocab_size=280)
    tokenizer.save_pretrained(root / "model")
    built = build_subject(2, 32, vocab_size=len(tokenizer), context=32, seed=0)
    built.save_pretrained(root / "model")
    prepare_tokens(
        str(root / "texts"), tokenizer=tokenizer, sequence_length=16, held_out_fraction=0.3, folder=root / "tokens"
    )
    write_dictionaries(root)
    return root


def write_dictionaries(root):
    """Untrained ones are as good as others here."""
    from crosscoder.data.tokens import PreparedTokens

    tokens, model = PreparedTokens.load(root / "tokens"), load_model(root / "model")
    origin = model_origin(model, str(root / "model"))
    for kind, layers in SITES.items():
        harvester = ResidualHarvester(model, layers=layers, origin=origin)
        source = SiteSource(ActivationStream(harvester, tokens.train, ahead=False), None, kind)
        for form, seed in ((Crosscoder, 0), (Crosscoder, 1), (LayerwiseSAE, 0)):
            one = form(n_layers=2, d_model=32, n_features=24, sparsity=TopK(k=3), seed=seed)
            one.set_input(source.scale_L, source.reads)
            one.save_pretrained(root / f"{kind}-{form.__name__}{seed}")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The page of three hundred features whose tokens are as hostile as can be."""
    return made(tmp_path_factory.mktemp("made") / "features")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("no browser: install Chromium, or name one in CROSSCODER_CHROMIUM")
    one = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture
def page(chromium, folder):
    """The page of `folder`, opened afresh; nothing may be said in its console, and nothing asked of anybody."""
    chromium.said.clear()
    chromium.requests.clear()
    chromium.resize(1280)
    chromium.open(folder)
    yield chromium
    assert chromium.said == []
    assert all(one.startswith((folder.parent.as_uri(), "about:")) for one in chromium.requests), chromium.requests
