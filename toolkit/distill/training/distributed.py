"""Coordinate the processes of one training under torchrun, and split a frozen head's rows over them.

Every process gathers the embeddings of the whole batch and evaluates the same losses on it. So no loss has to know of
other processes: means over labelled images, pairs and duplicate labels are those of a single process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pkd.toolkit.core.errors import BadHead, InputError, RankLost
from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead, finish, stream

STEP_SECONDS = 300.0
"""Longest silence of another rank during training; a rank that has died is noticed at once."""
PREPARE_SECONDS = 7 * 24 * 3600.0
"""Longest wait for the first rank to embed the images."""
T = TypeVar("T")


class DistributedContext:
    """Exchange values between ``world`` processes, of which this is number ``rank``; alone, return what was given."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    @property
    def is_rank_zero(self) -> bool:
        """Tell whether this process is the one that prints and writes the run folder."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """Gather the rows of all processes in rank order, B_r×… → ΣB_r×…; processes may have different numbers of rows.

        Gradients come back as this process's rows times ``world``: every process computes the whole batch's loss, and
        DistributedDataParallel will divide by ``world``.
        """
        if self.world == 1:
            return rows
        result: Tensor = _Gather.apply(rows, self.rank, self.world)  # type: ignore[no-untyped-call]
        return result

    def batch_share(self, batch: int) -> slice:
        """Return this process's part of a batch. Raises InputError where the parts are unequal or under two images."""
        if batch % self.world or (self.world > 1 and batch < 2 * self.world):
            raise InputError(
                f"--batch {batch}: {self.world} ranks need the same number of images each, and at least 2. Give a "
                f"multiple of {self.world}."
            )
        each = batch // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def mean(self, value: float) -> float:
        """Average a value over all processes; the same bits in each."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return float(total) / self.world

    def any(self, value: bool) -> bool:
        """Tell whether ``value`` is true in any process."""
        return self.mean(float(value)) > 0

    def average_gradients(self, module: nn.Module) -> None:
        """Average the gradients of layers outside DistributedDataParallel that saw this process's images alone."""
        if self.world > 1:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world

    def broadcast(self, value: T) -> T:
        """Return rank 0's value in every process. Takes picklable values."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=_device())
        received: T = box[0]
        return received

    def require_same(self, what: str, value: str) -> None:
        """Raise InputError where processes differ in a value that must be equal, such as the digest of their images."""
        if self.broadcast(value) != value:
            raise InputError(f"rank {self.rank}: its {what} differ from those of rank 0. Give every machine the same.")

    def rank_zero_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0, then on the others, which find its results cached. Raises RankLost if 0 failed."""
        if self.world == 1:
            return work()
        patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=PREPARE_SECONDS))
        if self.is_rank_zero:
            done = torch.zeros(1)
            try:
                result = work()
                done += 1
            finally:
                dist.broadcast(done, src=0, group=patient)
        else:
            done = torch.zeros(1)
            with _detect_lost_rank(self.rank):
                dist.broadcast(done, src=0, group=patient)
            if not bool(done):
                raise RankLost(f"rank {self.rank}: rank 0 ended before training began; its message says why.")
            result = work()
        with _detect_lost_rank(self.rank):
            dist.barrier(patient)
        return result

    @contextmanager
    def report_lost_ranks(self, remedy: Callable[[], str]) -> Iterator[None]:
        """Turn a broken connection to another process into RankLost, whose message ends with ``remedy``."""
        if self.world == 1:
            yield
            return
        with _detect_lost_rank(self.rank, remedy):
            yield


SINGLE_PROCESS = DistributedContext()
"""The context of a training in one process."""


@contextmanager
def join_processes() -> Iterator[DistributedContext]:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, MASTER_ADDR in the environment), if it did.

    Uses NCCL with a GPU per process, gloo without. Raises InputError if the processes cannot find each other.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield DistributedContext()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=STEP_SECONDS))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"torchrun: the ranks cannot find each other: {_line(error)}.") from None
    try:
        yield DistributedContext(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()


class ShardedHead(FrozenHead):
    """Keep this process's part of a frozen head's rows: ``shard_bounds`` of all C.

    Asked by all processes about the same (gathered) batch, it gives each the answer of the whole head: every process
    reduces its rows to a largest logit, a sum and a weighted centre per sample, and B×(D+1) numbers are summed.
    """

    def __init__(self, shard: Tensor, first: int, classes: int, *, chunk: int | None = None) -> None:
        super().__init__(shard, chunk=chunk)
        self._first = first
        self._classes = classes

    @classmethod
    def split(
        cls,
        centres: Tensor,
        context: DistributedContext,
        device: torch.device | str = "cpu",
        *,
        chunk: int | None = None,
    ) -> FrozenHead:
        """Take this process's part of ``centres`` (C×D, which may be memory-mapped: only that part is read)."""
        if context.world == 1:
            return FrozenHead(centres.to(device), chunk=chunk)
        first, stop = shard_bounds(len(centres), context)
        return cls(centres[first:stop].to(device), first, len(centres), chunk=chunk)

    @property
    def classes(self) -> int:
        """Count the classes of all processes together."""
        return self._classes

    def rows(self, indices: Tensor) -> Tensor:
        """Collect the centres of int64 class indices, K → K×D, from the processes that hold them."""
        here = indices - self._first
        inside = (here >= 0) & (here < len(self.centres))
        rows = super().rows(here.clamp(0, len(self.centres) - 1)) * inside[:, None]
        dist.all_reduce(rows)
        return rows

    def reduce(self, unit: Tensor, scale: float, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute log Σ exp and the softmax-weighted centre over the rows of all processes."""
        here = None if exclude is None else exclude - self._first
        top, total, weighted = stream(unit, self.centres, scale, here, self.chunk)
        highest = top.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        sums = torch.cat([total[:, None], weighted], dim=1) * (top - highest).exp2()[:, None]
        dist.all_reduce(sums)
        return finish(highest, sums[:, 0], sums[:, 1:])


def shard_bounds(classes: int, context: DistributedContext) -> tuple[int, int]:
    """Return the first row of this process and of the next. Raises BadHead for fewer classes than processes."""
    if classes < context.world:
        raise BadHead(f"a head of {classes} classes cannot be split over {context.world} ranks. Start fewer ranks.")
    return classes * context.rank // context.world, classes * (context.rank + 1) // context.world


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world: int) -> Tensor:
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        sizes = [int(count) for count in counts]
        most = max(sizes)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        ctx.start, ctx.count, ctx.world = sum(sizes[:rank]), len(rows), world
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.start : ctx.start + ctx.count] * ctx.world, None, None


@contextmanager
def _detect_lost_rank(rank: int, remedy: Callable[[], str] = lambda: "") -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _is_connection(error):
            raise
        raise RankLost(
            f"rank {rank}: another rank has ended or is silent ({_line(error)}). {remedy()}".rstrip()
        ) from None


def _is_connection(error: RuntimeError) -> bool:
    """Tell whether torch.distributed raised it: gloo and NCCL errors are DistError or name their transport."""
    signs = ("gloo", "nccl", "connection", "timed out", "timeout", "recv", "peer")
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)


def _line(error: Exception) -> str:
    """Cut a message to its first sentence, without the place in torch's source that it starts with."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\] *", "", first).split(". ")[0].strip().rstrip(".")[:160]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
