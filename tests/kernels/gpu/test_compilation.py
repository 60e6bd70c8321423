"""Every kernel compiles for both targets ahead of time, without spills and within its budget of registers."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "triton_kernels/gpu"
SHARED_BYTES = {80: 166_912, 90: 232_448}
LISTS = ("specs_sparse", "specs_selection")

SPILLING = """
import triton
import triton.language as tl


@triton.jit
def spilling_kernel(x_ptr):
    row = tl.load(x_ptr + tl.arange(0, 8192))
    tl.store(x_ptr + tl.arange(0, 8192), row * tl.sum(row, 0))


SPECS = [("spilling:spilling_kernel", {"x_ptr": "*fp32"}, {}, 1, 1, 255)]
"""


def compile_lists(capability, *lists, path=None):
    """What `aot.py` says of the lists, in a process of its own: this one may only interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    # Chosen, as Triton warns where it is not; kernels are launched with its default, which is the same.
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    command = [sys.executable, str(HERE / "aot.py"), str(capability), *lists]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def faults(compiled, capability):
    """What is wrong with the compiled kernels, one sentence each."""
    for one in compiled:
        if one["stack"]:
            yield f"{one['kernel']} spills: {one['stack']} bytes of stack"
        if one["registers"] > one["budget"]:
            yield f"{one['kernel']} takes {one['registers']} registers of {one['budget']}"
        if one["shared"] > SHARED_BYTES[capability]:
            yield f"{one['kernel']} takes {one['shared']} bytes of shared memory"


@pytest.mark.parametrize("capability", sorted(SHARED_BYTES))
def test_kernels_compile_within_their_budgets(capability):
    assert not list(faults(compile_lists(capability, *LISTS), capability))


def test_a_spill_is_noticed(tmp_path):
    (tmp_path / "spilling.py").write_text(SPILLING)
    compiled = compile_lists(90, "spilling", path=tmp_path)
    assert any("spills" in fault for fault in faults(compiled, 90))


def test_a_kernel_over_its_budget_is_noticed():
    one = {"kernel": "any", "registers": 65, "stack": 0, "shared": SHARED_BYTES[80] + 1, "budget": 64}
    assert len(list(faults([one], 80))) == 2
    assert len(list(faults([one], 90))) == 1


def launched_kernels():
    """`module:function` of each kernel that a module of the package launches, as `name[grid](...)`."""
    for path in sorted(KERNELS.glob("*.py")):
        tree = ast.parse(path.read_text())
        jitted = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and any(ast.unparse(mark).split("(")[0].split(".")[-1] == "jit" for mark in node.decorator_list)
        }
        home = dict.fromkeys(jitted, path.stem)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton_kernels.gpu."):
                home |= {alias.asname or alias.name: node.module.split(".")[-1] for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value)
                if name.endswith("_kernel"):
                    assert name in home, f"{path.name} launches {name}, which it neither defines nor imports"
                    yield f"triton_kernels.gpu.{home[name]}:{name}"
                else:
                    assert name not in jitted, f"{path.name}: the launched {name} is to end in _kernel"


def test_every_launched_kernel_is_compiled():
    listed = set()
    for path in (HERE / f"{name}.py" for name in LISTS):
        listed |= {entry[0] for entry in _specs(path)}
    launched = set(launched_kernels())
    assert launched
    assert launched - listed == set()
    assert listed - launched == set()


def _specs(path):
    namespace = {"__name__": path.stem, "__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace["SPECS"]
