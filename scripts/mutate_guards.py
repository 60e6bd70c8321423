"""Each guard taken away, one at a time, and the tests that are to notice: one must fail, or the guard is untested.

The package is copied, one line of a guard is replaced in the copy, and its tests run there against the copy.

    python scripts/mutate_guards.py --out benchmarks/mutation
    python scripts/mutate_guards.py --only "checkpoint: finite"
"""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import torch
import transformers  # noqa: F401  # once for all children

ROOT = Path(__file__).parents[1]
COPIED = ("crosscoder", "triton_kernels", "tests", "scripts", "benchmarks", "docs", "pyproject.toml", "README.md")
ARTIFACT, DISK = "crosscoder/foundation/artifact.py", "crosscoder/foundation/disk.py"
STEP = "crosscoder/training/step.py"
KEPT, CHECKPOINT = "triton_kernels/cpu/native/kept.py", "crosscoder/training/checkpoint.py"
FAULTS, KEEPING = "tests/foundation/test_faults.py", "tests/training/test_checkpoint.py"
OF_KERNELS, NUMBERS = "tests/kernels/test_kept.py", "tests/dictionary/test_numbers.py"
TIMEOUT_S, NO_RUN = 300, 99
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""Of packages that this process has loaded."""
torch.set_num_threads(1)


class Guard(NamedTuple):
    """What is taken away: a text of a file, what stands in its place, and the tests that are to notice."""

    name: str
    path: str
    text: str
    instead: str
    tests: str


GUARDS = (
    Guard("kernels: owner and mode of a file", KEPT, "if _is_ours(os.fstat(descriptor), stat.S_ISREG) and ", "if ", OF_KERNELS),
    Guard("kernels: hash of a file", KEPT, " and _content(descriptor) == path.stem.rsplit(\"-\", 1)[1]", "", OF_KERNELS),
    Guard("kernels: owner and mode of the folder", KEPT, "not _is_ours(folder.lstat(), stat.S_ISDIR) or ", "", OF_KERNELS),
    Guard("kernels: folders above", KEPT, " or not _is_out_of_reach(folder)", "", OF_KERNELS),
    Guard("kernels: links", KEPT, "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDONLY", OF_KERNELS),
    Guard("kernels: one compiler at a time", KEPT, "            fcntl.flock(descriptor, fcntl.LOCK_EX)\n", "", OF_KERNELS),
    Guard("kernels: loaded before kept", KEPT, "loaded = ctypes.CDLL(str(made))", "loaded = None", OF_KERNELS),
    Guard("manifest: sizes", ARTIFACT, "!= entry.get(\"bytes\")", "== -1", KEEPING),
    Guard("manifest: hashes", ARTIFACT, "if hashes and file_sha256(file)", "if False and file_sha256(file)", FAULTS + " tests/foundation/test_foundation.py"),
    Guard("manifest: lists no file", ARTIFACT, "if not files and not required:", "if False:", FAULTS),
    Guard("manifest: safe names", ARTIFACT, "if not _SAFE_NAME.match(name)]:", "if False]:", "tests/foundation/test_foundation.py"),
    Guard("manifest: required files", ARTIFACT, "name for name in required if name not in files", "name for name in () if name not in files", "tests/dictionary/test_pretrained.py"),
    Guard("manifest: files that it does not list", ARTIFACT, "if closed and (more", "if False and (more", FAULTS),
    Guard("manifest: schema", ARTIFACT, "    if seen != expected:", "    if False:", FAULTS),
    Guard("JSON: numbers that no float holds", ARTIFACT, "if math.isfinite(number) else _refuse_constant(text[:80])", "", FAULTS),
    Guard("JSON: keys that stand twice", ARTIFACT, "if len(found) < len(pairs):", "if False:", FAULTS),
    Guard("JSON: size", ARTIFACT, "if size > MAX_JSON_BYTES:", "if False:", FAULTS),
    Guard("seal of a JSON file", ARTIFACT, "if value[SEAL] != (found := seal_of(content)):", "found = ''\n    if False:", FAULTS),
    Guard("seal of tensors", "crosscoder/foundation/tensors.py", "if given != (found := _seal_of(tensors)):", "found = ''\n    if False:", FAULTS),
    Guard("folder: restored after a kill", ARTIFACT, "            retired.rename(final)\n        if (final", "            pass\n        if (final", FAULTS),
    Guard("folder: finished after a kill", ARTIFACT, "if (final / _PENDING).is_dir():", "if False:", FAULTS),
    Guard("disk: full", DISK, "if isinstance(error, DiskFullError) or not is_full_disk(error):", "if True:", FAULTS),
    Guard("disk: leftovers", DISK, "        if _is_abandoned(path):", "        if False:", FAULTS),
    Guard("disk: live writers", DISK, "    except BlockingIOError:\n        return False\n", "    except BlockingIOError:\n        return True\n", FAULTS),
    Guard("terminal: control characters", "crosscoder/foundation/console.py", "    print(plain(message), file", "    print(message, file", FAULTS),
    Guard("checkpoint: finite", CHECKPOINT, "        require_sound(state)\n        if self._folder is None or (", "        if self._folder is None or (", KEEPING),
    Guard("checkpoint: set aside", CHECKPOINT, "        set_damaged_aside(self._folder / \"checkpoints\", after=step_of(newest))\n", "", KEEPING),
    Guard("checkpoint: none can be read", CHECKPOINT, "elif among is None and len(there := checkpoints_in(home)) > 1:", "elif False:\n            there = []", KEEPING),
    Guard("checkpoint: whole ones are counted", CHECKPOINT, "if not fault_of(path, hashes=False)][-KEEP:]", "][-KEEP:]", KEEPING),
    Guard("checkpoint: its metrics", "crosscoder/training/history.py", "path = checkpoint / METRICS if is_kept else live", "path = live", KEEPING),
    Guard("checkpoint: its tensors", CHECKPOINT, "    if found.keys() != expected.keys():", "    if False:", KEEPING),
    Guard("checkpoint: its step", CHECKPOINT, "if wrong or found[\"step\"] != step_of(checkpoint):", "if wrong:", KEEPING),
    Guard("store: shards of the index", "crosscoder/data/shards.py", "if {INDEX, *(shard.file for shard in index.shards)} != files:", "if False:", "tests/data/test_shards.py"),
    Guard("store: what is not finite", "crosscoder/data/residuals.py", "    if not bool(bad_BL.any()):", "    if True:", "tests/data/test_shards.py"),
    Guard("store: less text than asked", "crosscoder/data/shards.py", "if max_tokens is not None and stream.n_tokens < max_tokens:", "if False:", "tests/data/test_shards.py"),
    Guard("subject: its manifest", "crosscoder/data/subject.py", "        require_written(Path(name_or_path))\n", "        pass\n", "tests/data/test_subject_training.py"),
    Guard("evaluation: scores", "crosscoder/dictionary/dictionary.py", "            codec.require_scores_in_range(x_BLD, self.grouped(), self._most_weight())\n", "            pass\n", NUMBERS),
    Guard("evaluation: reconstruction", "crosscoder/dictionary/dictionary.py", "if not self.training and not bool(torch.isfinite(recon).all()):", "if False:", NUMBERS),
    Guard("step: batch", STEP, "    if where := non_finite(x_BLD):", "    if where := '':", "tests/training/test_trainer.py"),
    Guard("step: loss and gradient", STEP, "        if not _are_finite(loss_S, norm_S):", "        if False:", "tests/training/test_trainer.py"),
    Guard("step: sums that are not finite", "crosscoder/dictionary/codec.py", "if math.isfinite(x_BLD.sum().item()) or not bool((bad_BLD := ~torch.isfinite(x_BLD)).any()):", "bad_BLD = ~torch.isfinite(x_BLD)\n    if math.isfinite(x_BLD.sum().item()):", NUMBERS),
    Guard("export: scale", "crosscoder/dictionary/dictionary.py", "if not bool((self.input_scale > 0).all() and", "if False and not bool((self.input_scale > 0).all() and", NUMBERS),
    Guard("export: finite", "crosscoder/formats/saelens.py", "if not bool(torch.isfinite(tensor).all())]:", "if False]:", NUMBERS),
    Guard("load: scale", "crosscoder/dictionary/saved.py", "if not bool((tensors[\"input_scale\"] > 0).all()):", "if False:", NUMBERS),
    Guard("measure: constant layers", "crosscoder/measure/reading.py", "NO_VARIANCE * self.square_EL.sum(0)", "-torch.inf", NUMBERS),
    Guard("settings: counts", "crosscoder/foundation/config.py", "if value is not None and (type(value) is not int or", "if value is not None and (False and", FAULTS),
    Guard("report: markup at the beginning of a line", "crosscoder/report/page.py", "(>|\\*|#|", "(", "tests/report/test_report_words.py"),
)  # fmt: skip


def caught_by(guard: Guard, copy: Path) -> str:
    """The first test that fails without a guard; empty if none does."""
    path = copy / guard.path
    before = path.read_text(encoding="utf-8")
    if before.count(guard.text) != 1:
        raise SystemExit(f"{guard.name}: {guard.path} holds its text {before.count(guard.text)} times; expected once")
    path.write_text(before.replace(guard.text, guard.instead), encoding="utf-8")
    try:
        return _first_failure(guard.tests.split(), copy)
    finally:
        path.write_text(before, encoding="utf-8")


def _first_failure(tests: list[str], copy: Path) -> str:
    """Run tests on the copy in a child of this process, which has loaded what is slow to load and nothing of ours."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            _run_and_end(tests, copy, said.fileno())
        status = _wait(child)
        if status is None:
            return "a test that does not end"
        if os.WIFSIGNALED(status):
            return f"the tests end by signal {os.WTERMSIG(status)}"  # as users' processes would
        said.seek(0)
        lines = said.read().splitlines()
        if os.waitstatus_to_exitcode(status) == NO_RUN:
            raise SystemExit("\n".join(["the tests could not be run:", *lines[-20:]]))
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return failed[0].split(" ")[1].strip() if os.waitstatus_to_exitcode(status) and failed else ""


def _run_and_end(tests: list[str], copy: Path, said: int) -> NoReturn:
    """What the child does; it never returns to what its parent does."""
    code = NO_RUN
    try:
        for descriptor in (1, 2):
            os.dup2(said, descriptor)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        code = int(pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "-n", "0", *QUIET]))
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(child: int) -> int | None:
    """How a child ended; None if it was ended after `TIMEOUT_S`."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def page(found: dict[Guard, str], seconds: float) -> str:
    """The result as Markdown."""
    rows = [
        f"| {guard.name} | `{guard.path}` | `{test or 'NONE'}` |".replace("[", "\\[") for guard, test in found.items()
    ]
    caught = sum(map(bool, found.values()))
    return "\n".join(
        [
            "# Guards taken away",
            "",
            f"{caught} of {len(found)} guards are noticed by a test when they are taken away; {seconds:,.0f} s. "
            "`python scripts/mutate_guards.py` takes them away, one at a time.",
            "",
            "| guard | in | the first test that fails without it |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="a guard; may be given several times")
    parser.add_argument("--out", type=Path, help="folder for mutation.md")
    given = parser.parse_args()
    start, found = time.perf_counter(), dict[Guard, str]()
    with tempfile.TemporaryDirectory(prefix="mutate-") as home:
        for name in COPIED:
            source, target = ROOT / name, Path(home) / name
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copy(source, target)
        for guard in GUARDS:
            if not given.only or guard.name in given.only:
                found[guard] = caught_by(guard, Path(home))
                print(f"{guard.name}: {found[guard] or 'NOT NOTICED'}", flush=True)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "mutation.md").write_text(page(found, time.perf_counter() - start), encoding="utf-8")
    raise SystemExit(0 if all(found.values()) else 1)


if __name__ == "__main__":
    main()
