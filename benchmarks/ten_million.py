"""One step of the frozen head with ten million identities, read from disk, under a cap on memory of its own.

Run as: python benchmarks/ten_million.py                 (10.3 GB in the temporary folder, two minutes of a core)
        python benchmarks/ten_million.py --folder DIR --classes 1000000

Writes a bfloat16 head of unit rows (D=512) to a file, maps it in a fresh process whose data segment is capped at 4 GB
(RLIMIT_DATA: heap, anonymous and private mappings, counted whether touched or not), and makes two steps of loss and
gradient (B=128, s=64, ArcFace 0.5). The file is deleted afterwards. Writes benchmarks/results/ten_million.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from pkd.toolkit.distill.heads.frozen_softmax import frozen_cross_entropy
from pkd.toolkit.distill.heads.margin import Margin
from pkd.toolkit.distill.heads.rows import map_rows

RESULTS = Path(__file__).resolve().parent / "results" / "ten_million.json"
BATCH, DIM, BLOCK = 128, 512, 100_000
CAP = 4 * 2**30


def main() -> int:
    """Write the head, measure in a capped process, delete the head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the file goes")
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.step:
        print(json.dumps(steps(args.step, args.classes)))
        return 0
    needed = args.classes * DIM * 2
    if shutil.disk_usage(args.folder).free < 1.2 * needed:
        print(f"skipped: {args.folder} has less than {1.2 * needed / 1e9:.1f} GB free. Give another --folder.")
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "head.bf16"
        write(path, args.classes)
        command = [sys.executable, __file__, "--classes", str(args.classes), "--step", str(path)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    return 0


def write(path: Path, classes: int) -> None:
    """Make unit rows: one random block, its columns rotated by one from block to block."""
    torch.manual_seed(0)
    head = map_rows(path, classes, DIM)
    block = normalize(torch.randn(min(BLOCK, classes), DIM)).bfloat16()
    for number, start in enumerate(range(0, classes, BLOCK)):
        rows = head[start : start + BLOCK]
        rows.copy_(block[: len(rows)].roll(number, dims=1))


def steps(path: Path, classes: int) -> dict[str, Any]:
    """Two steps under the cap; the second finds in the page cache what the machine could keep."""
    resource.setrlimit(resource.RLIMIT_DATA, (CAP, CAP))
    head = map_rows(path, classes, DIM)
    torch.manual_seed(1)
    embeddings, labels = torch.randn(BATCH, DIM, requires_grad=True), torch.randint(0, classes, (BATCH,))
    margin = Margin("arcface", 0.5)
    small = head[:4096]
    torch.autograd.grad(frozen_cross_entropy(embeddings, small, labels % 4096, margin, 64), embeddings)
    before, peak = kilobytes("RssAnon"), Peak()
    rows: list[dict[str, float]] = []
    for _ in range(2):
        cpu, wall = time.process_time(), time.monotonic()
        loss = frozen_cross_entropy(embeddings, head, labels, margin, 64)
        (gradient,) = torch.autograd.grad(loss, embeddings)
        rows.append({"cpu_seconds": time.process_time() - cpu, "seconds": time.monotonic() - wall})
        assert bool(torch.isfinite(gradient).all())
    highest = peak.stop()
    return {
        "classes": classes, "batch": BATCH, "dim": DIM, "torch": torch.__version__, "threads": 1,
        "head_gb": classes * DIM * 2 / 1e9, "cap_gb": CAP / 2**30, "steps": rows, "loss": float(loss.detach()),
        "anonymous_mb_before": before / 1024, "anonymous_mb_peak": highest / 1024,
    }  # fmt: skip


class Peak:
    """The highest anonymous memory of this process, looked at every 10 ms."""

    def __init__(self) -> None:
        self._highest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._highest = max(self._highest, kilobytes("RssAnon"))

    def stop(self) -> int:
        """End of the watch; kB."""
        self._done.set()
        self._thread.join()
        return self._highest


def kilobytes(field: str) -> int:
    """Read a figure of this process in kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def table(results: dict[str, Any]) -> str:
    """Markdown: time of both steps, memory."""
    first, second = results["steps"]
    grown = results["anonymous_mb_peak"] - results["anonymous_mb_before"]
    return "\n".join(
        [
            f"{results['classes']:,} identities, a bf16 head of {results['head_gb']:.1f} GB on disk, "
            f"B={results['batch']}, D={results['dim']}, one thread, data segment capped at {results['cap_gb']:.0f} GB.",
            "",
            "| step | CPU seconds | seconds |",
            "| --- | --- | --- |",
            f"| first | {first['cpu_seconds']:.1f} | {first['seconds']:.1f} |",
            f"| second | {second['cpu_seconds']:.1f} | {second['seconds']:.1f} |",
            "",
            f"Anonymous memory at the peak: {results['anonymous_mb_peak']:.0f} MB, {grown:.0f} MB above the level "
            "before the steps. The file's pages come and go as the machine has room.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
