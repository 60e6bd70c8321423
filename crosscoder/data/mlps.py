"""What the MLPs of blocks are, and what convention their inputs and outputs follow, asked of single blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crosscoder.data.hooks import ModuleRun, recording, replacing

DEFAULT = "mlp"
TOLERANCE = 1e-3
"""Relative difference below which two hidden states are taken as the same."""
ROUNDING = 1e-5
"""Relative difference that is only rounding."""


class MLPs(NamedTuple):
    """The MLP of each block (None: none can be read), their convention in words, and why the others cannot be read."""

    mlps: tuple[nn.Module | None, ...]
    mlp: str
    problems: tuple[str, ...]


def find_mlps(runs: Sequence[ModuleRun], mlp_path: str | None = None) -> MLPs:
    """The MLPs of blocks, given one run of each.

    A block's child named mlp, or its only child that could be one: run once, given and returning hidden states of all
    positions, and each position's output following from that position alone. `mlp_path` names it inside the block.
    Blocks of one make are asked once.
    """
    asked: dict[Any, tuple[str | None, str]] = {}
    for run in runs:
        if (key := _make(run.module)) not in asked:
            asked[key] = _ask(run, mlp_path)
    answers = [asked[_make(run.module)] for run in runs]
    mlps = [
        None if path is None else run.module.get_submodule(path) for run, (path, _) in zip(runs, answers, strict=True)
    ]
    shared = {id(mlp) for mlp in mlps if mlp is not None and sum(other is mlp for other in mlps) > 1}
    problems = ["" if mlp is not None else said for mlp, (_, said) in zip(mlps, answers, strict=True)]
    for number, mlp in enumerate(mlps):
        if id(mlp) in shared:
            mlps[number], problems[number] = None, f"{answers[number][0]} is one module of several blocks"
    words = [f"{path}: {said}" if path else said for path, said in dict.fromkeys(answers)]
    return MLPs(tuple(mlps), "; ".join(words), tuple(problems))


def _make(block: nn.Module) -> Any:
    """What two blocks share that are made alike: the kinds of all modules in them."""
    return tuple((name, type(module)) for name, module in block.named_modules())


def _ask(run: ModuleRun, mlp_path: str | None) -> tuple[str | None, str]:
    """The path of a block's MLP and its convention, or None and why there is none."""
    block, kind = run.module, type(run.module).__name__
    children = dict(block.named_children())
    named = dict(block.named_modules())
    if mlp_path is not None and mlp_path not in named:
        return None, f"{kind} has no {mlp_path}; it has: {', '.join(children)} (--mlp-path names it inside the block)"
    candidates = [mlp_path] if mlp_path else [DEFAULT] if DEFAULT in children else list(children)
    with recording(named[path] for path in candidates) as inner:
        _again(run)
    fits, reasons = [], []
    for path in candidates:
        own = [one for one in inner if one.module is named[path]]
        if not _has_matrix(named[path]):
            continue
        if reason := _objection(own, run):
            reasons.append(f"{path} {reason}")
        else:
            fits.append((path, own[0]))
    if len(fits) != 1:
        what = "several modules that could be its MLP" if fits else "no module that could be its MLP"
        listed = ", ".join(path for path, _ in fits) or ", ".join(reasons) or "it has no children"
        return None, f"{kind} has {what}: {listed} (--mlp-path names it inside the block)"
    path, inside = fits[0]
    if _holds_stream(run, inside):
        return None, f"{kind}: what {path} returns holds the residual stream, so it is not read"
    return path, _convention(run, inside)


def _has_matrix(module: nn.Module) -> bool:
    return any(one.ndim >= 2 for one in (*module.parameters(), *module.buffers()))


def _objection(own: Sequence[ModuleRun], run: ModuleRun) -> str:
    """What speaks against a module of a block being its MLP, or nothing."""
    if len(own) != 1:
        return f"runs {len(own)} times in a block" if own else "was not run"
    assert run.given is not None
    for verb, hidden in (("takes", own[0].given), ("returns", own[0].returned)):
        if hidden is None or hidden.shape != run.given.shape:
            return f"{verb} {'no hidden states' if hidden is None else list(hidden.shape)}"
    return "" if _by_position(own[0]) else "mixes positions"


def _by_position(inside: ModuleRun) -> bool:
    """Whether other values at one position leave what a module returns at all others as it was."""
    assert inside.given is not None
    assert inside.returned is not None
    shape, middle = inside.given.shape, inside.given.shape[1] // 2

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != shape:
            return value
        changed = value.clone()
        changed[:, middle] = -3 * value[:, middle].flip(-1)
        return changed

    try:
        with recording([inside.module]) as runs:
            inside.module(*map(change, inside.args), **{key: change(value) for key, value in inside.kwargs.items()})
    except (LookupError, RuntimeError, TypeError, ValueError):
        return False
    rest = [position for position in range(shape[1]) if position != middle]
    behind = runs[0].returned
    return behind is not None and _same(behind[:, rest], inside.returned[:, rest], least=ROUNDING)


def _holds_stream(run: ModuleRun, inside: ModuleRun) -> bool:
    """Whether a residual stream passes through an MLP.

    It does if what the MLP returns still differs between tokens when all matrices inside return zero, or if nothing
    else of the block does when the MLP returns zero.
    """
    matrices = [
        module
        for module in inside.module.modules()
        if module is not inside.module and any(one is not None and one.ndim >= 2 for one in _own(module))
    ]
    with _silenced(matrices), recording([inside.module]) as runs:
        _again(run)
    left = runs[0].returned
    around = _again(run, inside.module, torch.zeros_like)
    return (bool(matrices) and left is not None and _differs(left)) or not _differs(around)


def _convention(run: ModuleRun, inside: ModuleRun) -> str:
    """What an MLP is given and what becomes of what it returns, in words."""
    assert inside.given is not None
    stream = _again(run, inside.module, torch.zeros_like)
    raw = any(one is not None and _same(inside.given, one) for one in (stream, run.given))
    before = "given the stream as it is" if raw else "given the stream after a norm"
    # As large as the stream, of another length at each position, so that a norm behind it shows. Blocks add in place.
    lengths = torch.arange(1, stream.shape[1] + 1, device=stream.device, dtype=stream.dtype)[:, None]
    signal = lengths * (stream.roll(1, dims=-1) + stream.flip(-1))
    added, put = (_again(run, inside.module, lambda _: signal.clone()) - stream).double(), signal.double()
    factor = float((added * put).sum() / put.square().sum().clamp_min(1e-300))
    if not _same(factor * put, added):
        return f"{before}, a norm or gate behind it"
    return f"{before}, added as it is" if abs(factor - 1) < 1e-2 else f"{before}, added times {factor:.3g}"


def _again(run: ModuleRun, module: nn.Module | None = None, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """What the block of `run` returns if it is run again, with what `module` returns changed."""
    args = tuple(run.given if index == 0 and isinstance(one, Tensor) else one for index, one in enumerate(run.args))
    kwargs = {**run.kwargs, "hidden_states": run.given} if "hidden_states" in run.kwargs else run.kwargs
    with contextlib.ExitStack() as hooks:
        if module is not None and change is not None:
            hooks.enter_context(replacing([module], lambda _, given, behind: change(behind)))
        runs = hooks.enter_context(recording([run.module]))
        run.module(*args, **kwargs)
    behind = runs[0].returned
    assert behind is not None
    return behind


@contextlib.contextmanager
def _silenced(modules: Sequence[nn.Module]) -> Generator[None]:
    """While active, every tensor of real numbers that `modules` return is zero."""

    def zero(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.zeros_like(value) if value.is_floating_point() else value
        return type(value)(map(zero, value)) if type(value) in (tuple, list) else value

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(lambda _, args, output: zero(output)))
        yield


def _own(module: nn.Module) -> list[Tensor | None]:
    return [*module._parameters.values(), *module._buffers.values()]


def _differs(hidden_BSD: Tensor) -> bool:
    """Whether positions differ from one another."""
    first = hidden_BSD[:, :1]
    return not _same(hidden_BSD, first.expand_as(hidden_BSD)) if bool(hidden_BSD.any()) else False


def _same(one: Tensor, other: Tensor, least: float = TOLERANCE) -> bool:
    """Whether two hidden states agree up to rounding; what is not finite agrees."""
    left, right = one.double(), other.double().to(one.device)
    tolerance = max(least, 8 * torch.finfo(one.dtype).eps)
    return not bool((left - right).norm() > tolerance * left.norm())
