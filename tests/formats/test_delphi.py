"""The cache that delphi explains: what its own code writes of the same latents."""

import json

import numpy as np
import pytest
import torch
from folders import GOLDEN
from safetensors.numpy import load_file

from crosscoder.formats.activity import Activity
from crosscoder.formats.delphi import save_delphi

THEIRS = GOLDEN / "delphi"


def activity(latents, tokens, name="layers.4"):
    """What a dictionary with these latents `[n, S, F]` does."""
    where = latents.nonzero()
    read = torch.ones(tokens.shape, dtype=torch.bool)
    columns = (column.int().numpy() for column in where.unbind(1))
    return Activity(name, latents.shape[2], tokens, read, *columns, latents[tuple(where.T)].numpy())


def test_the_files_are_those_that_delphi_writes(tmp_path):
    given = {name: torch.from_numpy(array) for name, array in load_file(THEIRS / "expected.safetensors").items()}
    save_delphi(activity(**given), tmp_path, model_name="tiny", n_splits=2)
    ours, theirs = tmp_path / "layers.4", THEIRS / "latents/layers.4"
    names = {path.name for path in theirs.iterdir()}
    assert names == {"0_7.safetensors", "8_15.safetensors", "config.json"}
    assert {path.name for path in ours.iterdir()} == {*names, "MANIFEST.json"}
    for name in names - {"config.json"}:
        expected, found = load_file(theirs / name), load_file(ours / name)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert found[key].dtype == array.dtype
            np.testing.assert_array_equal(found[key], array)
    said, config = (json.loads((folder / "config.json").read_text()) for folder in (theirs, ours))
    assert said.keys() == config.keys()
    assert config["cache_ctx_len"] == said["cache_ctx_len"]
    assert config["n_tokens"] == said["n_tokens"]


def test_many_latents_and_large_values(tmp_path, capsys):
    latents = torch.zeros(1, 2, 70_000)
    latents[0, 1, 69_999], latents[0, 0, 3] = 1e6, 2.0
    save_delphi(activity(latents, torch.zeros(1, 2, dtype=torch.int64)), tmp_path, model_name="tiny", n_splits=1)
    held = load_file(tmp_path / "layers.4/0_69999.safetensors")
    assert held["locations"].dtype == np.uint32
    assert held["locations"].tolist() == [[0, 0, 3], [0, 1, 69_999]]
    assert held["activations"].tolist() == [2.0, 65504.0]
    assert "1 activations above 65504" in capsys.readouterr().err
    with pytest.raises(ValueError, match="n_splits is 0"):
        save_delphi(activity(latents, torch.zeros(1, 2)), tmp_path / "other", model_name="tiny", n_splits=0)
