"""The benchmarks at sizes that mean nothing: they must run, write what they promise, and notice what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_kernels

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = ["--batch=64", "--n-layers=2", "--d-model=16", "--n-features=256", "--k=8", "--threads=1", "--repeats=3"]


@pytest.fixture
def bench(monkeypatch):
    """The benchmarks as modules, imported as a script imports its neighbours."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_common
    import bench_kernels
    import bench_step

    yield {"common": bench_common, "kernels": bench_kernels, "step": bench_step}
    torch.set_num_threads(1)


def run_script(name, *arguments, **variables):
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


@pytest.mark.parametrize("kind", ["crosscoder", "bank"])
def test_kernels_report_times_floors_and_errors(bench, tmp_path, kind, capsys):
    more = ["--bank", "--product", "bf16"] if kind == "bank" else []
    assert bench["kernels"].main([*TINY, *more, "--tiny-limits", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    stem = f"kernels_cpu1_{kind}_{'bf16' if more else 'fp32'}_F256"
    record = json.loads((tmp_path / f"{stem}.json").read_text())
    assert {"shape", "product", "tables", "limits", "operators", "errors", "machine"} <= record.keys()
    assert {"chip", "versions", "started", "git_commit", "threads"} <= record["machine"].keys()
    names = [row["name"] for row in record["operators"]]
    expected = ["encode GEMM", "selection", "decode + loss", "dz + dW_dec", "dW_enc + bias", "gradient norms", "Adam"]
    assert set(expected) <= set(names)
    assert ("rescoring" in names) == bool(more)
    for row in record["operators"]:
        assert row["ms"] > 0
        assert row["fraction"] == pytest.approx(row["floor_ms"] / row["ms"])
    assert all(verdict["allowed"] for verdict in record["errors"].values())
    assert (tmp_path / f"{stem}_roofline.svg").read_text().startswith("<?xml")
    assert record["machine"]["chip"] in (tmp_path / f"{stem}.md").read_text()


def test_a_wrong_operator_is_noticed(bench, monkeypatch):
    shape = bench["common"].Shape(8, 2, 16, 64, 4)
    problem = bench["common"].make_problem(shape, bank=False, dtype="fp32", device="cpu")
    assert bench["kernels"].errors(problem, "fp32", 4)["gather_sum"]["allowed"]
    right = triton_kernels.gather_sum

    def wrong(*arguments):
        out = right(*arguments)
        out[3, 5] += 1e-4
        return out

    monkeypatch.setattr(triton_kernels, "gather_sum", wrong)
    assert not bench["kernels"].errors(problem, "fp32", 4)["gather_sum"]["allowed"]
    monkeypatch.setattr(triton_kernels, "gather_sum", lambda *arguments: right(*arguments) * torch.nan)
    assert not bench["kernels"].errors(problem, "fp32", 4)["gather_sum"]["allowed"]


def test_a_wrong_choice_is_noticed(bench, monkeypatch):
    shape = bench["common"].Shape(8, 2, 16, 64, 4)
    problem = bench["common"].make_problem(shape, bank=False, dtype="fp32", device="cpu")
    right = triton_kernels.encode_top_k

    def second_best(*arguments):
        values, features, z = right(*arguments[:5], arguments[5] + 1, *arguments[6:])
        keep = torch.arange(values.numel()) % 5 != values.view(-1, 5).argmax(1).repeat_interleave(5)
        return values[keep], features[keep], z[keep]

    monkeypatch.setattr(triton_kernels, "encode_top_k", second_best)
    verdicts = bench["kernels"].judge_encoders(problem, "fp32", 4)
    assert not verdicts["encode_top_k"]["allowed"]
    assert verdicts["encode_batch_top_k"]["allowed"]


def test_steps_take_turns_and_are_reported(bench, tmp_path):
    arms = ["dense eager", "library fp32", "library bf16", "whole-row kernels"]
    arms += ["bank, dense eager", "bank, library fp32"]
    assert bench["step"].main([*TINY, "--no-memory", "--targets", "--out", str(tmp_path), "--arms", *arms]) == 0
    record = json.loads((tmp_path / "step_cpu1_F256.json").read_text())
    assert set(record["ms"]) == set(arms)
    assert all(len(times) == 3 for times in record["ms"].values())
    table = (tmp_path / "step_cpu1_F256.md").read_text()
    assert all(f"| {name} |" in table for name in arms)
    assert "| target | measured | met? |" in table


def test_an_arm_that_cannot_run_gives_its_reason(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    arms = ["dense eager", "SAELens"]
    assert bench["step"].main([*TINY, "--no-memory", "--out", str(tmp_path), "--arms", *arms]) == 0
    record = json.loads((tmp_path / "step_cpu1_F256.json").read_text())
    assert list(record["ms"]) == ["dense eager"]
    assert "not installed" in record["skipped"]["SAELens"]
    assert "skipped: sae-lens is not installed" in (tmp_path / "step_cpu1_F256.md").read_text()


def test_peak_memory_is_that_of_a_fresh_process(tmp_path):
    shape = ["--batch=256", "--n-layers=1", "--d-model=16", "--n-features=16384", "--k=4", "--threads=1"]
    dense = int(run_script("bench_step.py", *shape, "--memory-of=dense eager").stdout)
    grid = 256 * 16384 * 4
    assert dense > 2 * grid  # scores, their relu, the code and its gradient


def test_a_sweep_sets_the_step_beside_its_passes(bench, tmp_path):
    assert bench["step"].main([*TINY, "--sweep", "F", "--values", "64", "256", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "step_cpu1_sweep_F.json").read_text())
    assert record["values"] == [64, 256]
    assert {"dense eager", "library fp32", "library bf16"} == record["ms"].keys()
    for product in ("fp32", "bf16"):
        sums = record["sums_of_passes"][f"sum of passes, {product}"]
        assert sums == [pytest.approx(sum(one.values())) for one in record["passes"][product]]
    assert "step / sum, fp32" in (tmp_path / "step_cpu1_sweep_F.md").read_text()
    assert (tmp_path / "step_cpu1_sweep_F.svg").read_text().startswith("<?xml")


def test_without_matplotlib_the_numbers_are_still_written(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench["step"].main([*TINY, "--sweep", "K", "--values", "4", "--out", str(tmp_path)]) == 0
    assert "no plot: matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "step_cpu1_sweep_K.json").is_file()
    assert not list(tmp_path.glob("*.svg"))


def test_parity_runs_without_pytest_and_finds_fp32_in_order():
    done = run_script("gpu_parity.py", "--device", "cpu", "--tiny")
    assert done.stdout.count("failures so far") == 8, done.stderr
    verdict = done.stdout.splitlines()[8:]
    assert verdict == ["parity, repetition and memory: all as they should be"] or all(
        "tables bf16" in complaint for complaint in verdict
    )


def test_both_ways_to_the_maxima_are_timed_and_checked(tmp_path):
    """In a process of its own, where Triton can be told to interpret before it is imported."""
    sizes = ["--rows", "8", "--n-features", "64", "--n-layers", "2", "--widths", "8", "--repeats", "1"]
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import bench_epilogue\n"
        "from tests.kernels.interpreter import right_bf16\n"
        "with right_bf16(): sys.exit(bench_epilogue.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--device", "cpu", *sizes, "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "epilogue_cpu.json").read_text())["widths"]
    assert [entry["width"] for entry in found] == [8]
    assert min(min(entry[what].values()) for entry in found for what in ("slab_ms", "encode_ms")) > 0
    table = (tmp_path / "epilogue_cpu.md").read_text()
    assert "| 8 | " in table
    # As it comes, the interpreter multiplies bf16 wrongly: the check must say so.
    done = run_script("bench_epilogue.py", "--device", "cpu", *sizes, "--out", tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stderr


@pytest.mark.parametrize("name", ["gpu_check.sh", "install_peers.sh"])
def test_shell_scripts_parse(name):
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)


def test_an_update_block_by_block_leaves_the_same_and_is_timed(tmp_path):
    done = run_script("bench_update.py", "--shapes", "2,16,700,32,4", "--repeats", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "update_cpu.json").read_text())["shapes"]
    assert min(found["ms"].values()) > 0
    assert "| 2,16,700,32,4 | " in (tmp_path / "update_cpu.md").read_text()
