"""Processes of one job (`torchrun`) that work on one thing: what they tell each other, and how many bytes that is.

Every rank calls the same collectives in the same order. A rank that ends takes the others with it: their next
collective is a `LostRankError`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name of the same
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: one of them may measure or write meanwhile."""
JOIN_TIMEOUT = timedelta(minutes=1)
"""How long it waits for one that was there a moment ago, to make a group with it."""

SECONDS_TO_SPEAK = 3.0


class LostRankError(RuntimeError):
    """Another rank ended, or failed; its own message says why."""


class DesyncError(RuntimeError):
    """Ranks that should hold the same do not."""


class Ranks:
    """The ranks of a group. Without a group there is this process alone, and nothing is sent.

    data: of a mesh (`mesh`), the ranks that do the same as this one for other tokens; this one alone without a mesh.
    job: all ranks of the mesh; without one these.
    traffic: bytes of what was summed, gathered and told, by name; of a gather, what every rank holds after it. A ring
        moves `2 (R - 1) / R` times the bytes of a sum through each rank, and `(R - 1) / R` times those of a gather.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, data: DataRanks | None = None, job: Ranks | None = None
    ) -> None:
        self.group, self._data, self._job = group, data, job
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.traffic: Counter[str] = Counter()

    def apart(self) -> Ranks:
        """The same ranks as a group of their own, by way of the CPU: what one thread tells does not mix with another's.
        All ranks call it."""
        if self.size == 1:
            return Ranks()
        self.add(torch.zeros(1), "told")  # all are here: torch does not notice one that ends while a group is made
        with self._others():
            members = dist.get_process_group_ranks(self.group)
            group = dist.new_group(members, timeout=JOIN_TIMEOUT, backend="gloo")
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)
        return Ranks(group)

    @property
    def data(self) -> DataRanks:
        return self._data or ALONE

    @property
    def job(self) -> Ranks:
        return self._job or self

    def mesh(self, n_data: int) -> Ranks:
        """These ranks as `n_data` groups, each of which works on its own share of every batch's tokens: the group of
        this rank, whose members divide a dictionary. All ranks call it; traffic of either axis is counted as theirs.

        Raises:
            ValueError: they cannot be parted into so many groups of one size.
        """
        if n_data < 1 or self.size % n_data:
            raise ValueError(
                f"{self.size} ranks cannot be parted into {n_data} groups of one size that share out the tokens; give "
                "a number of data ranks that divides theirs"
            )
        if n_data == 1:
            return self
        table = torch.tensor(dist.get_process_group_ranks(self.group)).view(n_data, -1)
        parts, data = None, self.group
        if table.shape[1] > 1:
            self.add(torch.zeros(1), "told")  # as in `apart`
            with self._others():
                parts, _ = dist.new_subgroups_by_enumeration(table.tolist(), timeout=JOIN_TIMEOUT)
                data, _ = dist.new_subgroups_by_enumeration(table.T.tolist(), timeout=JOIN_TIMEOUT)
            for made in (parts, data):
                dist.distributed_c10d._set_pg_timeout(TIMEOUT, made)
        found = Ranks(parts, data=DataRanks(data), job=self)
        found.traffic = found.data.traffic = self.traffic
        return found

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def add(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over ranks, in place; the same bits on all."""
        return self._reduce(tensor, dist.ReduceOp.SUM, what)

    def largest(self, tensor: Tensor, what: str) -> Tensor:
        """The largest over ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX, what)

    def _reduce(self, tensor: Tensor, how: dist.ReduceOp.RedOpType, what: str) -> Tensor:
        if self.size > 1 and tensor.numel():
            self.traffic[what] += tensor.nbytes
            with self._others():
                dist.all_reduce(tensor, how, group=self.group)
            torch.autograd.graph.increment_version(tensor)  # torch does not count this write
        return tensor

    def gather(self, tensor: Tensor, what: str) -> Tensor:
        """The tensors of all ranks, `[R, ...]`; their shapes are equal."""
        if self.size == 1 or not tensor.numel():
            return tensor.expand(self.size, *tensor.shape)
        flat = tensor.contiguous().view(-1)
        found = flat.new_empty(self.size * flat.numel())
        self.traffic[what] += found.nbytes
        with self._others():
            _all_gather(found, flat, group=self.group)
        return found.view(self.size, *tensor.shape)

    def share(self, tensor: Tensor, what: str) -> Tensor:
        """What rank 0 holds, in place."""
        if self.size > 1:
            self.traffic[what] += tensor.nbytes
            with self._others():
                dist.broadcast(tensor, group=self.group, group_src=0)
            torch.autograd.graph.increment_version(tensor)
        return tensor

    def give(self, tensor: Tensor) -> None:
        """Send a tensor to rank 0, which takes it."""
        with self._others():
            dist.send(tensor.contiguous(), group=self.group, group_dst=0)

    def take(self, into: Tensor, source: int) -> Tensor:
        """What a rank gives to this one, rank 0, written into a tensor; counted as `gathered to rank 0`."""
        self.traffic["gathered to rank 0"] += into.nbytes
        with self._others():
            dist.recv(into, group=self.group, group_src=source)
        return into

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, plain values of JSON, on every rank. Where it fails, the others fail with it."""
        if self.size == 1:
            return make()
        failure, made = None, None
        if self.is_first:
            try:
                made = make()
            except BaseException as error:  # noqa: BLE001 - raised again, when the others know of it
                failure = error
        content = b"" if failure is not None else json.dumps(made).encode()
        size = self.share(torch.tensor([-1 if failure is not None else len(content)]), "told")
        if failure is not None:
            raise failure
        if (n_bytes := int(size)) < 0:
            raise LostRankError("rank 0 failed; its message says why")
        told = torch.zeros(n_bytes, dtype=torch.uint8)
        if self.is_first:
            told.copy_(torch.tensor(list(content), dtype=torch.uint8))
        return json.loads(bytes(self.share(told, "told").tolist()))

    @contextlib.contextmanager
    def _others(self) -> Generator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if isinstance(error, LostRankError):
                raise
            raise LostRankError(
                f"rank {dist.get_rank()} lost the others: one ended or stands still ({error})"
            ) from error


class DataRanks(Ranks):
    """Ranks that hold the same and each work on a run of every batch's tokens, as `Tensor.tensor_split` parts them."""

    n_tokens = n_own = 0  # of the batch at hand

    def part(self, x: Tensor) -> Tensor:
        """This rank's tokens of a batch `[B, ...]`, of which it may have none."""
        if self.size == 1:
            return x
        own = x.tensor_split(self.size)[self.rank]
        self.n_tokens, self.n_own = len(x), len(own)
        return own

    def of_all(self, n_own: int) -> int:
        """How many tokens the batch at hand has on all ranks, of which this one was given `n_own` by `part`.

        Raises:
            ValueError: it was given others.
        """
        if self.size > 1 and n_own != self.n_own:
            raise ValueError(
                f"{n_own} tokens are not this rank's share of a batch of {self.n_tokens}; take `part` first"
            )
        return n_own if self.size == 1 else self.n_tokens

    def rows(self, own: Tensor, what: str) -> Tensor:
        """The rows of the batch at hand on all ranks, `[B, ...]`, one a token; on every rank."""
        if self.size == 1:
            return own
        sizes = [len(one) for one in torch.arange(self.n_tokens).tensor_split(self.size)]
        padded = own.new_zeros(sizes[0], *own.shape[1:])
        padded[: len(own)] = own
        return torch.cat([one[:size] for one, size in zip(self.gather(padded, what), sizes, strict=True)])


ALONE = DataRanks()
"""This process, which has all tokens."""


def of_launcher() -> tuple[int, int, int] | None:
    """Rank, number of ranks and rank on this machine, as `torchrun` says them; None without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [os.environ.get(name) for name in names]
    if given[1] is None:
        return None
    if not all(one is not None and one.isdigit() for one in given) or int(given[0] or 0) >= int(given[1]):
        said = ", ".join(f"{name}={value}" for name, value in zip(names, given, strict=True))
        raise ValueError(f"the environment says {said}; start with torchrun, which sets all, or unset WORLD_SIZE")
    rank, size, local = (int(one or 0) for one in given)
    return rank, size, local


@contextlib.contextmanager
def joined(device: str) -> Generator[Ranks]:
    """This process as a rank of the job that `torchrun` started, until the end; alone without one, or with one rank.

    device: what tensors will be on; `cuda` is this rank's own GPU, see `own_device`.
    """
    launched = of_launcher()
    if launched is None or launched[1] == 1:
        yield Ranks()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(own_device(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    yield Ranks(dist.group.WORLD)
    dist.destroy_process_group()  # not after an error: the others may be inside a collective, and the process ends


def current() -> Ranks:
    """The ranks of the job that this process has joined; alone where it has not."""
    return Ranks(dist.group.WORLD) if dist.is_initialized() else Ranks()


def is_first_to_fail(error: BaseException) -> bool:
    """Whether no other rank has said yet why the job ends; asked once, by a rank that fails. One that only lost the
    others lets them speak first."""
    if not dist.is_initialized():
        return True
    if isinstance(error, LostRankError):
        time.sleep(SECONDS_TO_SPEAK)
    with contextlib.suppress(RuntimeError):
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    return True


def own_device(device: str) -> str:
    """The device of this rank: `cuda` is the GPU of its number on this machine."""
    launched = of_launcher()
    if launched is None or launched[1] == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise ValueError(f"device is {device!r}, one GPU for all {launched[1]} ranks; give --device cuda")
    if launched[2] >= torch.cuda.device_count():
        raise ValueError(
            f"rank {launched[0]} is number {launched[2]} on this machine, which has {torch.cuda.device_count()} GPUs; "
            "start as many processes as there are GPUs (--nproc-per-node)"
        )
    return f"cuda:{launched[2]}"
