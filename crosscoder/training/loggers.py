"""A run's numbers for other people's loggers: trackio, Weights & Biases, TensorBoard, or anything with `log(dict)`.

What is logged is what `metrics.jsonl` holds. A logger is a convenience: one that fails is named once, and training goes
on without it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from crosscoder.foundation.console import say

LogTo = Literal["trackio", "wandb", "tensorboard"]


class Logger(Protocol):
    """Anything that takes numbers by name, such as a run of trackio or wandb; one that takes `step=` is given it."""

    def log(self, data: dict[str, float], /) -> Any:
        """Take the numbers of one moment, `step` and `tokens` among them."""


class SafeLogger:
    """Hands numbers on to a logger until that fails.

    prefix: put before every name, for one of several dictionaries. first_step: added to every step.
    """

    def __init__(self, logger: Logger, *, prefix: str = "", first_step: int = 0) -> None:
        inner = logger if isinstance(logger, SafeLogger) else None
        if inner is None and not callable(getattr(logger, "log", None)):
            raise ValueError(f"logger is a {type(logger).__name__} without log(dict); give a run of trackio or wandb")
        self.state: dict[str, bool] = {"failed": False} if inner is None else inner.state
        self.logger: Logger = logger if inner is None else inner.logger
        self.prefix = prefix if inner is None else inner.prefix + prefix
        self.first_step = first_step if inner is None else inner.first_step + first_step

    def log(self, data: Mapping[str, float | None], /) -> None:
        """Hand on what is known of a moment."""
        if self.state["failed"]:
            return
        step = int(data.get("step") or 0) + self.first_step
        known = {name: value for name, value in data.items() if value is not None and name != "step"}
        try:
            apart = _takes_step(self.logger)
            named = {self.prefix + name: value for name, value in (known if apart else {"step": step, **known}).items()}
            self.logger.log(named, **({"step": step} if apart else {}))
        except Exception as error:  # noqa: BLE001  (somebody else's code, and hours of work)
            self.state["failed"] = True
            name = f"{type(self.logger).__module__}.{type(self.logger).__name__}"
            say(f"warning: the logger {name} failed ({type(error).__name__}: {error}); training goes on without it")


def _takes_step(logger: Logger) -> bool:
    try:
        return "step" in inspect.signature(logger.log).parameters
    except (TypeError, ValueError):
        return False


class TensorBoard:
    """TensorBoard's event files in a folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, data: Mapping[str, float], /, step: int | None = None) -> None:
        """Add every number at its step."""
        for name, value in data.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write what is left."""
        self._writer.close()


def open_logger(kind: LogTo, folder: Path, *, project: str, settings: dict[str, Any]) -> Any:
    """A new run of a logger, named by the run's folder; None where it does not start, which is said.

    Raises:
        ImportError: it is not installed.
    """
    module = "torch.utils.tensorboard" if kind == "tensorboard" else kind
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"--log-to {kind} needs it: pip install 'crosscoder[{kind}]' ({error})") from error
    try:
        if kind == "tensorboard":
            return TensorBoard(folder / "tensorboard")
        return library.init(project=project, name=folder.resolve().name, config=settings)
    except Exception as error:  # noqa: BLE001  (as above)
        say(f"warning: {kind} did not start ({type(error).__name__}: {error}); training goes on without it")
        return None


def close_logger(logger: Any) -> None:
    """End a run of a logger, so that it writes what is left."""
    try:
        logger.finish()
    except Exception as error:  # noqa: BLE001  (as above)
        say(f"warning: {type(logger).__name__} did not end cleanly ({type(error).__name__}: {error})")
