"""Dictionaries to and from the Hub: the real client over HTTP with a server on this machine."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, LayerwiseSAE, TopK, load_dictionary
from crosscoder.cli import main
from crosscoder.dictionary import ModelCard
from crosscoder.foundation.origin import MismatchError, ModelOrigin, Reads, TextOrigin, TokenOrigin
from crosscoder.results.evaluation import Evaluation
from tests.dictionary import hub_server
from tests.dictionary.hub_server import TOKEN


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    with hub_server.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def cc():
    made = Crosscoder(n_layers=2, d_model=4, n_features=16, sparsity=BatchTopK(k=3), seed=7)
    made(torch.randn(32, 2, 4, generator=torch.Generator().manual_seed(0)))
    tokens = TokenOrigin(tokenizer="t" * 64, context=32, text=TextOrigin(source="/home/me/texts", content="c" * 64))
    model = ModelOrigin(name="lab/model", weights="w" * 64, revision="r" * 40)
    made.set_input(torch.tensor([0.5, 2.0]), Reads(model=model, tokens=tokens, site="residual", sites=(3, 4)))
    return made


def evaluation_of(dictionary, **values):
    return Evaluation(about=dictionary.facts().about(["--a=/b/c"]), values=values)


def test_what_is_pushed_is_loaded_and_what_else_is_there_stays(hub, cc):
    address = cc.push_to_hub("lab/cc", message="the first")
    repository = hub.repositories["lab/cc"]
    assert address == f"{hub.url}/lab/cc/commit/{repository.branches['main']}"
    assert repository.messages == ["the first"]
    assert not repository.private
    assert sorted(repository.files()) == ["MANIFEST.json", "README.md", "config.json", "model.safetensors"]
    again = load_dictionary("lab/cc")
    assert again.facts() == cc.facts()
    assert torch.equal(again.threshold, cc.threshold)
    repository.files()["LICENSE"] = b"theirs"
    bank = LayerwiseSAE(n_layers=2, d_model=4, n_features=8, sparsity=TopK(k=3))
    bank.push_to_hub("lab/cc", revision="v2", subfolder="banks/a")
    assert repository.files("v2")["LICENSE"] == b"theirs"
    assert "banks/a/model.safetensors" not in repository.files("main")
    assert type(load_dictionary("lab/cc", revision="v2", subfolder="banks/a")) is LayerwiseSAE
    assert 'load_dictionary("lab/cc", subfolder="banks/a")' in repository.files("v2")["banks/a/README.md"].decode()
    assert Crosscoder.from_pretrained("lab/cc", revision="v2").facts() == cc.facts()


def test_a_readme_that_others_wrote_stays_and_our_own_is_renewed(hub, cc, capsys):
    cc.push_to_hub("lab/cc")
    files = hub.repositories["lab/cc"].files
    cc.push_to_hub("lab/cc", card=ModelCard(about="Of *note*."))
    assert b"Of *note*." in files()["README.md"]
    files()["README.md"] = b"# By hand"
    cc.push_to_hub("lab/cc")
    assert files()["README.md"] == b"# By hand"
    assert "has a README.md of its own, which stays" in capsys.readouterr().err
    cc.push_to_hub("lab/cc", replace_card=True)
    assert b"library_name" in files()["README.md"]


def test_private_is_private_or_refused(hub, cc, monkeypatch):
    cc.push_to_hub("lab/open")
    with pytest.raises(ValueError, match="lab/open is there and public, and private was asked for"):
        cc.push_to_hub("lab/open", private=True)
    assert len(hub.repositories["lab/open"].messages) == 1
    cc.push_to_hub("lab/closed", private=True)
    assert hub.repositories["lab/closed"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        FileNotFoundError, match=r"no repository lab/closed on the Hub or in its cache .* or give token="
    ):
        load_dictionary("lab/closed", token="wrong")
    assert load_dictionary("lab/closed", token=TOKEN).facts() == cc.facts()


def test_a_push_that_cannot_be_is_one_clear_error_and_uploads_nothing(hub, cc):
    with pytest.raises(OSError, match=r"lab/cc could not be written \(.*401.*log in with `hf auth login`"):
        cc.push_to_hub("lab/cc", token="wrong")
    with pytest.raises(ValueError, match="'cc' is no repository; give organisation/name"):
        cc.push_to_hub("cc")
    with pytest.raises(ValueError, match=r"subfolder is '\.\./x'; expected one inside"):
        cc.push_to_hub("lab/cc", subfolder="../x")
    with torch.no_grad():
        cc.encoder[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="encoder holds values that are not finite"):
        cc.push_to_hub("lab/cc")
    assert not hub.repositories


def test_a_server_that_is_not_there_is_said(cc, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="lab/cc could not be written"):
        cc.push_to_hub("lab/cc", token=TOKEN)


def test_the_command_pushes_with_the_numbers_of_an_evaluation(hub, cc, tmp_path):
    """In a process of its own, which is told of the server as any user's would be."""
    cc.save_pretrained(tmp_path / "cc")
    evaluation_of(cc, explained_variance=0.75).save(tmp_path / "numbers.json")
    arguments = ["push", str(tmp_path / "cc"), "lab/told", "--evaluation", str(tmp_path / "numbers.json"), "--private"]
    done = subprocess.run(
        [sys.executable, "-m", "crosscoder", *arguments],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"{hub.url}/lab/told/commit/")
    assert hub.repositories["lab/told"].private
    assert "| explained variance | 0.75 |" in hub.repositories["lab/told"].files()["README.md"].decode()


def test_the_card_prints_what_was_measured_and_says_what_was_not(cc):
    null = Crosscoder(n_layers=2, d_model=4, n_features=16, sparsity=BatchTopK(k=3))
    null.set_input(cc.input_scale, cc.reads.as_null("gaussian"))
    values = {"explained_variance": 0.75, "explained_variance_per_layer": [0.5, 0.875], "dead_share": 0.25}
    card = ModelCard(
        evaluation=evaluation_of(cc, **values, loss_recovered=None),
        nulls=[evaluation_of(null, explained_variance=0.125)],
        license="mit",
        command=("crosscoder", "train", "--activations", "/home/me/acts"),
        trained_tokens=1_000_000,
    ).text(cc.facts(), repo="lab/cc")
    head = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    assert json.loads(head["base_model"]) == "lab/model"
    assert json.loads(head["license"]) == "mit"
    assert "datasets" not in head  # a folder of somebody's own is no data set of the Hub
    for row in (
        "| | this dictionary | null: gaussian |",
        "| explained variance | 0.75 | 0.125 |",
        "| explained variance, layer 3 | 0.5 | not measured |",
        "| explained variance, layer 4 | 0.875 | not measured |",
        "| dead share | 0.25 | not measured |",
        "| loss recovered | undefined | not measured |",
        "| layers | 3, 4 |",
        "| trained on | 1,000,000 tokens |",
    ):
        assert row in card.replace("|  |", "| |"), row
    assert "Not measured: size, L0 per token, " in card
    assert "/home/me" not in card
    assert "crosscoder train --activations acts" in card
    assert "--a=c" in card


def test_a_card_takes_no_number_of_another_dictionary(cc):
    other = Crosscoder(n_layers=2, d_model=4, n_features=16, sparsity=BatchTopK(k=3))
    with pytest.raises(MismatchError, match="the evaluation is of weights"):
        ModelCard(evaluation=evaluation_of(other, explained_variance=0.5)).text(cc.facts())
    mine = evaluation_of(cc, explained_variance=0.5)
    with pytest.raises(MismatchError, match="are of no null"):
        ModelCard(evaluation=mine, nulls=[mine]).text(cc.facts())
    other.frozen = "encoder"
    assert "null: encoder not learnt" in ModelCard(evaluation=mine, nulls=[evaluation_of(other)]).text(cc.facts())


def test_a_folder_of_the_hub_s_cache_is_no_name_on_the_hub(cc):
    model = replace(cc.reads.model, name="/home/somebody/cache/snapshots/abc")
    cc.reads = replace(cc.reads, model=model)
    card = ModelCard().text(cc.facts())
    assert "base_model" not in card
    assert "/home/somebody" not in card


def test_the_folder_s_own_card_is_pushed_if_it_is_of_these_weights(hub, cc, tmp_path, capsys):
    folder = tmp_path / "cc"
    cc.save_pretrained(folder, card=ModelCard(about="From the folder."))
    assert main(["push", str(folder), "lab/cc"]) == 0
    assert b"From the folder." in hub.repositories["lab/cc"].files()["README.md"]
    with torch.no_grad():
        cc.encoder.mul_(2)
    cc.save_pretrained(folder)
    assert main(["push", str(folder), "lab/cc"]) == 2
    assert "is the card of other weights; write it again" in capsys.readouterr().err
    (folder / "README.md").write_text("# By hand")
    assert main(["push", str(folder), "lab/other"]) == 0
    assert hub.repositories["lab/other"].files()["README.md"] == b"# By hand"


def test_names_out_of_files_are_no_markup(cc):
    model = replace(cc.reads.model, name="x|<img src=y>\n# `z`\u202e", revision=None)
    cc.reads = replace(cc.reads, model=model)
    (line,) = [line for line in ModelCard().text(cc.facts()).splitlines() if line.startswith("| base model")]
    assert r"\|\<img src=y\> \# \`z\`" in line
    assert "\u202e" not in line


def test_a_card_of_other_weights_is_told_from_one_of_these(cc, tmp_path, capsys):
    cc.save_pretrained(tmp_path, card=ModelCard())
    cc.save_pretrained(tmp_path)
    assert not capsys.readouterr().err
    with torch.no_grad():
        cc.encoder.mul_(2)
    cc.save_pretrained(tmp_path)
    assert "is the card of other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("about"), "does not say of which dictionary"),
        (lambda found: found["about"].update(schema="x/1"), "is 'x/1', expected 'crosscoder.evaluation/1'"),
        (lambda found: found.update(explained_varianc=1), "no quantity; the nearest is 'explained_variance'"),
        (lambda found: found.update(dead_share="half"), "dead_share is 'half'"),
        (lambda found: found.update(dead_share=2), "dead_share is 2"),
    ],
)
def test_what_is_no_evaluation_is_refused(change, message, cc, tmp_path):
    evaluation_of(cc, dead_share=0.5).save(tmp_path / "a.json")
    assert Evaluation.load(tmp_path / "a.json").values == {"dead_share": 0.5}
    found = json.loads((tmp_path / "a.json").read_text())
    change(found)
    (tmp_path / "a.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        Evaluation.load(tmp_path / "a.json")


def test_without_the_client_the_extra_is_named(cc, tmp_path, monkeypatch):
    cc.save_pretrained(tmp_path / "several" / "a")
    assert load_dictionary(tmp_path / "several", subfolder="a").facts() == cc.facts()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: load_dictionary("lab/cc"), lambda: cc.push_to_hub("lab/cc")):
        with pytest.raises(ImportError, match=r"pip install 'crosscoder\[hub\]'"):
            call()
