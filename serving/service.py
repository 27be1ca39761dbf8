"""Service: what the routes call. The worker pool, the self-test at start, and the two jobs: embed and verify."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkd.serving.encoders import Encoders, Loaded
from pkd.serving.images import EmbedRequest, Undecoded
from pkd.serving.inference import Inference
from pkd.serving.metrics import Metrics
from pkd.serving.pipeline import Embedded, Pipeline
from pkd.serving.pool import Pool
from pkd.serving.problems import Problem, from_error
from pkd.serving.schemas import EmbeddingSide, Faces, Side, VerifyBody
from pkd.serving.settings import Settings
from pkd.serving.state import State
from pkd.serving.vectors import encode
from pkd.serving.verify import decide, received, settle
from pkd.toolkit.detect import Detector
from pkd.toolkit.errors import BundleError, PkdError
from pkd.toolkit.space import short


class Service:
    """One per process. Its methods run on the event loop and hand every image to a worker thread."""

    def __init__(self, encoders: Encoders, settings: Settings, detector: Detector | None = None) -> None:
        self.encoders, self.settings = encoders, settings
        self.state = State(metrics=Metrics([short(id) for id in encoders.loaded]))
        batched = settings.device == "cuda"
        self.inference = Inference((one.encoder for one in encoders.loaded.values()), self.state.metrics, batched)
        self.pipeline = Pipeline(detector, self.inference)
        self._proving: asyncio.Task[None] | None = None
        self._workers = Pool(settings.threads, self.state.metrics)

    def start(self) -> asyncio.Task[None]:
        """Begin the self-test, once. Await the task to know that it is over; its outcome is in ``state``."""
        if self._proving is None:
            self._proving = asyncio.create_task(self._prove())
        return self._proving

    async def _prove(self) -> None:
        loop = asyncio.get_running_loop()
        proved = {}
        for id, loaded in self.encoders.loaded.items():
            try:
                proved[id] = await loop.run_in_executor(self._workers, loaded.self_test)
            except BundleError as error:
                self.state.failure = str(error)
                return
            except Exception as error:  # onnxruntime's own errors share no public base class
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.state.failure = f"{loaded.bundle.path}: does not run on its golden crops: {reason}"
                return
        self.state.proved = proved

    def close(self) -> None:
        """Drop what still waits; running images finish."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self.inference.close()

    async def embed(self, request: EmbedRequest) -> dict[str, Any]:
        """The answer of /v1/embed, vectors as numpy arrays or base64. All images succeed, or none is answered."""
        options = request.options
        loaded = self.encoders.get(options.encoder)
        done = await self._embed_all(request.images, loaded, options.faces, options.aligned)
        info = loaded.encoder.info
        stages = ("decode", "detect", "queue", "infer")
        return {
            "space": info.space.model_dump(),
            "encoder": {"id": info.id, "role": info.role, "preprocess": info.preprocess.name},
            "data": [
                {
                    "index": index,
                    "face": face,
                    **_where(embedded, face),
                    "quality": {"sharpness": round(embedded.sharpness[face], 2)},
                    "embedding": encode(vector, options.encoding),
                    "encoding": options.encoding,
                }
                for index, embedded in enumerate(done)
                for face, vector in enumerate(embedded.vectors)
            ],
            "timing_ms": {stage: round(sum(getattr(one.timing, stage) for one in done), 3) for stage in stages},
        }

    async def verify(self, body: VerifyBody) -> dict[str, Any]:
        """The answer of /v1/verify. Cheap refusals come first: pair, policy and vectors before any image is decoded."""
        terms = settle(self.encoders, body.a, body.b, body.policy, self.settings.target_fmr)
        sides = {"a": body.a, "b": body.b}
        vectors = {
            name: received(self.encoders, side, name) for name, side in sides.items() if isinstance(side, EmbeddingSide)
        }
        waiting = {name: side for name, side in sides.items() if name not in vectors}
        made = await asyncio.gather(*(self._embed_side(side, name) for name, side in waiting.items()))
        a, b = ({**vectors, **dict(zip(waiting, made, strict=True))}[name] for name in "ab")
        decision = decide(terms, a, b)
        self.state.metrics.decision("verify", "match" if decision["match"] else "no_match")
        return decision

    async def _embed_side(self, side: Side, name: str) -> NDArray[np.float64]:
        assert not isinstance(side, EmbeddingSide)
        loaded = self.encoders.get(side.encoder)
        try:
            (done,) = await self._embed_all([side.image_b64], loaded, side.faces, side.aligned)
        except Problem as problem:
            problem.members.pop("index", None)
            problem.members["side"] = name
            raise
        vector = done.vectors[0].astype(np.float64)
        unit: NDArray[np.float64] = vector / np.linalg.norm(vector)
        return unit

    async def _embed_all(
        self, images: Sequence[Undecoded], loaded: Loaded, faces: Faces, aligned: bool
    ) -> list[Embedded]:
        """Every image is a job of its own. The first that fails is named by its index; jobs not begun are dropped."""
        self.pipeline.check(aligned)
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(self._workers, self.pipeline.run, image, loaded, faces, aligned, perf_counter())
            for image in images
        ]
        done = []
        try:
            for index, job in enumerate(jobs):
                try:
                    done.append(await job)
                except PkdError as error:
                    problem = from_error(error)
                    problem.members["index"] = index
                    raise problem from None
                except Problem as problem:
                    problem.members["index"] = index
                    raise
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
        return done


def _where(embedded: Embedded, face: int) -> dict[str, Any]:
    if embedded.faces is None:
        return {"box": None, "landmarks": None, "detection_score": None}
    found = embedded.faces[face]
    return {
        "box": np.round(found.box.astype(np.float64), 2),
        "landmarks": np.round(found.landmarks.astype(np.float64), 2),
        "detection_score": round(found.score, 4),
    }
