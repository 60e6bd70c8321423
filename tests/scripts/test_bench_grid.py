"""The grid of shapes at a size that means nothing: every arm is there or says why not; columns hold what they say."""

import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
TOY = "2,16,256,64,8+bank"
KEYS = [f"{family}, B=64 L=2 D=16 F=256 K=8" for family in ("crosscoder", "bank")]
SMALL = ["--grid", "--threads=1", "--repeats=2"]
OURS = {"library fp32", "library, BatchTopK", "library, JumpReLU"}
TOGETHER = "library, 4 together"


@pytest.fixture
def grid(monkeypatch):
    """The grid and the program that it belongs to, as modules; without peers, which take long to import."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for module in ("sparsify", "sae_lens", "dictionary_learning"):
        monkeypatch.setitem(sys.modules, module, None)
    import bench_arms
    import bench_grid
    import bench_step

    yield SimpleNamespace(arms=bench_arms, grid=bench_grid, step=bench_step)
    torch.set_num_threads(1)


def rows_of(folder):
    lines = (folder / "step_grid_cpu1.md").read_text().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line[:1] == "|"]
    return {(row[0], row[1], row[3]): dict(zip(header, row, strict=True)) for row in rows}


def median_of(record, name):
    return statistics.median(record["ms"][name])


def test_every_arm_is_measured_or_gives_its_reason(grid, tmp_path, monkeypatch):
    def without_compiler(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", without_compiler)  # it takes half a minute
    monkeypatch.setattr(grid.grid, "memory_in_fresh_process", lambda shape, name, given: 3 * 2**20)
    for label in ("before", "after"):
        assert grid.step.main([*SMALL, "--shapes", TOY, "--label", label, "--out", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "step_grid_cpu1.json").read_text())["cases"]
    assert [sorted(cases[label]) for label in ("before", "after")] == [sorted(KEYS)] * 2
    table = rows_of(tmp_path)
    for family, key in zip(("crosscoder", "bank"), KEYS, strict=True):
        start = "bank, " if family == "bank" else ""
        peers = {"sparsify", "SAELens", "dictionary_learning"} if family == "crosscoder" else set()
        ours = {start + name for name in OURS}
        record = cases["after"][key]
        assert record["ms"].keys() == {f"{start}dense eager", f"{start}{TOGETHER}", *ours}
        assert record["skipped"].keys() == {f"{start}dense torch.compile", *peers}
        assert {name for found, name, _ in table if found == key} == record["ms"].keys() | record["skipped"].keys()
        for name in record["skipped"]:
            assert table[key, name, "after"]["ms a step"].startswith("skipped: ")
        for name in ours:
            row, passes = table[key, name, "after"], record["passes"][name]
            mine, dense = median_of(record, name), median_of(record, f"{start}dense eager")
            assert row["ms a step"] == f"{mine:.3g}"
            assert row["least"] == f"{min(record['ms'][name]):.3g}"
            goal = "yes" if dense / mine >= 3 else "no"
            assert row["dense eager / this"] == f"{dense / mine:.2f} (>= 3: {goal})"
            product = [ms for one, ms in passes["passes_ms"].items() if one.startswith("fp32 ")]
            assert passes["sums_ms"]["fp32"] == pytest.approx(sum(product))
            assert passes["sum_ms"] == min(passes["sums_ms"].values()) > 0
            over = passes["step_ms"] / passes["sum_ms"]
            assert row["step / sum"] == f"{over:.2f} (<= 1.3: {'yes' if over <= 1.3 else 'no'})"
            assert row["peak MiB above parameters, gradients, moments"] == "3"
            assert row["before / after"] == f"{median_of(cases['before'][key], name) / mine:.2f}"
            assert table[key, name, "before"]["before / after"] == "-"
            assert passes["active"] == pytest.approx(8, rel=0.2)  # JumpReLU's threshold was found on x
            wider = name.endswith("JumpReLU")
            assert passes["stored"] > 9 if wider else passes["stored"] == pytest.approx(8)


def test_goals_are_those_of_the_size_and_say_what_nobody_measured(grid):
    def row(n_features, **more):
        ms = {"dense eager": [80.0, 90.0, 100.0], "library fp32": [10.0, 10.0, 10.0], **more}
        record = {"shape": {"n_features": n_features}, "ms": ms, "passes": {}, "peak_extra_bytes": {}}
        return dict(
            zip(grid.grid.HEADER[1:], grid.grid.arm_row("library fp32", "after", {"after": record}), strict=True)
        )

    large = row(2048)
    assert large["dense eager / this"] == "9.00 (>= 8: yes)"
    assert large["sparsify / this"] == "- (>= 3: not measured)"
    assert large["step / sum"] == "- (<= 1.3: not measured)"
    assert row(2048, sparsify=[29.0])["sparsify / this"] == "2.90 (>= 3: no)"
    assert row(1024, sparsify=[29.0])["sparsify / this"] == "2.90"
    assert row(1024)["dense eager / this"] == "9.00 (>= 3: yes)"


def test_a_shape_whose_process_dies_leaves_a_line_and_the_others(grid, tmp_path, monkeypatch):
    """Each shape has a process of its own; here one is killed, and the other runs in this one."""

    def run(command, **_):
        arguments = command[2:]
        died = arguments[-1] == "2,16,512,64,8"
        return SimpleNamespace(returncode=-9 if died else grid.step.main(arguments))

    monkeypatch.setattr(grid.grid, "subprocess", SimpleNamespace(run=run))
    arms = ["--arms", "dense eager", "library fp32", "bank, library fp32", "--no-memory", "--out", str(tmp_path)]
    assert grid.step.main([*SMALL, *arms, "--shapes", "2,16,512,64,8", TOY]) == 1
    table = rows_of(tmp_path)
    lost = table["crosscoder, B=64 L=2 D=16 F=512 K=8", "-", "after"]
    assert lost["ms a step"] == "the process ended with status -9"
    assert {name for key, name, _ in table if key == KEYS[0]} == {"dense eager", "library fp32"}
    assert {name for key, name, _ in table if key == KEYS[1]} == {"bank, library fp32"}


def test_on_a_gpu_bf16_comes_too(grid):
    both = ("crosscoder", "bank")
    here, there = (set(grid.grid.grid_arms(both, device, is_small=True)) for device in ("cpu", "cuda"))
    assert here - set(grid.grid.grid_arms(both, "cpu", is_small=False)) == {TOGETHER, f"bank, {TOGETHER}"}
    assert len(here) == 15
    assert here < there
    assert {grid.arms.ARMS[name].dtype for name in here} == {"fp32"}
    for name in OURS - {"library fp32"} | {TOGETHER, "dense eager", "sparsify", "bank, library, JumpReLU"}:
        assert f"{name} bf16" in there
    assert {"library bf16", "bank, library bf16"} <= there


@pytest.mark.parametrize("text", ["0", "10", "6,256,8192,1024", "6,256,8,1024,32", "6,256,64,1024,8+banks"])
def test_a_shape_that_is_none_is_refused(grid, text, capsys):
    with pytest.raises(SystemExit):
        grid.step.main(["--grid", "--shapes", text])
    assert "--shapes" in capsys.readouterr().err


def test_the_time_of_dictionaries_together_is_that_of_one(grid, monkeypatch):
    monkeypatch.setattr(grid.arms.common, "alternate", lambda steps, *_: {key: [8.0] for key in steps})
    monkeypatch.setattr(grid.arms, "_checked", lambda step: step)
    times, _ = grid.arms.time_arms(grid.grid.read_shape(TOY)[0], ["library, BatchTopK", TOGETHER], 1, "cpu")
    assert times == {"library, BatchTopK": [8.0], TOGETHER: [2.0]}
