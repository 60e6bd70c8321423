"""Reading and replacing what modules of a model are given and return: the only forward hooks of the library.

A hook acts in the thread that set it only, so that one thread may read a model while another one runs it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn


class ModuleEnd(NamedTuple):
    """The hidden states that a module is given, or those that it returns."""

    module: nn.Module
    end: Literal["input", "output"]


@contextlib.contextmanager
def reading(ends: Sequence[ModuleEnd], read: Callable[[int, Tensor], None]) -> Generator[None]:
    """While active, every run of the model calls `read(i, hidden)` for each of `ends`, in the model's order."""

    owner = threading.get_ident()

    def before(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == owner:
            read(number, _given(args, kwargs))

    def after(number: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == owner:
            read(number, _returned(output))

    with contextlib.ExitStack() as hooks:
        for number, (module, end) in enumerate(ends):
            if end == "input":
                hooks.enter_context(module.register_forward_pre_hook(partial(before, number), with_kwargs=True))
            else:
                hooks.enter_context(module.register_forward_hook(partial(after, number)))
        yield


@contextlib.contextmanager
def replacing(modules: Sequence[nn.Module], replace: Callable[[int, Tensor, Tensor], Tensor]) -> Generator[None]:
    """While active, `modules[i]` returns `replace(i, given, returned)` as its hidden states; its other outputs stay."""

    owner = threading.get_ident()

    def after(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if threading.get_ident() != owner:
            return output
        hidden = replace(number, _given(args, kwargs), _returned(output))
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    with contextlib.ExitStack() as hooks:
        for number, module in enumerate(modules):
            hooks.enter_context(module.register_forward_hook(partial(after, number), with_kwargs=True))
        yield


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _returned(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
