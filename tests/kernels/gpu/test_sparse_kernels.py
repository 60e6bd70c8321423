"""The sparse kernels against their definitions: on the CPU under Triton's interpreter, on a GPU compiled."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import triton_kernels as ops
from triton_kernels import reference
from triton_kernels.gpu import feature_major as transpose
from triton_kernels.gpu import tiles

pytestmark = pytest.mark.usefixtures("nan_empty")

NAMES = ["gather_sum", "gather_dot", "scatter_outer", "decode_loss", "backward_decoder", "backward_encoder"]
SHORT_CHUNK, LONG_CHUNK, SHORT_STEP, LONG_STEP = 4, transpose.CHUNK, 2, tiles.MOST_PAIRS


class Shape(NamedTuple):
    n_tokens: int
    n_groups: int
    n_features: int
    n_parts: int
    part: int
    most: int | None  # at most so many pairs a row; None: every feature in every row
    least: int = 0


SHAPES = {
    "primes": Shape(7, 1, 13, 1, 263, 6),
    "three dictionaries": Shape(3, 3, 5, 1, 67, 4),
    "parts": Shape(5, 1, 7, 3, 43, 4),
    "three dictionaries of two parts": Shape(2, 3, 3, 2, 5, 2),
    "one pair a row": Shape(6, 1, 11, 2, 8, 1, 1),
    "all features": Shape(5, 1, 6, 1, 17, None),
    "one token": Shape(1, 2, 9, 1, 33, 5, 5),
    "width one": Shape(4, 1, 3, 1, 1, 2),
    "no pairs": Shape(3, 2, 4, 1, 9, 0),
    "no tokens": Shape(0, 2, 4, 1, 9, 0),
}

EVERY_DTYPE = ["primes", "three dictionaries", "parts"]  # the edge cases run in float32
CASES = [(shape, torch.float32) for shape in SHAPES] + [
    (shape, dtype) for shape in EVERY_DTYPE for dtype in (torch.float64, torch.bfloat16)
]


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    """Chunks of two steps of two pairs, so that the sizes that the interpreter can run take several of each."""
    monkeypatch.setattr(transpose, "CHUNK", SHORT_CHUNK)
    monkeypatch.setattr(tiles, "MOST_PAIRS", SHORT_STEP)


def arguments_of(shape, dtype, device, seed=0):
    """Each kernel's arguments: a code with feature 0 in every row that has a pair and the last feature in none."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens, n_groups, n_features, n_parts, part, most, least = shape
    rows, width, chosen = n_tokens * n_groups, n_parts * part, []
    for row in range(rows):
        if most is None:
            features = torch.arange(n_features)
        else:
            length = int(torch.randint(least, most + 1, (1,), generator=generator))
            features = torch.randperm(n_features - 2, generator=generator)[: max(0, length - 1)] + 1
            features = torch.cat([torch.zeros(min(1, length), dtype=torch.int64), features.sort().values])
        chosen.append(features + row % n_groups * n_features)
    lengths = torch.tensor([0, *map(len, chosen)])
    features_P = torch.cat([torch.zeros(0, dtype=torch.int64), *chosen]).to(torch.int32)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    values_P, code = normal(len(features_P)), (features_P.to(device), lengths.cumsum(0).to(device))
    x_BGN, table_GFN = normal(n_tokens, n_groups, width), normal(n_groups, n_features, width)
    row_GN, weight_GL = normal(n_groups, width), normal(n_groups, n_parts)
    x_RN, table_FN = x_BGN.flatten(0, 1), table_GFN.flatten(0, 1)
    arguments = {
        "gather_sum": (values_P, *code, table_FN),
        "gather_dot": (x_RN, *code, table_FN),
        "scatter_outer": (values_P, *code, x_RN, n_groups * n_features),
        "decode_loss": (values_P, *code, table_GFN, row_GN, x_BGN, n_parts),
        "backward_decoder": (values_P, *code, x_BGN, weight_GL, table_GFN),
        "backward_encoder": (values_P, *code, x_BGN, row_GN, n_features),
    }

    return {name: (getattr(ops, name), given) for name, given in arguments.items()}


def run(function, arguments):
    result = function(*arguments)
    return [result] if isinstance(result, Tensor) else list(result)


def widened(arguments, dtype):
    is_real = lambda value: isinstance(value, Tensor) and value.is_floating_point()
    return [value.to(dtype) if is_real(value) else value for value in arguments]


def check(name, arguments, results):
    """Every result errs at most twice as much as the definition in the same dtype, against float64.

    A rounding of the largest element is allowed besides: the definition's own error is zero where it adds nothing.
    In float64 itself, where the definition is the truth, sixteen roundings.
    """
    define = getattr(reference, name)
    truths = run(define, widened(arguments, torch.float64))
    for result, truth, plain in zip(results, truths, run(define, arguments), strict=True):
        assert result.shape == truth.shape
        if truth.numel() == 0:
            continue
        units = 16 if plain.dtype == torch.float64 else 1
        rounding = units * torch.finfo(plain.dtype).eps * truth.abs().max()
        allowed = 2 * (plain.double() - truth).abs().max() + rounding
        assert (result.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_kernels_err_at_most_twice_as_much_as_torch(shape, dtype, name, device):
    function, arguments = arguments_of(SHAPES[shape], dtype, device)[name]
    check(name, arguments, run(function, arguments))


@pytest.mark.parametrize("name", NAMES)
def test_a_perturbed_element_is_noticed(name, device):
    function, arguments = arguments_of(SHAPES["three dictionaries"], torch.float32, device)[name]
    results = run(function, arguments)
    for place, result in enumerate(results):
        wrong = [other.clone() for other in results]
        wrong[place].view(-1)[result.numel() // 2] += 1e-4 * result.abs().max()
        with pytest.raises(AssertionError):
            check(name, arguments, wrong)
        wrong[place].view(-1)[result.numel() // 2] = float("nan")
        with pytest.raises(AssertionError):
            check(name, arguments, wrong)


@pytest.mark.parametrize("name", NAMES)
def test_bits_depend_neither_on_the_run_nor_on_the_order_of_programs(name, device, shuffled_programs):
    function, arguments = arguments_of(SHAPES["three dictionaries"], torch.float32, device)[name]
    first = run(function, arguments)
    with shuffled_programs(1):
        second = run(function, arguments)
    transpose.feature_major.clear()
    with shuffled_programs(2):
        third = run(function, arguments)
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name, device):
    """Every tensor comes with gaps, and the first (values or rows of a gradient) also expanded from one element."""
    function, arguments = arguments_of(SHAPES["three dictionaries"], torch.float32, device)[name]
    spread = lambda tensor: torch.stack([tensor, tensor], -1)[..., 0]
    gapped = [spread(value) if isinstance(value, Tensor) else value for value in arguments]
    for one, two in zip(run(function, arguments), run(function, gapped), strict=True):
        assert torch.equal(one, two)
    expanded = (torch.ones((), device=device).expand(arguments[0].shape), *arguments[1:])
    for one, two in zip(run(function, expanded), run(function, (expanded[0].clone(), *arguments[1:])), strict=True):
        assert torch.equal(one, two)


def test_an_expanded_error_is_read_as_such(device):
    _, arguments = arguments_of(SHAPES["parts"], torch.float32, device)["backward_decoder"]
    error = torch.full((), 0.5, device=device).expand(arguments[3].shape)
    arguments = (*arguments[:3], error, *arguments[4:])
    check("backward_decoder", arguments, run(ops.backward_decoder, arguments))
    x = torch.full((), 0.5, device=device).expand(arguments[3].shape)
    arguments = (*arguments[:3], x, x[0], arguments[5].shape[1])
    check("backward_encoder", arguments, run(ops.backward_encoder, arguments))


@pytest.mark.parametrize("name", ["gather_sum", "gather_dot", "decode_loss", "backward_decoder", "backward_encoder"])
def test_narrow_tables_and_activations_are_summed_in_float32(name, device):
    """The tensor gathered is bf16 and the rest float32, as with a working copy or stored activations."""
    function, arguments = arguments_of(SHAPES["three dictionaries"], torch.float32, device)[name]
    place = {"gather_sum": 3, "gather_dot": 3, "decode_loss": 5, "backward_decoder": 3, "backward_encoder": 3}[name]
    narrow = [*arguments[:place], arguments[place].bfloat16(), *arguments[place + 1 :]]
    rounded = [*arguments[:place], narrow[place].float(), *arguments[place + 1 :]]
    for one, two in zip(run(function, narrow), run(function, rounded), strict=True):
        bound = 1e-2 if one.dtype == torch.bfloat16 else 1e-4  # the block sizes, hence the order of sums, may differ
        torch.testing.assert_close(one.float(), two, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", NAMES)
def test_steps_and_chunks_of_their_full_length(name, device, monkeypatch):
    """A feature in each of 150 rows has two chunks; a row of 21 pairs has two steps of the widest tile."""
    monkeypatch.setattr(transpose, "CHUNK", LONG_CHUNK)
    monkeypatch.setattr(tiles, "MOST_PAIRS", LONG_STEP)
    function, arguments = arguments_of(Shape(150, 1, 2, 1, 1, None), torch.float32, device)[name]
    check(name, arguments, run(function, arguments))
    function, arguments = arguments_of(Shape(2, 1, 23, 1, 7, 21, 21), torch.float32, device)[name]
    check(name, arguments, run(function, arguments))


def test_a_feature_in_every_row_is_cut_into_chunks_and_a_dead_one_gets_a_zero_row(device):
    shape = Shape(19, 1, 4, 1, 37, 3, 1)
    _, arguments = arguments_of(shape, torch.float32, device)["scatter_outer"]
    values, features, offsets, _, n_features = arguments
    major = transpose.feature_major(features, offsets, n_features)
    assert (major.starts.diff()[0], major.starts.diff()[-1]) == (19, 0)
    assert (major.chunks[:, 0] == 0).sum() == 5
    assert (major.scratch_features == 0).sum() == 4
    result = ops.scatter_outer(*arguments)
    check("scatter_outer", arguments, [result])
    assert result[-1].eq(0).all()
    assert len(major.chunks) == n_features + len(values) // SHORT_CHUNK


@pytest.mark.parametrize("lengths", [[0], [4, 4, 0, 4], [5, 0, 0, 9, 1], [0, 0, 3], [1] * 9])
def test_chunks_cover_every_pair_once_in_order(lengths, device):
    features = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    features = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))].to(torch.int32)
    offsets = torch.tensor([0, 0, len(features) // 2, len(features), len(features)])
    major = transpose.feature_major(features.to(device), offsets.to(device), len(lengths))
    used = [chunk for chunk in major.chunks.tolist() if chunk[0] < len(lengths)]
    assert [pair for _, begin, end, _ in used for pair in range(begin, end)] == list(range(len(features)))
    assert all(end - begin <= SHORT_CHUNK for _, begin, end, _ in used)
    assert sorted({chunk[0] for chunk in used}) == list(range(len(lengths)))
    spare = [chunk for chunk in used if chunk[3] >= 0]
    assert [chunk[3] for chunk in spare] == list(range(len(spare)))
    assert major.scratch_features.tolist()[: len(spare)] == [chunk[0] for chunk in spare]
    assert set(major.scratch_features.tolist()[len(spare) :]) <= {len(lengths)}
    assert torch.equal(major.rows_P.cpu(), reference.row_of_pair(offsets, len(features)).int()[major.order_P.cpu()])
    for feature in range(len(lengths)):
        begin, end = major.starts[feature : feature + 2].tolist()
        assert major.order_P[begin:end].tolist() == (features == feature).nonzero()[:, 0].tolist()


def test_the_transpose_is_kept_until_the_code_changes(device):
    features = torch.tensor([0, 2, 1], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, 2, 3], device=device)
    first = transpose.feature_major(features, offsets, 3)
    assert transpose.feature_major(features, offsets, 3) is first
    assert transpose.feature_major(features.clone(), offsets, 3) is not first
    assert transpose.feature_major(features, offsets, 4).starts.tolist() == [0, 1, 2, 3, 3]
    assert transpose.feature_major(features, offsets, 3).starts.tolist() == [0, 1, 2, 3]
    features[0] = 1
    assert transpose.feature_major(features, offsets, 3).starts.tolist() == [0, 0, 2, 3]
    with torch.inference_mode():
        inferred = features.clone()
        assert transpose.feature_major(inferred, offsets, 3).starts.tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize("width", [1, 5, 192, 576, 768, 1024, 9216])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("gathered_rows", [1, 32768, 131072])
def test_tiles_are_powers_of_two_that_waste_little(width, itemsize, gathered_rows):
    for most in (512, 1024):
        tile = tiles.gather_tile(width, itemsize, gathered_rows, most_row_bytes=most)
        assert tile.columns & (tile.columns - 1) == 0
        assert tile.pairs & (tile.pairs - 1) == 0
        assert tile.columns * itemsize <= most
        n_tiles = -(-width // tile.columns)
        assert n_tiles == 1 or n_tiles * tile.columns <= 1.125 * width or tile.columns * itemsize == 256
