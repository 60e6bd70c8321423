"""The house rules, read from the source: imports point down, modules stay short, imports stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES, MAX_SCRIPT_LINES = 400, 40

# Floor of each package, and what equal floors may not do: import one another.
FLOORS = {
    "triton_kernels": 0,
    "crosscoder.foundation": 0,
    "crosscoder.data": 1,
    "crosscoder.dictionary": 1,
    "crosscoder.training": 2,
    "crosscoder.formats": 3,
    "crosscoder.results": 3,
    "crosscoder.measure": 4,
    "crosscoder.verdict": 5,
    "crosscoder.report": 6,
    "crosscoder.studies": 7,
    "crosscoder.cli": 8,
    "crosscoder.commands": 8,
    "crosscoder.needs": 8,
}
# Exceptions to "any lower floor", from the architecture's own table.
FORBIDDEN = {("crosscoder.data", "triton_kernels"), ("crosscoder.measure", "crosscoder.training")}
SOURCES = sorted([*ROOT.glob("crosscoder/**/*.py"), *ROOT.glob("triton_kernels/**/*.py")])


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    """The package or module of the table that `module` belongs to, or None for the root package."""
    fits = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return max(fits, key=len) if fits else None


def imported(path):
    """Every project module imported anywhere in the file, function bodies included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" if room(f"{module}.{alias.name}") else module for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    here = room(module_name(path))
    if here is None:  # the root package, which only shows what is below
        return
    for module in imported(path):
        if module.split(".")[0] not in ("crosscoder", "triton_kernels"):
            continue
        there = room(module)
        assert there is not None, f"{path} imports the package root ({module})"
        if there == here or FLOORS[here] == FLOORS[there] == 8:
            continue
        assert FLOORS[there] < FLOORS[here], f"{here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"
        assert (here, there) not in FORBIDDEN, f"{here} may not import {there}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_modules_stay_short_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/*.py")), ids=lambda path: path.name)
def test_scripts_are_thin(path):
    if not path.name.startswith(("bench_", "check_")):
        assert len(path.read_text().splitlines()) <= MAX_SCRIPT_LINES


def test_functions_stay_short():
    too_long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.end_lineno - node.lineno + 1
                documented = ast.get_docstring(node)
                lines = body - (len(documented.splitlines()) if documented else 0)
                if lines > 60:
                    too_long.append(f"{path.name}:{node.name} {lines}")
    assert not too_long


def test_importing_the_library_does_not_load_what_only_commands_need():
    code = (
        "import sys, crosscoder, crosscoder.training; "
        "print({'transformers', 'datasets', 'matplotlib', 'tyro', 'pandas', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_pickle_anywhere():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        names = {node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)}
        assert "pickle" not in names
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"torch.save", "torch.load", "np.load"}
