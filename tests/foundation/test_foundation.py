"""Folders that are whole or absent, and settings that are checked."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, PositiveInt

from crosscoder.foundation import artifact
from crosscoder.foundation.artifact import (
    MANIFEST,
    DamagedArtifactError,
    committed_directory,
    read_json,
    verify_directory,
    write_json,
)
from crosscoder.foundation.config import config, from_mapping, to_mapping
from crosscoder.foundation.console import Progress
from crosscoder.foundation.origin import ModelOrigin, Reads, TokenOrigin, require_same

SCHEMA = "test/1"


def write(folder, content="hello"):
    with committed_directory(folder, schema=SCHEMA) as temporary:
        (temporary / "a.txt").write_text(content)


def test_a_finished_folder_verifies(tmp_path):
    write(tmp_path / "x")
    verify_directory(tmp_path / "x", schema=SCHEMA)
    assert read_json(tmp_path / "x" / MANIFEST)["files"]["a.txt"]["bytes"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path):
    write(tmp_path / "x", "old")

    def fail_halfway():
        with committed_directory(tmp_path / "x", schema=SCHEMA) as temporary:
            (temporary / "a.txt").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_files_are_flushed_before_the_manifest_and_the_rename(tmp_path, monkeypatch):
    events = []
    sync, rename = artifact.sync_path, artifact._rename_into_place
    monkeypatch.setattr(artifact, "sync_path", lambda path: (events.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(artifact, "_rename_into_place", lambda a, b: (events.append(("rename", b.name)), rename(a, b)))
    write(tmp_path / "x")
    kinds = [(kind, name if name in ("a.txt", "x") else "folder") for kind, name in events]
    assert kinds == [("sync", "a.txt"), ("sync", "folder"), ("rename", "x"), ("sync", "folder")]


@pytest.mark.parametrize("damage", ["append", "flip", "remove", "dangle", "link"])
def test_damage_is_named(tmp_path, damage):
    write(tmp_path / "x")
    path = tmp_path / "x" / "a.txt"
    if damage == "append":
        path.write_text("hello!")
    elif damage == "flip":
        path.write_text("hellp")
    else:
        path.unlink()
        if damage != "remove":
            path.symlink_to(tmp_path / "elsewhere")
        if damage == "link":
            (tmp_path / "elsewhere").write_text("hellp")
    with pytest.raises(DamagedArtifactError, match=r"a\.txt"):
        verify_directory(tmp_path / "x", schema=SCHEMA)


def test_a_link_to_what_was_written_is_as_good(tmp_path):
    """As in the cache of the Hub; where hashes are not checked a link could lead anywhere."""
    write(tmp_path / "x")
    path = tmp_path / "x" / "a.txt"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    verify_directory(tmp_path / "x", schema=SCHEMA)
    with pytest.raises(DamagedArtifactError, match=r"a\.txt"):
        verify_directory(tmp_path / "x", schema=SCHEMA, hashes=False)


def test_another_schema_and_escaping_names_are_refused(tmp_path):
    write(tmp_path / "x")
    with pytest.raises(DamagedArtifactError, match="holds 'test/1', expected 'other/1'"):
        verify_directory(tmp_path / "x", schema="other/1")
    write_json(tmp_path / "x" / MANIFEST, {"schema": SCHEMA, "files": {"../secret": {"bytes": 1, "sha256": ""}}})
    with pytest.raises(DamagedArtifactError, match="not a plain file name"):
        verify_directory(tmp_path / "x", schema=SCHEMA)


def test_files_are_readable_by_others_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        write(tmp_path / "x")
    finally:
        os.umask(old)
    assert (tmp_path / "x" / "a.txt").stat().st_mode & 0o777 == 0o644


def test_json_refuses_what_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
    (tmp_path / "y.json").write_text('{"a": NaN}')
    with pytest.raises(DamagedArtifactError, match=r"y\.json is not valid JSON"):
        read_json(tmp_path / "y.json")


@config
class Left:
    k: PositiveInt = 1


@config
class Right:
    k: int = 1
    weight: float = 0.5


@config(kw_only=False)
class Outer:
    name: str
    rate: Annotated[float, Field(ge=0)] = 0.1
    sizes: tuple[int, ...] = (1, 2)
    folder: Path | None = None
    side: Left | Right = Left()
    inner: Left = Left()

    def __post_init__(self):
        if len(self.sizes) > 3:
            raise ValueError("too many sizes")


def test_configs_round_trip():
    outer = Outer("x", rate=2, sizes=(3,), folder=Path("a"), side=Right(k=4))
    mapping = to_mapping(outer)
    assert mapping == {
        "name": "x",
        "rate": 2,
        "sizes": [3],
        "folder": "a",
        "side": {"kind": "Right", "k": 4, "weight": 0.5},
        "inner": {"k": 1},
    }
    assert from_mapping(Outer, json.loads(json.dumps(mapping))) == outer
    assert hash(replace(outer, name="x")) == hash(outer)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"nam": "x"}, "^Outer: missing name; unknown setting 'nam'; did you mean 'name'[?]$"),
        ({"rate": 1.0}, "^Outer: missing name$"),
        ({"name": "x", "rate": float("nan")}, "rate is nan; expected a finite number$"),
        ({"name": "x", "rate": -1}, "rate is -1; expected a number greater than or equal to 0$"),
        ({"name": "x", "sizes": [1, 2.5]}, r"sizes\[1\] is 2.5; expected a valid integer"),
        ({"name": "x", "sizes": [1, 2, 3, 4]}, "^Outer: too many sizes$"),
        (
            {"name": "x", "sizes": ["a"] * 100},
            r"sizes\[11\] is 'a'; expected a valid integer; and 88 more of the kind$",
        ),
        ({"name": "x", "side": 3}, "side is 3; expected an instance of Left or an instance of Right$"),
        ({"name": "x", "side": {"kind": "Middle"}}, "kind is 'Middle', expected one of"),
        ({"name": "x", "side": {"kind": "Left", "weight": 1.0}}, "^Outer.side: unknown setting 'weight'"),
        ({"name": "x", "inner": {"k": "1"}}, "^Outer.inner: k is '1'; expected a valid integer$"),
        ([1], "expected a table of settings, got list"),
    ],
)
def test_wrong_configs_are_refused_with_the_mend(mapping, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(Outer, mapping)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Outer(3), "^name is 3; expected a valid string$"),
        (lambda: Outer("x", rate="2"), "^rate is '2'; expected a valid number$"),
        (lambda: Outer("x", rats=2), "^unknown setting 'rats'; did you mean 'rate'[?]$"),
        (lambda: replace(Outer("x"), rate=float("inf"), name=1), "^name is 1; [^;]*; rate is inf; expected a finite"),
        (lambda: replace(Left(), k=True), "^k is True; expected a valid integer$"),
    ],
)
def test_wrong_settings_are_refused_where_a_config_is_made_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_progress_writes_plain_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("crosscoder.foundation.console.SECONDS_BETWEEN_LINES", 0.0)
    with Progress("work", 3, unit="step") as progress:
        progress.advance(2, loss=0.5)
    assert "work: 2/3 step" in (text := capsys.readouterr().err)
    assert "loss 0.5" in text
    assert "\r" not in text


def test_the_time_left_is_that_of_what_was_done_since_the_first(capsys, monkeypatch):
    """Neither what a resumed run did before, nor how long the first batch took to come, is of the rate."""
    monkeypatch.setattr("crosscoder.foundation.console.SECONDS_BETWEEN_LINES", 0.0)
    clock = iter([0.0, 100.0, 110.0, 130.0])
    monkeypatch.setattr("crosscoder.foundation.console.time.monotonic", lambda: next(clock))
    with Progress("training", 1004, unit="step", initial=1000) as progress:
        for _ in progress.from_first(range(2)):
            progress.advance(tokens=512)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "training: 1,001/1,004 step  0.1/s  about 30 s left  tokens/s 51.2"
    assert second == "training: 1,002/1,004 step  0.0667/s  about 30 s left  tokens/s 34.13"


def test_blocks_of_another_length_are_said_and_let_through(capsys):
    def reads(context):
        tokens = TokenOrigin(tokenizer="a" * 64, context=context)
        return Reads(model=ModelOrigin(name="tiny", weights="b" * 64), tokens=tokens, site="residual", sites=(1,))

    require_same(reads(128), reads(128), owner="the dictionary", given="the activations")
    assert not capsys.readouterr().err
    require_same(reads(128), reads(512), owner="the dictionary", given="the activations")
    assert (
        "the dictionary comes from blocks of 128 tokens, the activations from blocks of 512" in capsys.readouterr().err
    )


def test_a_published_dictionary_has_the_tokens_that_it_is_read_on():
    ours = Reads(
        model=ModelOrigin(name="m", weights="1234"),
        tokens=TokenOrigin(tokenizer="abcd", context=8),
        site="residual",
        sites=(1, 2),
    )
    other = replace(ours.tokens, special_ids=(7,))
    assert ours.on_tokens(other) == ours
    published = replace(ours, published="somebody's")
    assert published.on_tokens(other).tokens.special_ids == (7,)
    assert published.on_tokens(None) == published
