"""Print the signatures and docstrings of what a user of the library calls into `docs/api.md`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosscoder.foundation.artifact import replace_file

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"
PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "crosscoder": ("The names that most need", ()),
    "crosscoder.dictionary": (
        "Sparsity rules, penalties, and what a dictionary gives",
        ("DictionaryOutput", "NormPenalty", "TanhPenalty", "L0Penalty", "TargetL0Penalty"),
    ),
    "crosscoder.dictionary.losses": (
        "Loss terms",
        ("loss_terms", "LossOutput", "auxiliary_term", "explained_variance"),
    ),
    "crosscoder.training.loggers": ("Loggers", ("Logger", "open_logger", "close_logger")),
    "crosscoder.training.curves": ("Curves", ("find_runs", "read_run", "plot_runs")),
    "crosscoder.interventions": ("Moving a model by its features", ("steer", "ablate", "replace", "Where")),
    "crosscoder.data.residuals": ("Reading a model", ("ResidualHarvester", "find_blocks")),
    "crosscoder.data.tokens": ("Tokens", ("TokenBlocks", "PreparedTokens")),
    "crosscoder.data.shards": ("Stored activations", ("ActivationShards", "write_shards")),
    "crosscoder.data.stream": ("Streamed activations", ("ActivationStream",)),
    "crosscoder.data.sources": ("Sources of batches", ("Source", "SiteSource", "Batches")),
    "crosscoder.measure.reading": ("Measuring a dictionary", ("Reading", "read_dictionary", "measure_dictionary")),
    "crosscoder.measure.splice": ("Loss recovered", ("splice_losses", "Spliced")),
    "crosscoder.formats.saelens": ("Export", ("save_saelens",)),
}
"""Modules, their headings, and what of them is shown; of the first, all that it exports."""
HEAD = """# API

Written from the docstrings by `scripts/write_api_docs.py`; a test holds it up to date. Letters of tensor names, such as
`x_BLD`, are those of [house.md](house.md). What is not here is no promise: it may change with any version.
"""


def render() -> str:
    """The page."""
    parts, seen = [HEAD], set[int]()
    shown = {name for module, (_, names) in PAGES.items() for name in names or importlib.import_module(module).__all__}
    for module, (title, names) in PAGES.items():
        found = importlib.import_module(module)
        parts.append(f"## {title}\n\n`{module}`\n")
        for name in names or found.__all__:
            thing = getattr(found, name)
            if id(thing) not in seen:
                seen.add(id(thing))
                parts += described(name, thing, shown)
    return "\n".join(parts)


def described(name: str, thing: Any, shown: set[str]) -> Iterator[str]:
    """A function, or a class with what its own code adds to its parents' methods."""
    yield f"### {name}\n"
    yield f"```python\n{signature(name, thing)}\n```\n"
    yield prose(inspect.getdoc(thing)) + "\n"
    if not inspect.isclass(thing) or issubclass(thing, BaseException):
        return
    parents = [cls for cls in thing.__mro__[1:] if cls.__module__.startswith("crosscoder")]
    if known := next((cls for cls in parents if cls.__name__ in shown), None):
        yield f"Further methods are those of `{known.__name__}`.\n"
    for key, member in own_members(thing, shown):
        text = prose(inspect.getdoc(member))
        if isinstance(member, property) or not callable(inspect.unwrap(getattr(thing, key, member))):
            yield f"- **`.{key}`**: {indented(text)}\n"
        else:
            yield f"- **`.{key}{arguments(getattr(thing, key))}`**: {indented(text)}\n"


def own_members(thing: type, shown: set[str]) -> Iterator[tuple[str, Any]]:
    """Public methods and properties with a docstring, of the class and of ours that it comes from, up to one that is
    shown by itself."""
    seen = set[str]()
    for cls in thing.__mro__:
        if cls is not thing and cls.__name__ in shown:
            return
        if not cls.__module__.startswith("crosscoder"):
            continue
        for key, member in vars(cls).items():
            plain = getattr(member, "__func__", getattr(member, "func", member))
            if key.startswith("_") or key in seen or inspect.isclass(plain):
                continue
            if (callable(plain) or isinstance(plain, property)) and getattr(plain, "__doc__", None):
                seen.add(key)
                yield key, plain


def signature(name: str, thing: Any) -> str:
    """How it is called; of settings the fields with their defaults."""
    if dataclasses.is_dataclass(thing):
        fields = [f"    {field.name}: {field.type}{default_of(field)}" for field in dataclasses.fields(thing)]
        return "\n".join([f"class {name}:", *fields]) if fields else f"class {name}()"
    keyword = "class" if inspect.isclass(thing) else "def"
    line = f"{keyword} {name}{arguments(thing)}"
    if len(line) <= 100:
        return line
    found = re.fullmatch(r".*?\((.*)\)( -> .*)?", line)
    assert found is not None
    inside, answer = found.groups(default="")
    each = re.split(r", (?=\*|\w+: )", inside)
    return "\n".join([f"{keyword} {name}(", *(f"    {one}," for one in each), f"){answer}"])


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        default = getattr(field.default, "default", field.default)  # pydantic keeps its own around it
        return f" = {default!r}" if "Undefined" not in repr(default) else ""
    return " = ..." if field.default_factory is not dataclasses.MISSING else ""


class Written:
    """An annotation as its source has it."""

    def __init__(self, annotation: Any) -> None:
        self.text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    def __repr__(self) -> str:
        return self.text


def arguments(thing: Any) -> str:
    """Its arguments, one a line where they are many."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return "(...)"
    empty = inspect.Parameter.empty
    given = [
        one if one.annotation is empty else one.replace(annotation=Written(one.annotation))
        for one in found.parameters.values()
        if one.name not in ("self", "cls")
    ]
    answer = found.return_annotation if found.return_annotation is empty else Written(found.return_annotation)
    return str(found.replace(parameters=given, return_annotation=answer))


def prose(text: str | None) -> str:
    """A docstring as Markdown: arguments and errors as lists."""
    lines = []
    for line in (text or "").splitlines():
        if found := re.match(r"^ *((?:[a-z_]\w*|[A-Z]\w*Error)(?:, \w+)*): (.*)", line):
            lines.append(f"- `{found[1]}`: {found[2]}")
        elif line.strip() in ("Raises:", "Returns:"):
            lines.append(f"**{line.strip()}**\n")
        elif lines and lines[-1].startswith(("- `", "  ")) and line.strip() and not line.startswith("    $"):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines)


def indented(text: str) -> str:
    return text.replace("\n", "\n  ").replace("\n  \n", "\n\n")


if __name__ == "__main__":
    replace_file(DOCUMENT, render().encode("utf-8"))
