"""Record every step: a line in log.csv, the same in TensorBoard, and the progress bar."""

from __future__ import annotations

import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from pkd.toolkit.core.progress import Advance, ConsoleProgress

COLUMNS = ("step", "loss", "cosine", "lr", "images_per_second", "seconds")


@dataclass(frozen=True)
class StepLog:
    """Hold one step's figures. ``step`` counts from 1; ``cosine``: mean S–T cosine of the batch, NaN if untaught."""

    step: int
    loss: float
    cosine: float
    lr: float


class RunLog:
    """Write the log of a run folder; a resumed run first drops the lines after its checkpoint."""

    def __init__(self, run: Path, start: int, steps: int, batch: int, console: Console) -> None:
        self.last: StepLog | None = None
        self._path = run / "log.csv"
        self._batch = batch
        self._keep(start)
        self._file = self._path.open("a", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file)
        self._board = SummaryWriter(str(run / "tb"), purge_step=start + 1)
        self._progress = ConsoleProgress(console)(f"distil from step {start:,}" if start else "distil", steps - start)
        self._advance: Advance
        self._began = self._previous = time.monotonic()
        self._rate = math.nan

    def __enter__(self) -> RunLog:
        self._advance = self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.__exit__(kind, error, at)
        self._file.close()
        self._board.close()

    def write(self, step: StepLog) -> None:
        """Record one step."""
        now = time.monotonic()
        rate = self._batch / max(now - self._previous, 1e-9)
        self._previous = now
        self._rate = rate if math.isnan(self._rate) else 0.95 * self._rate + 0.05 * rate
        self.last = step
        self._csv.writerow(
            [
                step.step,
                f"{step.loss:.6g}",
                f"{step.cosine:.6g}",
                f"{step.lr:.6g}",
                f"{rate:.1f}",
                f"{now - self._began:.2f}",
            ]
        )
        self._file.flush()
        for name in ("loss", "cosine", "lr"):
            if math.isfinite(value := getattr(step, name)):
                self._board.add_scalar(name, value, step.step)
        seen = "" if math.isnan(step.cosine) else f" · teacher cosine {step.cosine:.3f}"
        self._advance(1, f"{self._rate:.0f} images/s · loss {step.loss:.3f}{seen}")

    def _keep(self, start: int) -> None:
        rows: list[list[str]] = []
        if self._path.is_file():
            with self._path.open(newline="", encoding="utf-8") as file:
                rows = [r for r in csv.reader(file) if len(r) == len(COLUMNS) and r[0].isdigit() and int(r[0]) <= start]
        with self._path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
