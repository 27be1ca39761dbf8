"""Inference: crops through a loaded encoder. Timed and, on a GPU, in batches of many requests."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter

from pkd.serving.inference.batching import Batched
from pkd.serving.inference.registry import Loaded
from pkd.serving.observability.metrics import Metrics
from pkd.toolkit.core.encoder_info import EncoderInfo, short
from pkd.toolkit.encoders.base import Embeddings, Encoder
from pkd.toolkit.images.codec import Rgb


class Inference:
    """What stands between the worker threads and the encoders. One per Service; close it when the threads are done."""

    def __init__(self, loaded: Iterable[Loaded], metrics: Metrics) -> None:
        self._fronts: dict[str, Encoder] = {}
        for one in loaded:
            timed = _Timed(one.encoder, metrics)
            self._fronts[timed.info.id] = Batched(timed) if one.device == "cuda" else timed

    def embed(self, encoder: Encoder, crops: Rgb) -> Embeddings:
        """``encoder.embed(crops)``, for one of the encoders that were given."""
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
