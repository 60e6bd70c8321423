"""What compiles the C kernels: once, with the compiler that there is, and without one everything runs."""

import shutil
import subprocess

import pytest
import torch

import triton_kernels as ops
from triton_kernels.cpu import native
from triton_kernels.cpu.native import build


@pytest.fixture(scope="module", autouse=True)
def cpu_form():
    """Neither form of the operators is asked here."""
    if not shutil.which("gcc"):
        pytest.skip("there is no C compiler")


def code_of_ones():
    return torch.ones(3), torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0, 2, 3]), torch.ones(2, 64)


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "crosscoder"


def libraries(folder):
    return sorted(folder.glob("*.so"))


def test_the_library_is_compiled_once(cache_folder, monkeypatch):
    build.compiled(build.compiler())
    (made,) = libraries(cache_folder)
    before = made.stat().st_mtime_ns
    build.compiled(build.compiler())
    assert made.stat().st_mtime_ns == before
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    build.compiled(build.compiler())
    assert len(libraries(cache_folder)) == 2


def test_no_compiler_is_said_and_everything_runs(cache_folder, monkeypatch):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CC", raising=False)
    build.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="no-such-compiler is on the path.*install gcc"):
            assert build.library() is None
        assert not native.serves()
        assert ops.gather_sum(*code_of_ones()).isfinite().all()
    finally:
        build.library.cache_clear()


LATIN = "sh -c 'printf \\\\351; exit 1'"  # says what is not UTF-8
EMPTY = """sh -c 'for last; do :; done; : > "$last"' sh"""  # makes an empty library


@pytest.mark.parametrize(
    "command", ["false", "/no/such/file", "gcc -include /no/such/file.h", "gcc '", " ", "true", LATIN, EMPTY]
)
def test_a_compiler_that_fails_is_named_and_leaves_nothing(cache_folder, monkeypatch, command):
    monkeypatch.setenv("CC", command)
    monkeypatch.chdir(cache_folder.parent)  # where one of them writes a file
    build.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="the C kernels are not available"):
            assert build.library() is None
        assert [path.name for path in cache_folder.glob("*")] in ([], ["compiling.lock"])
    finally:
        build.library.cache_clear()


def test_no_source_has_a_warning(cache_folder):
    sources = [str(path) for path in build.FOLDER.glob("*.c")]
    command = [*build.compiler(), *build.FLAGS, "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *sources, "-lm"]
    subprocess.run([*command, "-o", str(cache_folder.parent / "checked.so")], check=True)
