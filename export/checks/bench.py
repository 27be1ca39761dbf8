"""Measure what every target of a bundle costs here, beside onnxruntime on encoder.onnx and insightface.

Each runs in a process of its own, on one thread. They take turns within every round, so that a machine that is busy
with something else is so for all alike, and each is compared with the baseline of the same round.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from rich.table import Table

from pkd.export.checks.bench_worker import BASELINE, INSIGHTFACE
from pkd.export.graph.build import float_graph, network_of, serialise
from pkd.toolkit.bundle.bundle import Bundle, Manifest, write_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.errors import PkdError
from pkd.toolkit.core.models import Record

BENCH = "bench.json"
BATCHES = (1, 8, 32)
ROUNDS = 7
SHORTEST = 0.05
"""CPU seconds of one measurement: as many calls as that takes, so that the clock's steps do not matter."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Time(Record):
    """Hold the time of one encoder at one batch size, as medians over the rounds."""

    batch: int
    cpu_ms: float
    """CPU milliseconds per image, of all threads of the process."""
    wall_ms: float
    """Milliseconds per image by the clock: what counts for a target on a GPU, and on an idle machine only."""
    ratio: float
    """``cpu_ms`` over the baseline's of the same round."""


class BenchRow(Record):
    """Hold the cost of one encoder."""

    name: str
    """A target, ``encoder.onnx`` (the baseline, in onnxruntime) or ``insightface`` (its ArcFaceONNX)."""
    runtime: str
    """Package and version."""
    bytes: int
    """Size on disk of the files that the runtime loads."""
    memory_mb: float
    """Peak while loading and running all batches, above the process with the runtime imported."""
    golden_error: float
    """Largest 1 − cosine to the golden embeddings: what was timed computes the encoder."""
    times: tuple[Time, ...]


class Bench(Record):
    """Hold the content of ``bench.json``."""

    cpu: str
    cores: int
    system: str
    python: str
    created: str
    """ISO 8601, UTC."""
    rounds: int
    rows: tuple[BenchRow, ...]
    skipped: dict[str, str]
    """Name → why it was not measured."""


def bench(files: Mapping[str, bytes], manifest: Manifest, rounds: int, advance: Callable[[int], None]) -> Bench:
    """Measure every target of a bundle that is about to be written; ``advance`` is told of each round.

    What does not run here is skipped with its reason. Raises BundleError for a bundle that would not open, PkdError
    where the baseline itself does not run.
    """
    skipped = {target.name: "it is not built yet." for target in manifest.targets if target.file is None}
    with TemporaryDirectory(prefix="pkd-bench-") as folder, ExitStack() as stack:
        bundle = write_bundle(Path(folder) / "bundle", files, manifest)
        sizes = {BASELINE: len(files[BASELINE])}
        sizes |= {target.name: size_on_disk(bundle, target) for target in manifest.targets if target.file}
        floats = Path(folder) / "floats.onnx"
        with skipping(INSIGHTFACE, skipped):
            sizes[INSIGHTFACE] = floats.write_bytes(_floats(bundle))
        running: dict[str, BenchProcess] = {}
        for name in sizes:
            process = stack.enter_context(BenchProcess(bundle.path, name, floats))
            with skipping(name, skipped):
                process.warm_up()
                running[name] = process
        for _ in range(rounds):
            for batch in BATCHES:
                for name in list(running):
                    with skipping(name, skipped, running):
                        running[name].measure(batch)
            advance(1)
        if BASELINE not in running:
            raise PkdError(f"--bench: {BASELINE} does not run: {skipped[BASELINE]}")
        return Bench(
            cpu=_cpu(),
            cores=os.cpu_count() or 1,
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            rounds=rounds,
            rows=tuple(process.row(sizes[name], running[BASELINE]) for name, process in running.items()),
            skipped=skipped,
        )


def bench_table(found: Bench) -> Table:
    """Lay out the figures for the console."""
    title = f"CPU ms per image on one thread, × that of {BASELINE}; {found.rounds} rounds on {found.cpu}"
    table = Table(title=title, title_justify="left")
    for heading in ("", "MB", "peak MB", *(f"batch {batch}" for batch in BATCHES)):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for row in found.rows:
        figures = (f"{row.bytes / 1e6:.2f}", f"{row.memory_mb:.0f}")
        table.add_row(row.name, *figures, *(f"{time.cpu_ms:.2f} {time.ratio:.2f}×" for time in row.times))
    return table


def size_on_disk(bundle: Bundle, target: Target) -> int:
    """Count the bytes of a target's file and of the weights beside it, or of its whole package."""
    file = target.file
    if file is None:
        return 0
    if target.package:
        return sum(len(bundle.read(name)) for name in bundle.manifest.files if name.startswith(target.package))
    stem = file.rpartition(".")[0]
    parts = [file] if file.endswith(".onnx") else [n for n in bundle.manifest.files if n.startswith(f"{stem}.")]
    return sum(len(bundle.read(name)) for name in parts if name == file or not name.endswith(".onnx"))


class BenchProcess:
    """Run one encoder in a process of its own, and keep what it took so far."""

    def __init__(self, bundle: Path, name: str, floats: Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pkd.export.checks.bench_worker", str(bundle), name, str(floats)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD},
            text=True,
        )
        self._took: dict[int, list[dict[str, float]]] = {batch: [] for batch in BATCHES}
        self._calls: dict[int, int] = {}

    def __enter__(self) -> BenchProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def warm_up(self) -> None:
        """Wait until it is ready, run every batch size, and see how many calls make a measurement. Raises PkdError."""
        self._said = self._answer()
        if "skipped" in self._said:
            raise PkdError(self._said["skipped"])
        for batch in BATCHES:
            self._ask(batch, 2)
            seconds = batch * self._ask(batch, 1)["cpu_ms"] / 1e3
            self._calls[batch] = ceil(SHORTEST / max(seconds, 1e-4))

    def measure(self, batch: int) -> None:
        """Take one more measurement. Raises PkdError if the process has ended."""
        self._took[batch].append(self._ask(batch, self._calls[batch]))

    def row(self, size: int, baseline: BenchProcess) -> BenchRow:
        """Gather what was found, beside the baseline's same rounds."""
        times = []
        for batch, took in self._took.items():
            pairs = zip(took, baseline._took[batch], strict=True)
            times.append(
                Time(
                    batch=batch,
                    cpu_ms=median(one["cpu_ms"] for one in took),
                    wall_ms=median(one["wall_ms"] for one in took),
                    ratio=median(one["cpu_ms"] / other["cpu_ms"] for one, other in pairs),
                )
            )
        return BenchRow(
            name=self.name,
            runtime=self._said["runtime"],
            bytes=size,
            memory_mb=max(one["memory_mb"] for took in self._took.values() for one in took),
            golden_error=self._said["golden_error"],
            times=tuple(times),
        )

    def _ask(self, batch: int, calls: int) -> Any:
        with suppress(BrokenPipeError):
            print(json.dumps([batch, calls]), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PkdError(f"its process ended with exit code {self.process.wait()}.")
        return json.loads(line)


@contextmanager
def skipping(name: str, skipped: dict[str, str], running: dict[str, BenchProcess] | None = None) -> Iterator[None]:
    """Note in ``skipped`` why ``name`` cannot run or has ended, and take it out of ``running``."""
    try:
        yield
    except PkdError as reason:
        skipped[name] = str(reason)
        if running:
            del running[name]


def _floats(bundle: Bundle) -> bytes:
    """Make the bundle's network with the input that insightface's ArcFaceONNX feeds. Raises InputError."""
    info = bundle.manifest.encoder
    network = network_of(onnx.load_model_from_string(bundle.read(BASELINE)))
    return serialise(float_graph(network, info.preprocess, info.space.dim))


def _cpu() -> str:
    """Name the processor."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
