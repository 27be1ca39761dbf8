"""The head split over two ranks, half of its rows each, against one process: time per step and memory per rank.

Run as: python benchmarks/two_ranks.py                           (about two minutes; 500,000 classes, B=128, D=512)

Both start as fresh processes with one thread each; the ranks talk over gloo on this machine and gather a batch of which
each made half. Times are CPU time of the thread that computes (waiting for the other rank does not count), medians over
the steps. Memory is resident: what the process holds in steady state, and its peak. Writes
benchmarks/results/two_ranks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead, frozen_cross_entropy
from pkd.toolkit.distill.heads.margin import Margin
from pkd.toolkit.distill.training.distributed import DistributedContext, ShardedHead, join_processes, shard_bounds

RESULTS = Path(__file__).resolve().parent / "results" / "two_ranks.json"
BATCH, DIM = 128, 512


def main() -> int:
    """Measure one process, then two, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=500_000)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.member:
        with join_processes() as context:
            print(json.dumps(measure(args.classes, args.steps, context)))
        return 0
    found = {
        "classes": args.classes, "batch": BATCH, "dim": DIM, "torch": torch.__version__,
        "one process": start(args, 1), "two ranks": start(args, 2),
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return 0


def start(args: argparse.Namespace, world: int) -> list[dict[str, Any]]:
    """Run ``world`` ranks side by side, and read what each reports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--member", "--classes", str(args.classes), "--steps", str(args.steps)]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    return [json.loads(rank.communicate()[0]) for rank in ranks]


def measure(classes: int, count: int, context: DistributedContext) -> dict[str, Any]:
    """One rank's median CPU seconds per step and its memory; the rows of other ranks are never made."""
    first, stop = shard_bounds(classes, context)
    base = kilobytes("VmRSS")
    rows = make_rows(first, stop)
    head = ShardedHead(rows, first, classes) if context.world > 1 else FrozenHead(rows)
    torch.manual_seed(10**9)  # no seed of a block of rows: an embedding that is a centre would be a special case
    embeddings, labels = torch.randn(BATCH, DIM), torch.randint(0, classes, (BATCH,))
    mine = context.batch_share(BATCH)
    own = embeddings[mine].requires_grad_()
    margin = Margin("arcface", 0.5)
    cpu: list[float] = []
    for step in range(count + 1):
        before = time.thread_time()
        loss = frozen_cross_entropy(context.gather(own), head, context.gather(labels[mine]), margin, 64)
        torch.autograd.grad(loss, own)
        if step:
            cpu.append(time.thread_time() - before)
    return {
        "cpu_seconds": cpu, "rows": stop - first, "loss": float(loss.detach()),
        "resident_mb": (kilobytes("VmRSS") - base) / 1024, "peak_mb": (kilobytes("VmHWM") - base) / 1024,
    }  # fmt: skip


def make_rows(first: int, stop: int) -> Tensor:
    """Rows ``first`` … ``stop`` − 1 of a head of random unit rows that depends on the row numbers alone."""
    rows = torch.empty(stop - first, DIM)
    for block in range(first // 10_000, (stop + 9_999) // 10_000):
        begin = block * 10_000
        made = normalize(torch.randn(10_000, DIM, generator=torch.Generator().manual_seed(block)))
        inside = slice(max(first, begin), min(stop, begin + 10_000))
        rows[inside.start - first : inside.stop - first] = made[inside.start - begin : inside.stop - begin]
    return rows


def kilobytes(field: str) -> int:
    """Read a figure of this process in kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def table(results: dict[str, Any]) -> str:
    """Markdown: one process and each rank."""
    (alone,) = results["one process"]
    whole = statistics.median(alone["cpu_seconds"])
    text = [
        f"C={results['classes']:,} float32, B={results['batch']}, D={results['dim']}, one thread a rank, gloo.",
        "",
        "| process | class rows | CPU seconds a step | of one process | resident MB | peak MB | loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    named = [("one process", alone), *((f"rank {i} of 2", rank) for i, rank in enumerate(results["two ranks"]))]
    for name, rank in named:
        seconds = statistics.median(rank["cpu_seconds"])
        text.append(
            f"| {name} | {rank['rows']:,} | {seconds:.3f} | {seconds / whole:.2f}× | {rank['resident_mb']:,.0f} "
            f"| {rank['peak_mb']:,.0f} | {rank['loss']:.5f} |"
        )
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
