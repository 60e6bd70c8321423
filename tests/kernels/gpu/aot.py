"""Compile the kernels of the named lists for one target without a GPU: `python aot.py 90 specs_selection specs_sparse`.

A list's `SPECS` holds entries `("module:function", signature, constexprs, num_warps, num_stages, register budget)`;
the signature maps each run-time argument to its Triton type, as in `"*fp32"` or `"i32"`. Pointers are taken to be
aligned to 16 bytes, as torch allocates them; `"i32:16"` is an integer known to be a multiple of 16. Prints one JSON
list of the resources that each kernel takes.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def find_kernel(name):
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def source_of(kernel, signature, constexprs):
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    untyped = {name for name, type_ in types.items() if type_ == "constexpr"} - set(constexprs)
    if untyped or set(signature) - set(types):
        raise ValueError(f"{kernel.__name__}: untyped {sorted(untyped)}, unknown {sorted(set(signature) - set(types))}")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, type_ in enumerate(types.values())
        if type_.startswith("*") or type_.endswith(":16")
    }
    plain = {name: type_.removesuffix(":16") for name, type_ in types.items()}
    return ASTSource(kernel, plain, constexprs, aligned)


def resources(cubin):
    """Registers a thread and bytes of stack (spills and local arrays) of the one kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def compile_entry(entry, capability):
    name, signature, constexprs, num_warps, num_stages, budget = entry
    source = source_of(find_kernel(name), signature, constexprs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return {"kernel": name, "registers": registers, "stack": stack, "shared": shared, "budget": budget}


def main(capability, *lists):
    sys.path.insert(0, str(Path(__file__).parent))
    entries = [entry for name in lists for entry in importlib.import_module(name).SPECS]
    print(json.dumps([compile_entry(entry, int(capability)) for entry in entries]))


if __name__ == "__main__":
    main(*sys.argv[1:])
