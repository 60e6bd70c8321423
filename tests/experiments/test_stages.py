"""Where studies are kept."""

from pathlib import Path

import pytest

from crosscoder.experiments import stages

ROOT = Path(stages.__file__).parents[2]


@pytest.mark.parametrize(
    "path",
    [
        "triton_kernels/cpu/encode.py",
        "triton_kernels/cpu/native/backward.c",
        "triton_kernels/cpu/native/vectors.h",
        "triton_kernels/ops.py",
        "crosscoder/training/step.py",
    ],
)
def test_a_studys_folder_follows_every_file_that_computes(path):
    assert ROOT / path in stages.computing_sources()


def test_a_studys_folder_does_not_follow_what_only_shows():
    assert ROOT / "crosscoder/analysis/figures.py" not in stages.computing_sources()
