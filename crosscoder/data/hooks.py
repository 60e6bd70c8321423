"""Reading and replacing what modules of a model are given and return: the only forward hooks of the library.

A hook acts in the thread that set it only, so that one thread may read a model while another one runs it.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn


class ModuleEnd(NamedTuple):
    """The hidden states that a module is given, or those that it returns."""

    module: nn.Module
    end: Literal["input", "output"]


@dataclass
class ModuleRun:
    """One run of a module: copies of its hidden states (None where there are none), and all that it was called with."""

    module: nn.Module
    given: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Tensor | None = None


@contextlib.contextmanager
def reading(ends: Sequence[ModuleEnd], read: Callable[[int, Tensor], None]) -> Generator[None]:
    """While active, every run of the model calls `read(i, hidden)` for each of `ends`, in the model's order."""

    @_in_this_thread
    def before(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read(number, _tensor(module, given(args, kwargs), "is given"))

    @_in_this_thread
    def after(number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read(number, _tensor(module, returned(output), "returns"))

    with contextlib.ExitStack() as hooks:
        for number, (module, end) in enumerate(ends):
            if end == "input":
                hooks.enter_context(module.register_forward_pre_hook(partial(before, number), with_kwargs=True))
            else:
                hooks.enter_context(module.register_forward_hook(partial(after, number)))
        yield


@contextlib.contextmanager
def recording(modules: Iterable[nn.Module]) -> Generator[list[ModuleRun]]:
    """A list that holds, while active, every run of `modules` in the order in which they begin."""
    runs: list[ModuleRun] = []
    open_runs: list[ModuleRun] = []

    @_in_this_thread
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = given(args, kwargs)
        run = ModuleRun(module, None if hidden is None else hidden.detach().clone(), args, kwargs)
        runs.append(run)
        open_runs.append(run)

    @_in_this_thread
    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = returned(output)
        open_runs.pop().returned = None if hidden is None else hidden.detach().clone()

    with contextlib.ExitStack() as hooks:
        for module in {id(module): module for module in modules}.values():
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        yield runs


@contextlib.contextmanager
def replacing(modules: Sequence[nn.Module], replace: Callable[[int, Tensor, Tensor], Tensor]) -> Generator[None]:
    """While active, `modules[i]` returns `replace(i, given, returned)` as its hidden states; its other outputs stay."""

    @_in_this_thread
    def after(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ends = _tensor(module, given(args, kwargs), "is given"), _tensor(module, returned(output), "returns")
        hidden = replace(number, *ends)
        if isinstance(output, Tensor):
            return hidden
        if isinstance(output, dict):  # an output of transformers, which is read by name too
            changed = copy.copy(output)
            changed[next(iter(output))] = hidden
            return changed
        return [hidden, *output[1:]] if isinstance(output, list) else (hidden, *output[1:])

    with contextlib.ExitStack() as hooks:
        for number, module in enumerate(modules):
            hooks.enter_context(module.register_forward_hook(partial(after, number), with_kwargs=True))
        yield


@contextlib.contextmanager
def replacing_input(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> Generator[None]:
    """While active, `module` is given `replace(hidden)` for its hidden states."""

    @_in_this_thread
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = _tensor(module, given(args, kwargs), "is given")
        new = replace(hidden)
        changed = {name: new if one is hidden else one for name, one in kwargs.items()}
        return tuple(new if one is hidden else one for one in args), changed

    with module.register_forward_pre_hook(before, with_kwargs=True):
        yield


def _in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, which other threads' runs pass by: they may call it before torch has noted that it takes keywords."""
    owner = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == owner else None


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among what a module is called with: `hidden_states`, or the first tensor of real numbers."""
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.is_floating_point()), None)


def returned(output: Any) -> Tensor | None:
    """The hidden states among what a module returns: all of it, or the first of several values."""
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _tensor(module: nn.Module, hidden: Tensor | None, verb: str) -> Tensor:
    if hidden is None:
        raise ValueError(f"{type(module).__name__} {verb} no hidden states; read other blocks with --blocks-path")
    return hidden
