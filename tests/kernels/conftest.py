"""The operators have two forms on the CPU; every test of this folder runs on both."""

import pytest

from triton_kernels.cpu.native import build


@pytest.fixture(scope="module", autouse=True, params=["native", "stock"])
def cpu_form(request):
    if request.param == "native":
        if build.library() is None:
            pytest.skip("no C compiler")
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "library", lambda: None)
        yield request.param
