"""The row-wise optimiser against torch's AdamW, and against its definition in float64."""

import pytest
import torch

from triton_kernels import adam_rows, reference, row_squares

pytestmark = pytest.mark.usefixtures("nan_empty")

SETTINGS = {"rate": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
SHAPES = [(10, 1), (6, 13), (2, 768), (2, 4099), (2, 9216)]


def state_of(shape, *, unit=False, seed=0):
    parameter = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if unit:
        parameter /= parameter.norm(dim=1, keepdim=True)
    return parameter, torch.zeros(shape), torch.zeros(shape)


def gradients_of(shape, steps=3):
    generator = torch.Generator().manual_seed(1)
    # Rows of very different size, one of them zero: the denominator meets eps.
    size = torch.logspace(-9, 1, shape[0])[:, None] * torch.arange(shape[0]).ge(min(1, shape[0] - 1))[:, None]
    return [torch.randn(shape, generator=generator) * size for _ in range(steps)]


def run(step_function, state, gradients, *, device="cpu", **options):
    """The state and the working copy after the steps, from the dtype of the state."""
    parameter, first, second = (t.clone().to(device) for t in state)
    working = None
    if (dtype := options.pop("working", None)) is not None:
        working = torch.empty(parameter.shape, dtype=dtype, device=device)
    scale = options.pop("scale_G", None)
    for step, gradient in enumerate(gradients, 1):
        step_function(
            parameter, gradient.to(device, parameter.dtype), first, second,
            step=step, **{"weight_decay": 0.0, "unit": False, **SETTINGS, **options},
            scale_G=None if scale is None else scale.to(device, parameter.dtype),
            working_RN=working,
        )  # fmt: skip
    return [None if t is None else t.cpu() for t in (parameter, first, second, working)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_adamw(shape, weight_decay, device):
    state, gradients = state_of(shape), gradients_of(shape)
    parameter, first, second, *_ = run(adam_rows, state, gradients, device=device, weight_decay=weight_decay)
    for implementation in ("fused", "foreach"):
        twin = torch.nn.Parameter(state[0].clone())
        optimizer = torch.optim.AdamW([twin], lr=1e-2, weight_decay=weight_decay, **{implementation: True})
        for gradient in gradients:
            twin.grad = gradient.clone()
            optimizer.step()
        moments = optimizer.state[twin]
        torch.testing.assert_close(parameter, twin.detach(), rtol=3e-7, atol=1e-7)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(parameter + 1e-5, twin.detach(), rtol=3e-7, atol=1e-7)
        assert ((first - moments["exp_avg"]).abs() <= 4e-7 * first.abs().amax(1, keepdim=True)).all()
        torch.testing.assert_close(second, moments["exp_avg_sq"], rtol=1e-6, atol=0)


def check_against_float64(shape, options, device, *, spoil=lambda result: None):
    unit = options.get("unit", False)
    state, gradients = state_of(shape, unit=unit), gradients_of(shape)
    if unit and shape[1] == 1:
        gradients = [g * 0 for g in gradients]  # nothing is left of a gradient in one dimension but rounding
    truth = run(reference.adam_rows, [t.double() for t in state], gradients, **options)
    plain = run(reference.adam_rows, state, gradients, **options)
    found = run(adam_rows, state, gradients, device=device, working=torch.bfloat16, **options)
    spoil(found)
    assert torch.equal(found[3], found[0].bfloat16())
    for one, torchs, exact in zip(found[:3], plain[:3], truth[:3], strict=True):
        allowed = 2 * (torchs.double() - exact).abs().amax() + 2**-24 * exact.abs().amax()
        assert (one.double() - exact).abs().amax() <= allowed


@pytest.mark.parametrize("scales", [None, (0.5,), (0.25, 3.0)])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_at_most_twice_as_much_as_torch(shape, unit, scales, device):
    scale = None if scales is None else torch.tensor(scales)
    check_against_float64(shape, {"unit": unit, "scale_G": scale, "weight_decay": 0.05}, device)


@pytest.mark.parametrize("place", range(4))
def test_a_perturbed_result_is_noticed(place, device):
    def spoil(result):
        result[place].view(-1)[2] += 1e-2 if place != 2 else 1e-4 * result[2].max()

    with pytest.raises(AssertionError):
        check_against_float64((6, 13), {"unit": True}, device, spoil=spoil)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter's infinities
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("width", [5, 4097])
def test_working_copy_rounds_to_nearest_even(unit, width, device):
    """Ties, carries into the exponent, infinity and NaN, written through a step that changes nothing."""
    bits = [0x3F808000, 0x3F818000, 0x3F7FFFFF, 0x3F80FFFF, 0x00000001, 0x3F807FFF, -0x7F800001]
    if not unit:
        bits += [0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, -1, 0x7F800001]
    row = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    parameter = row[:, None].repeat(1, width)
    if unit:
        parameter /= parameter.norm(dim=1, keepdim=True).clamp_min(1e-12)
    state = (parameter, torch.zeros_like(parameter), torch.zeros_like(parameter))
    result, *_, working = run(
        adam_rows, state, [torch.zeros_like(parameter)], device=device, unit=unit, working=torch.bfloat16
    )
    expected = result.bfloat16()
    assert torch.equal(working.isnan(), expected.isnan())
    assert torch.equal(working.nan_to_num(7.0), expected.nan_to_num(7.0))
    if not unit:
        assert torch.equal(result.nan_to_num(7.0), parameter.nan_to_num(7.0))


def test_working_copy_of_other_dtypes(device):
    result, *_, working = run(adam_rows, state_of((3, 5)), gradients_of((3, 5)), device=device, working=torch.float32)
    assert torch.equal(result, working)


def test_the_gradient_stays_and_may_be_strided(device):
    state, gradient = state_of((6, 4)), gradients_of((4, 6))[0]
    kept = gradient.clone()
    one = run(adam_rows, state, [gradient.t()], scale_G=torch.tensor([0.5]), device=device)
    other = run(adam_rows, state, [gradient.t().contiguous()], scale_G=torch.tensor([0.5]), device=device)
    assert torch.equal(gradient, kept)
    assert torch.equal(one[0], other[0])


def test_state_that_cannot_be_changed_in_place_is_refused():
    parameter, first, second = state_of((4, 6))
    options = {**SETTINGS, "step": 1, "weight_decay": 0.0, "scale_G": None, "unit": False}
    for wrong in (parameter.t(), parameter.bfloat16()):
        with pytest.raises(ValueError, match="contiguous float32"):
            adam_rows(wrong, wrong, first, second, **options, working_RN=None)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_do(shape, device):
    run(adam_rows, state_of(shape), [torch.zeros(shape)], device=device)
    assert row_squares(torch.zeros(shape, device=device), None).tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("shape", [(5, 768), (6, 13), (2, 4099)], ids=str)
def test_two_runs_and_any_order_of_programs_agree_to_the_bit(shape, unit, device, shuffled_programs):
    options = {"unit": unit, "working": torch.bfloat16, "device": device}
    state, gradients = state_of(shape, unit=unit), gradients_of(shape)
    once = run(adam_rows, state, gradients, **options)
    with shuffled_programs(seed=5):
        again = run(adam_rows, state, gradients, **options)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_squares(shape, dtype, device):
    gradient, (unit, _, _) = gradients_of(shape)[0].to(dtype), state_of(shape, unit=True)
    for along in (None, unit.to(dtype)):
        found = row_squares(gradient.to(device), None if along is None else along.to(device)).cpu()
        rest = gradient.double()
        if along is not None:
            rest = rest - (rest * along.double()).sum(1, keepdim=True) * along.double()
        exact, whole = rest.square().sum(1), gradient.double().square().sum(1)
        # The rows of `along` have norm 1 to the rounding of its dtype only.
        unit_error = 0 if along is None else (along.double().norm(dim=1) - 1).abs().amax()
        allowed = ((1e-12 if dtype == torch.float64 else 2e-6) + 4 * unit_error) * whole
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ((found.double() - exact).abs() <= allowed).all()
        assert found.ge(0).all()
        wrong = found.double() + 1e-1 * whole.amax()
        assert ((wrong - exact).abs() > allowed).any()
