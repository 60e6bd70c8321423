"""One thread in every test process and in what it starts, so that they do not fight over the cores; Triton is
interpreted."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other on a busy core take ten times as long
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports triton, as models of some families do


def pytest_collection_finish():
    """What was imported stays, so that collecting garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_terminal_summary(terminalreporter):
    """What was not tested for want of a browser is said where nobody overlooks it."""
    skipped = [one for one in terminalreporter.stats.get("skipped", []) if "no browser:" in str(one.longrepr)]
    if skipped:
        terminalreporter.section("NOT TESTED", red=True, bold=True)
        terminalreporter.line(f"{len(skipped)} tests of the feature browser: there is no Chromium here; install it")
