"""Files of tensors that are written a block at a time."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from crosscoder.foundation.tensors import Streamed, read_part, table_of, write_tensors

TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.randn(7, dtype=torch.float64),
    "longer name": torch.arange(6).view(2, 3),
    "scalar": torch.tensor(2.0),
    "bias": torch.randn(4).bfloat16(),
    "half": torch.randn(4, 1, 2).half(),
    "none": torch.empty(0, 3),
    "é": torch.randn(2),
}


@pytest.mark.parametrize("chosen", [tuple(TENSORS), ("b",), ("scalar", "half"), ("none",)])
def test_the_file_is_that_of_safetensors_whatever_the_blocks(chosen, tmp_path):
    tensors = {name: TENSORS[name] for name in chosen}
    save_file(tensors, tmp_path / "theirs")
    write_tensors(tensors, tmp_path / "ours")
    streamed = {n: Streamed(tuple(t.shape), t.dtype, (row for row in t.reshape(-1, 1))) for n, t in tensors.items()}
    write_tensors(streamed, tmp_path / "streamed")
    expected = (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").read_bytes() == expected
    assert (tmp_path / "streamed").read_bytes() == expected


@pytest.mark.parametrize("n_rows", [2, 4])
def test_a_tensor_that_comes_with_other_numbers_than_it_has_is_refused(n_rows, tmp_path):
    streamed = {"a": torch.zeros(2), "b": Streamed((3, 5), torch.float32, torch.randn(n_rows, 5)), "c": torch.zeros(2)}
    with pytest.raises(ValueError, match=re.escape(f"b came with {20 * (n_rows - 3):+} bytes")):
        write_tensors(streamed, tmp_path / "file")


def test_tensors_that_lie_otherwise_in_memory_are_written_in_their_order(tmp_path):
    wide = torch.randn(4, 6)
    save_file({"a": wide.t().contiguous(), "b": wide[:1, :1].clone()}, tmp_path / "theirs")
    write_tensors({"a": wide.t(), "b": wide[:, ::3][:1, :1]}, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_pieces_are_read_in_their_order(tmp_path):
    save_file(TENSORS, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as stream:
        table = {name: (one.shape, one.dtype) for name, one in table_of(stream).items()}
        assert table == {name: (one.shape, one.dtype) for name, one in TENSORS.items()}
        read = read_part(stream, "b", [(slice(2, 3),), (slice(0, 1),)])
        assert torch.equal(read, TENSORS["b"][[2, 0]])
        assert torch.equal(read_part(stream, "b", [(slice(None), slice(1, 3))]), TENSORS["b"][:, 1:3])
        assert torch.equal(read_part(stream, "scalar", [()]), TENSORS["scalar"])
