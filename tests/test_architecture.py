"""The house rules, read from the source: imports point down and in no circle, modules stay short, imports light."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400

# Floor of each package, and what equal floors may not do: import one another.
FLOORS = {
    "triton_kernels": 0,
    "crosscoder.foundation": 0,
    "crosscoder.results": 1,
    "crosscoder.data": 2,
    "crosscoder.dictionary": 2,
    "crosscoder.training": 3,
    "crosscoder.measure": 4,
    "crosscoder.formats": 5,
    "crosscoder.verdict": 5,
    "crosscoder.browser": 6,
    "crosscoder.report": 6,
    "crosscoder.features": 7,
    "crosscoder.studies": 7,
    "crosscoder.needs": 8,
    "crosscoder.commands": 9,
    "crosscoder.cli": 10,
    "crosscoder.__main__": 11,
}
# Lines of each room, of .py, .c and .h files; all of them together, and the tests.
BUDGETS = {
    "triton_kernels": 4815,
    "crosscoder/foundation": 2270,
    "crosscoder/results": 835,
    "crosscoder/data": 5245,
    "crosscoder/dictionary": 2635,
    "crosscoder/training": 2625,
    "crosscoder/formats": 2000,
    "crosscoder/measure": 5575,
    "crosscoder/verdict": 1155,
    "crosscoder/browser": 980,
    "crosscoder/report": 2275,
    "crosscoder/studies": 2895,
    "crosscoder/commands": 1695,
    "crosscoder": 1180,  # the modules beside the rooms
}
MAX_LIBRARY_LINES, MAX_TEST_LINES = 36_165, 24_770
# Exceptions to "any lower floor", from the architecture's own table.
FORBIDDEN = {("crosscoder.data", "triton_kernels"), ("crosscoder.measure", "crosscoder.training")}
SOURCES = sorted([*ROOT.glob("crosscoder/**/*.py"), *ROOT.glob("triton_kernels/**/*.py")])


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def room(module):
    """The package or module of the table that `module` belongs to, or None for the root package."""
    fits = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return max(fits, key=len) if fits else None


@cache
def parsed(path):
    return ast.parse(path.read_text())


def imported(path):
    """Every project module imported anywhere in the file, function bodies included."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else node.module for name in names]
        else:
            continue
        yield from (name for name in found if name.split(".")[0] in ("crosscoder", "triton_kernels"))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    here = room(module_name(path))
    if here is None:  # the root package, which only shows what is below
        return
    for module in imported(path):
        there = room(module)
        assert there is not None, f"{path} imports the package root ({module})"
        if there == here:
            continue
        assert FLOORS[there] < FLOORS[here], f"{here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"
        assert (here, there) not in FORBIDDEN, f"{here} may not import {there}"


def test_no_imports_go_round():
    graph = {name: set(imported(path)) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("path", [*SOURCES, *sorted(ROOT.glob("scripts/*.py"))], ids=module_name)
def test_modules_stay_short_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    if text.strip():
        assert ast.get_docstring(parsed(path)), f"{path} has no module docstring"


def lines_of(pattern):
    files = [path for path in ROOT.glob(pattern) if path.suffix in (".py", ".c", ".h")]
    return sum(len(path.read_text().splitlines()) for path in files)


@pytest.mark.parametrize("name", BUDGETS)
def test_rooms_keep_to_their_budgets(name):
    lines = lines_of("crosscoder/*" if name == "crosscoder" else f"{name}/**/*")
    assert lines <= BUDGETS[name], f"{name} has {lines} lines of {BUDGETS[name]}; delete something, or argue for more"


def test_the_house_keeps_to_its_budget():
    rooms = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("crosscoder/*/") if list(path.glob("*.py"))}
    assert rooms <= BUDGETS.keys()
    assert lines_of("crosscoder/**/*") + lines_of("triton_kernels/**/*") <= MAX_LIBRARY_LINES
    assert lines_of("tests/**/*") <= MAX_TEST_LINES


def test_functions_stay_short():
    too_long = []
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                body = node.end_lineno - node.lineno + 1
                documented = ast.get_docstring(node)
                lines = body - (len(documented.splitlines()) if documented else 0)
                if lines > 60:
                    too_long.append(f"{path.name}:{node.name} {lines}")
    assert not too_long


FILE = {"json", "jsonl", "toml", "md", "html", "css", "svg", "png", "py", "c", "h", "safetensors", "npz", "gguf", "txt"}


@cache
def defined(path):
    """Every name that a module gives to something of its own: functions, classes, arguments, variables, fields."""
    names = set()
    for node in ast.walk(parsed(path)):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.arg():
                names.add(node.arg)
            case ast.Name(ctx=ast.Store()) | ast.Attribute(ctx=ast.Store()):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_what_words_refer_to_exists(path):
    """`module.name` in a docstring or comment names what a module of ours defines; `module.name*` what begins so."""
    for module, name in re.findall(r"`(?:\w+\.)*(\w+)\.(\w+\*?)(?:\(.*?\))?`", path.read_text()):
        homes = [full for full in MODULES if full.split(".")[-1] == module]
        if not homes or name in FILE or module in defined(path):  # the last: a field of an argument, `config.steps`
            continue
        known = {known for home in homes for known in defined(MODULES[home])}
        known |= {full.removeprefix(f"{home}.") for home in homes for full in MODULES if full.startswith(f"{home}.")}
        found = any(one.startswith(name[:-1]) for one in known) if name.endswith("*") else name in known
        assert found, f"`{module}.{name}`: {', '.join(homes)} has no {name}"


def test_importing_the_library_does_not_load_what_only_commands_need():
    code = (
        "import sys, crosscoder, crosscoder.training; "
        "print({'transformers', 'datasets', 'matplotlib', 'tyro', 'pandas', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_pickle_anywhere():
    """But for state dicts of other libraries, of weights alone, and only where somebody allows it."""
    for path in SOURCES:
        tree = parsed(path)
        names = {node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)}
        assert "pickle" not in names
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found = [call for call in calls if ast.unparse(call.func) in ("torch.save", "torch.load", "np.load")]
        if path.name == "foreign.py":
            assert [ast.unparse(call.func) for call in found] == ["torch.load"]
            assert "weights_only=True" in ast.unparse(found[0])
        else:
            assert not found
