"""Run the calls of many threads as one call of an encoder on a GPU, which costs hardly more than one of them alone.

There is no waiting for a batch to fill: an idle encoder takes what is there at once, and while it is busy the next
batch gathers. On a CPU this gains nothing (docs/operations.md), so there it is not used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from time import perf_counter
from typing import Any

import numpy as np

from pkd.serving.core.errors import Overloaded
from pkd.serving.inference.registry import Loaded
from pkd.serving.inference.thread_pool import Job, current_job
from pkd.serving.observability.metrics import Metrics
from pkd.toolkit.core.encoder_info import EncoderInfo, short
from pkd.toolkit.encoders.base import Embeddings, Encoder
from pkd.toolkit.images.codec import Rgb

BUCKETS = (1, 4, 8, 16, 32)
"""Sizes of batches, crops: a GPU prepares itself anew for every shape that it has not seen."""


@dataclass(frozen=True)
class _Item:
    crops: Rgb
    job: Job[Any] | None
    done: Future[Embeddings] = field(default_factory=Future)

    def wanted(self) -> bool:
        """Tell whether somebody still waits for it; if so it can no longer be cancelled."""
        if self.job and self.job.abandoned:
            self.done.cancel()
        return self.done.set_running_or_notify_cancel()


class Batched:
    """Batch the calls of any number of threads in front of an encoder. Close it when done."""

    def __init__(self, encoder: Encoder, waiting: int = 1024) -> None:
        """Start the thread that runs the encoder. ``waiting``: calls that may wait; further ones raise Overloaded."""
        self._encoder = encoder
        self.queue: Queue[_Item | None] = Queue(waiting)
        """Calls that wait for the encoder."""
        self._held: _Item | None = None
        self._thread = threading.Thread(target=self._work, name=f"pkd-batch {encoder.info.name}", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EncoderInfo:
        """Describe the encoder."""
        return self._encoder.info

    def embed(self, crops: Rgb) -> Embeddings:
        """Embed crops, uint8 N×H×W×3 RGB, as float32 N×D with unit rows.

        Raises the encoder's errors for these crops alone.
        """
        self._encoder.info.preprocess.check(crops)
        if not len(crops):
            return np.empty((0, self._encoder.info.space.dim), np.float32)
        item = _Item(crops, current_job())
        try:
            self.queue.put_nowait(item)
        except Full:
            raise Overloaded(f"{self.queue.maxsize} calls wait for the encoder already.") from None
        return item.done.result()

    def close(self) -> None:
        """Finish the calls that wait, then end the thread."""
        self.queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._next(block=True)) is not None:
            batch, rows = [first], len(first.crops)
            while rows < BUCKETS[-1] and (further := self._next(block=False)) is not None:
                if rows + len(further.crops) > BUCKETS[-1]:
                    self._held = further  # the first of the next batch
                    break
                batch.append(further)
                rows += len(further.crops)
            if wanted := [one for one in batch if one.wanted()]:
                self._run_batch(wanted)

    def _next(self, block: bool) -> _Item | None:
        if self._held:
            item, self._held = self._held, None
            return item
        try:
            taken = self.queue.get(block)
        except Empty:
            return None
        if taken is None and not block:
            self.queue.put(None)  # the end is for the outer loop to see
        return taken

    def _run_batch(self, batch: Sequence[_Item]) -> None:
        try:
            rows = self._embed(np.concatenate([item.crops for item in batch]))
        except Exception as error:
            if len(batch) == 1:
                batch[0].done.set_exception(error)
            else:  # one of them is at fault: let it fail alone
                for item in batch:
                    self._run_batch([item])
            return
        start = 0
        for item in batch:
            item.done.set_result(rows[start : start + len(item.crops)])
            start += len(item.crops)

    def _embed(self, crops: Rgb) -> Embeddings:
        """Embed in batches of the fixed sizes, the last one filled up with repetitions of a real crop."""
        parts = [crops[start : start + BUCKETS[-1]] for start in range(0, len(crops), BUCKETS[-1])]
        return np.concatenate([self._encoder.embed(_filled(part))[: len(part)] for part in parts])


def _filled(crops: Rgb) -> Rgb:
    size = next(bucket for bucket in BUCKETS if bucket >= len(crops))
    return np.concatenate([crops, np.repeat(crops[-1:], size - len(crops), axis=0)])


class Inference:
    """Pass crops from the worker threads to the encoders. Close it when the threads are done."""

    def __init__(self, loaded: Iterable[Loaded], metrics: Metrics) -> None:
        self._fronts: dict[str, Encoder] = {}
        for one in loaded:
            timed = _Timed(one.encoder, metrics)
            self._fronts[timed.info.id] = Batched(timed) if one.device == "cuda" else timed

    def embed(self, encoder: Encoder, crops: Rgb) -> Embeddings:
        """Return ``encoder.embed(crops)``, for one of the encoders that were given."""
        return self._fronts[encoder.info.id].embed(crops)

    def close(self) -> None:
        """Finish what waits."""
        for front in self._fronts.values():
            if isinstance(front, Batched):
                front.close()


class _Timed:
    def __init__(self, encoder: Encoder, metrics: Metrics) -> None:
        self._encoder, self._metrics, self._id = encoder, metrics, short(encoder.info.id)

    @property
    def info(self) -> EncoderInfo:
        return self._encoder.info

    def embed(self, crops: Rgb) -> Embeddings:
        begun = perf_counter()
        rows = self._encoder.embed(crops)
        if len(crops):
            self._metrics.inference(self._id, len(crops), perf_counter() - begun)
        return rows
