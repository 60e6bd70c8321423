"""Damaged and hostile files through every loader: each is refused by one clear line, or read as it is.

A sample of every kind of file is damaged in one place (bits, bytes, lengths, values of its JSON, the table of its
tensors) and read again, most of them with hashes that agree with the damage, as if somebody wanted it believed.
A loader fails that ends in another error than those that the command line says in one line, that takes longer than a
second or 500 MB, or that reads a change of what carries a hash as good. The same seed gives the same inputs.

    python scripts/fuzz.py --inputs 2000
    python scripts/fuzz.py --inputs 100000 --out benchmarks/fuzz
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import random
import resource
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fuzz_samples import Sample, make_samples
from safetensors.torch import load

from crosscoder.foundation.artifact import MANIFEST, SEAL, file_sha256, seal_of

CLEAN = (ValueError, OSError)
MOST_S, MOST_BYTES = 1.0, 500 * 2**20
HANGS_S = 60
RESEALED = 0.8
"""Share of the inputs whose hashes agree with the damage."""
SHOWN = 20
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**12, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320, -1.5),
    *("", "x", "0", "nan", "../../etc/passwd", "\0", "\x1b[31m", "\u202e", "é" * 300, "a" * 10_000, "<script>"),
    *([], {}, [[]], [0], [1, 2, 3], [None], {"a": 1}, {"kind": "TopK"}, [1e308] * 3, ["a"] * 100, [-1] * 2),
)


@dataclass
class Found:
    """What a fuzzing run found, by kind of sample."""

    inputs: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    slowest_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failures: list[str] = field(default_factory=list)
    n_failures: int = 0
    memory_bytes: int = 0


def fuzz(root: Path, *, inputs: int, seed: int = 0, kinds: tuple[str, ...] = ()) -> Found:
    """Damage samples in `root` so many times and read them."""
    samples, found, draw = make_samples(root, kinds), Found(), random.Random(seed)
    for sample in samples:
        sample.load()
    memory = peak_bytes()
    for number in range(inputs):
        (sample,) = draw.choices(samples, [one.weight for one in samples])
        try_one(sample, draw, found, number)
    found.memory_bytes = peak_bytes() - memory
    if found.memory_bytes > MOST_BYTES:
        found.n_failures += 1
        found.failures.append(f"memory rose by {found.memory_bytes:,} bytes")
    return found


def try_one(sample: Sample, draw: random.Random, found: Found, number: int) -> None:
    """Damage one file of a sample, read it, and put the file back."""
    path = draw.choice(sample.chosen())
    before = {one: one.read_bytes() for one in path.parent.iterdir() if one.is_file()}
    try:
        damaged = damage(path, before[path], draw)
        path.write_bytes(damaged)
        is_asked = draw.random() < RESEALED or path.name == MANIFEST
        resealed = sample.sealed and is_asked and reseal(path, draw)
        changed = {one: one.read_bytes() for one in before} != before
        said, seconds = outcome(sample)
        found.inputs[sample.name] += 1
        found.slowest_s[sample.name] = max(found.slowest_s[sample.name], seconds)
        (found.refused if said else found.read)[sample.name] += 1
        wrong = "" if said is None or said.startswith("clean") else said
        if seconds > MOST_S:
            wrong = wrong or f"{seconds:.2f} s"
        if said is None and sample.sealed and changed and not resealed and not same_content(before[path], damaged):
            wrong = "read as good"
        if wrong:
            found.n_failures += 1
            if len(found.failures) < SHOWN:
                found.failures.append(f"{number}: {sample.name}, {path.name}: {wrong}")
    finally:
        for one, content in before.items():
            one.write_bytes(content)
        for one in path.parent.iterdir():
            if one.is_file() and one not in before:
                one.unlink()


def outcome(sample: Sample) -> tuple[str | None, float]:
    """What reading a sample says, None where it is read, and its seconds of a core; a hang ends everything."""
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    start = time.process_time()  # others may be busy on the machine
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            sample.load()
        said = None
    except CLEAN as error:
        is_clear = str(error).strip() and len(str(error)) < 10_000
        said = "clean" if is_clear else f"no clear line: {type(error).__name__} of {len(str(error))} characters"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        said = f"{type(error).__name__}: {str(error)[:200]}"
    faulthandler.cancel_dump_traceback_later()
    return said, time.process_time() - start


def damage(path: Path, content: bytes, draw: random.Random) -> bytes:
    """The content with one change."""
    if path.suffix in (".json", ".jsonl") and draw.random() < 0.6:
        with contextlib.suppress(ValueError):
            return damaged_json(content, draw, lines=path.suffix == ".jsonl")
    if path.suffix == ".safetensors" and draw.random() < 0.6:
        return damaged_table(content, draw)
    return damaged_bytes(content, draw)


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """One bit, byte or length changed, a part removed, repeated or overwritten."""
    at, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    match draw.randrange(8):
        case 0 | 1:
            at = min(at, len(content) - 1)
            return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        case 2:
            return content[:at]
        case 3:
            return content[:at] + content[end:]
        case 4:
            return content[:end] + content[at:end] + content[end:]
        case 5:
            return content[:at] + draw.randbytes(min(16, len(content) - at)) + content[at + 16 :]
        case 6:
            number = draw.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1])
            return content[:at] + number.to_bytes(8, "little") + content[at + 8 :]
        case _:
            return draw.choice([b"", b"\0" * len(content), b"[" * 100_000, b"\xff" * 16, draw.randbytes(64), b"null"])


def damaged_json(content: bytes, draw: random.Random, *, lines: bool) -> bytes:
    """One value replaced by a hostile one, or a key removed, doubled or renamed."""
    rows = content.decode().splitlines() if lines else [content.decode()]
    which = draw.randrange(len(rows))
    value = json.loads(rows[which])
    places = [*_places(value)]
    where, key = draw.choice(places)
    match draw.randrange(6):
        case 0 if isinstance(where, dict):
            del where[key]
        case 1 if isinstance(where, dict):
            where[draw.choice(["", "x", key + "x", key.upper()])] = where.pop(key)
        case 2 if isinstance(where, list):
            where.insert(key, where[key])
        case 3 if isinstance(where[key], int | float) and not isinstance(where[key], bool):
            where[key] = where[key] * draw.choice([-1, 0, 2, 10, 10**9]) + draw.choice([0, 1])
        case _:
            where[key] = draw.choice(HOSTILE)
    text = json.dumps(value, indent=None if lines else draw.choice([None, 1]))
    if draw.random() < 0.05:
        text = text.replace("0", draw.choice(["NaN", "Infinity", "1e999", "1" * 5000]), 1)
    rows[which] = text
    return "\n".join(rows).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every holder and key inside a JSON value, a few of long lists."""
    keys = list(value) if isinstance(value, dict) else range(len(value))[:20] if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def damaged_table(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose table or its length is changed."""
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.1:
        return draw.choice([0, 1, size + 1, len(content), 2**40, 2**63]).to_bytes(8, "little") + content[8:]
    table = damaged_json(content[8 : 8 + size].strip(), draw, lines=False)
    if draw.random() < 0.3:  # another dtype of the same size
        table = table.replace(b'"F32"', draw.choice([b'"I32"', b'"U32"', b'"F64"', b'"F8_E5M2"', b'"BF16"']), 1)
    return len(table).to_bytes(8, "little") + table + content[8 + size :]


def reseal(path: Path, draw: random.Random) -> bool:
    """Make hashes agree with the damage, where that can be done; whether it was."""
    manifest = path.parent / MANIFEST
    if manifest.is_file() and path != manifest:
        known = json.loads(manifest.read_bytes())
        names = list(known["files"])
        if draw.random() < 0.05 and len(names) > 1:
            del known["files"][draw.choice(names)]
        elif draw.random() < 0.05:
            known["files"][draw.choice(["extra.bin", "../x", "a/b", "", MANIFEST])] = {"bytes": 1, "sha256": "0"}
        for name in known["files"]:
            if (path.parent / name).is_file():
                size = (path.parent / name).stat().st_size
                known["files"][name] = {"bytes": size, "sha256": file_sha256(path.parent / name)}
        manifest.write_text(json.dumps(known))
        return True
    if path == manifest:  # what it does not list any more may be missed, what it lists may not
        with contextlib.suppress(ValueError, RecursionError):
            return bool(json.loads(manifest.read_bytes()))
    if path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(path.read_bytes())
            if isinstance(value, dict) and SEAL in value:
                content = {key: one for key, one in value.items() if key != SEAL}
                path.write_text(json.dumps({**content, SEAL: seal_of(content)}))
                return True
    return False


def same_content(before: bytes, after: bytes) -> bool:
    """Whether a change is none: white space, the order of keys and a hash alone are nobody's business."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        a, b = ({k: v for k, v in json.loads(one).items() if k != SEAL} for one in (before, after))
        return a == b
    with contextlib.suppress(Exception):
        a, b = (load(one) for one in (before, after))
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return before == after


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def page(found: Found, seed: int, seconds: float) -> str:
    """The result as Markdown."""
    lines = [
        "# Damaged and hostile files through every loader",
        "",
        f"{sum(found.inputs.values()):,} inputs of seed {seed}, {found.n_failures} failures, {seconds:,.0f} s; memory "
        f"rose by {found.memory_bytes / 2**20:,.0f} MiB at most. `python scripts/fuzz.py` says what a failure is. What "
        "was read holds a change that its hashes agree with and that means something, such as another number.",
        "",
        "| what | inputs | refused | read | slowest, s of a core |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted(found.inputs):
        row = (found.inputs[name], found.refused[name], found.read[name])
        lines.append(f"| {name} | {' | '.join(f'{one:,}' for one in row)} | {found.slowest_s[name]:.2f} |")
    return "\n".join([*lines, *(f"- {one}" for one in found.failures), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="a kind of sample; may be given several times")
    parser.add_argument("--out", type=Path, help="folder for fuzz.md and fuzz.json")
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:
        found = fuzz(Path(root), inputs=given.inputs, seed=given.seed, kinds=tuple(given.only))
    text = page(found, given.seed, time.perf_counter() - start)
    print(text)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "fuzz.md").write_text(text)
        record = {"inputs": found.inputs, "refused": found.refused, "read": found.read, "seed": given.seed}
        record |= {"failures": found.n_failures, "memory_bytes": found.memory_bytes, "slowest_s": found.slowest_s}
        record["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        (given.out / "fuzz.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    raise SystemExit(1 if found.n_failures else 0)


if __name__ == "__main__":
    main()
