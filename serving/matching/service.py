"""Embed, verify and identify on behalf of the routes, with worker threads and the self-test at start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pkd.serving.core.embedding_codec import decode, encode
from pkd.serving.core.errors import NoGalleries, NotLive, UnknownSubject
from pkd.serving.core.gallery_schemas import IdentifyAnswer, IdentifyOptions, LivenessDemand, QualityLimits
from pkd.serving.core.options import Settings
from pkd.serving.core.schemas import (
    ComparedTemplate,
    EmbeddingSide,
    EmbedOptions,
    Faces,
    ImageSide,
    Side,
    SubjectSide,
    VerifyAnswer,
    VerifyBody,
)
from pkd.serving.galleries.store import GalleryStore, SearchResult
from pkd.serving.inference.artifacts import Artifacts
from pkd.serving.inference.batching import Inference
from pkd.serving.inference.decoding import Undecoded
from pkd.serving.inference.device_classes import DeviceClasses
from pkd.serving.inference.pipeline import BATCHES, Embedded, Pipeline, Timing
from pkd.serving.inference.registry import Encoders, Loaded
from pkd.serving.inference.thread_pool import Pool
from pkd.serving.matching import identification
from pkd.serving.matching.admission import encoder_to_search
from pkd.serving.matching.drift import DriftMonitor
from pkd.serving.matching.liveness import Demand, Liveness, Shown, require_measured
from pkd.serving.matching.policies import Policies
from pkd.serving.matching.quality import measure_quality, require_quality, strictest
from pkd.serving.matching.verification import (
    ProbeVector,
    ResolvedSide,
    decide,
    encoder_of,
    is_quick,
    left_out,
    resolve_rules,
)
from pkd.serving.observability.drift import DriftLedger
from pkd.serving.observability.metrics import Metrics
from pkd.serving.observability.state import State
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import BundleError, PkdError
from pkd.toolkit.encoders.attack_detector import AttackDetector
from pkd.toolkit.encoders.detector import Detector

Given = TypeVar("Given")
STORE_THREADS = 4
"""Calls of the store that run beside one another, for reads and for writes each: no read waits for a write."""


@dataclass(frozen=True)
class Photograph:
    """Hold one image to embed, and how."""

    image: Undecoded
    encoder: str | None = None
    aligned: bool = False
    faces: Faces = "largest"

    @classmethod
    def of(cls, side: ImageSide) -> Photograph:
        """Read it from JSON."""
        return cls(side.image_b64, side.encoder, side.aligned, side.faces)


class Service:
    """Serve one process. Its methods run on the event loop; images and the store are left to worker threads."""

    def __init__(
        self,
        encoders: Encoders,
        settings: Settings,
        detector: Detector | None = None,
        store: GalleryStore | None = None,
        policies: Policies | None = None,
        liveness: Liveness | None = None,
        ledger: DriftLedger | None = None,
        device_classes: Path | None = None,
        attack_detector: AttackDetector | None = None,
    ) -> None:
        """Take what the server has opened; read the file of ``device_classes``. Raises InputError for its faults."""
        self.encoders, self.settings, self._store = encoders, settings, store
        self.policies, self.liveness = policies or Policies(), liveness
        self.attack_detector = attack_detector
        self.state = State(metrics=Metrics([short(id) for id in encoders.loaded]))
        self.drift = DriftMonitor(encoders, self.state.metrics, ledger)
        self.inference = Inference(encoders.loaded.values(), self.state.metrics)
        self.pipeline = Pipeline(detector, self.inference, batch=BATCHES[settings.device])
        self.artifacts = Artifacts(encoders)
        self.device_classes = DeviceClasses(self.artifacts, device_classes)
        self._self_testing: asyncio.Task[None] | None = None
        self._workers = Pool(settings.threads, self.state.metrics)
        self._store_reads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="pkd-store-read")
        self._store_writes = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="pkd-store-write")

    @property
    def store(self) -> GalleryStore:
        """Return the store of galleries. Raises NoGalleries on a server without."""
        if self._store is None:
            raise NoGalleries("this server was started without a store of galleries. Start pkd-serve with --gallery.")
        return self._store

    async def stored(self, call: Callable[..., Given], *args: Any, **named: Any) -> Given:
        """Read from the store in a thread of its own: it may wait for the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._store_reads, partial(call, *args, **named))

    async def written(self, call: Callable[..., Given], *args: Any, **named: Any) -> Given:
        """Change the store in a thread of its own, which may wait for other processes that write."""
        return await asyncio.get_running_loop().run_in_executor(self._store_writes, partial(call, *args, **named))

    def start(self) -> asyncio.Task[None]:
        """Begin the self-test, once. Await the task to know that it is over; its outcome is in ``state``."""
        if self._self_testing is None:
            self._self_testing = asyncio.create_task(self._self_test())
        return self._self_testing

    async def _self_test(self) -> None:
        golden_errors = {}
        for id, loaded in self.encoders.loaded.items():
            try:
                golden_errors[id] = await self._workers.submit(loaded.self_test)
            except BundleError as error:
                self.state.failure = str(error)
                return
            except Exception as error:  # onnxruntime's own errors share no public base class
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.state.failure = f"{loaded.bundle.path}: does not run on its golden crops: {reason}"
                return
        self.state.golden_errors = golden_errors

    def close(self) -> None:
        """Drop what still waits; running images and writes finish. Whoever opened the store closes it."""
        self._workers.close()
        for executor in (self._store_reads, self._store_writes):
            executor.shutdown(wait=True, cancel_futures=True)
        self.artifacts.close()
        self.drift.close()
        self.inference.close()
        self.state.metrics.fold()

    async def embed(self, images: Sequence[Undecoded], options: EmbedOptions) -> dict[str, Any]:
        """Answer /v1/embed, vectors as numpy arrays or base64. All images succeed, or none is answered."""
        loaded = self.encoders.get(options.encoder)
        done = await self.embed_all(images, loaded, options.faces, options.aligned)
        return {
            **loaded.described,
            "data": [
                {
                    "index": index,
                    "face": face,
                    **_where(embedded, face),
                    "quality": vars(embedded.quality[face]),
                    "embedding": encode(vector, options.encoding),
                    "encoding": options.encoding,
                }
                for index, embedded in enumerate(done)
                for face, vector in enumerate(embedded.vectors)
            ],
            "timing_ms": Timing.total([one.timing for one in done]),
        }

    async def verify(self, body: VerifyBody) -> VerifyAnswer:
        """Answer /v1/verify. Cheap refusals come first: pair, policy and vectors before any image is decoded."""
        sides = [await self._resolve(name, side) for name, side in (("a", body.a), ("b", body.b))]
        rules, refused = resolve_rules(
            self.encoders,
            sides[0].encoders,
            sides[1].encoders,
            body.policy,
            self.settings.target_fmr,
            self.settings.assurance,
        )
        for side in sides:
            side.decode(self.encoders)
        subjects = [side.given.gallery for side in sides if isinstance(side.given, SubjectSide)]
        shown = [side.given for side in sides if not isinstance(side.given, SubjectSide)][:1]
        asked = [(gallery, self.policies.of(gallery).liveness) for gallery in subjects if shown]
        photographs = [Photograph.of(one) for one in shown if isinstance(one, ImageSide)]
        await self.prove_live(body.liveness, shown, [one for one in asked if one[1].query], photographs)
        limits = [self.policies.of(gallery).query_quality for gallery in subjects]
        await asyncio.gather(*(self._embed_side(side, limits) for side in sides if side.loaded))
        a, b = (side.vectors for side in sides)
        deciding = partial(decide, self.encoders, rules, a, b)
        decision = deciding() if is_quick(a, b) else await asyncio.to_thread(deciding)
        decision.not_compared = [
            *left_out(a, {query for query, _ in rules}, {query: problem for (query, _), problem in refused.items()}),
            *left_out(b, {one for _, one in rules}, {one: problem for (_, one), problem in refused.items()}),
        ]
        self.state.metrics.decision("verify", "match" if decision.match else "no_match")
        await self._watch_verification(decision, body.b)
        return decision

    async def identify(self, name: str, query: EmbeddingSide | Photograph, options: IdentifyOptions) -> IdentifyAnswer:
        """Answer POST …/identify. Whether the query may be compared is decided before it is embedded."""
        gallery = await self.stored(self.store.get, name)
        if isinstance(query, Photograph):
            loaded = encoder_to_search(self.encoders, gallery, query.encoder)
            encoder = loaded.encoder.info.id
        else:
            encoder = encoder_of(self.encoders, query)
        plan = identification.plan_search(self.encoders, gallery, encoder, options.partial)
        demand = self.policies.of(name).liveness
        shown = query.image if isinstance(query, Photograph) else query
        photographs = [query] if isinstance(query, Photograph) else []
        await self.prove_live(options.liveness, [shown], [(name, demand)] if demand.query else [], photographs)
        if isinstance(query, Photograph):
            vector = await self.embed_one(query, loaded, [self.policies.of(name).query_quality])
        else:
            space = self.encoders.space_of(encoder)
            dim = next(one.dim for one in gallery.spaces if one.id == space)
            vector = decode(query.embedding, query.encoding, dim)
        row = vector.astype(np.float32)[None]
        # Two at least, or a second subject above the threshold would go unseen.
        most = max(options.top_k, 2)

        async def search(one: str) -> SearchResult:
            (found,) = await self.stored(self.store.search, name, one, row, most, options.where)
            return found

        found = dict(zip(plan.files, await asyncio.gather(*map(search, plan.files)), strict=True))
        answer = identification.describe_search(
            self.encoders, gallery, encoder, plan, found, options, self.settings.target_fpir, self.settings.assurance
        )
        self.state.metrics.decision("identify", answer.decision)
        self.drift.identified(gallery, encoder, found, answer)
        self._keep_drift()
        return answer

    async def prove_live(
        self,
        token: str | None,
        inputs: Sequence[Shown],
        demands: Sequence[tuple[str, LivenessDemand]],
        photographs: Sequence[Photograph] = (),
    ) -> None:
        """Check the verdict of a request on its inputs. ``demands``: galleries that ask for one, and what they ask.

        A verdict that nobody asks for is checked, too: what a request claims holds, or it is refused. Where none is
        sent, the server's own detector judges ``photographs``: the inputs, if all are images. Raises NotLive.
        """
        if token is None and not demands:
            return
        limits = [(gallery, demand.max_apcer) for gallery, demand in demands if demand.max_apcer is not None]
        strictest_limit = min(limits, key=lambda one: one[1]) if limits else None
        demand = Demand(*strictest_limit) if strictest_limit else None
        if token is None and self.attack_detector and len(photographs) == len(inputs):
            require_measured(self.attack_detector.certificate, demand)
            await self._judge(self.attack_detector, photographs)
            return
        if token is None:
            raise NotLive(
                f"the gallery {demands[0][0]!r} takes nobody without proof that a living person is shown. Send a "
                "detector's signed verdict in the option `liveness`.",
                details={"reason": "missing"},
            )
        if self.liveness is None:
            raise NotLive(
                "this server believes no detector of attacks: it was started without --liveness. Leave `liveness` out.",
                details={"reason": "not-configured"},
            )
        await asyncio.to_thread(self.liveness.require, token, inputs, demand)

    async def _judge(self, detector: AttackDetector, photographs: Sequence[Photograph]) -> None:
        size = detector.certificate.scoring.preprocess.size

        def is_bona_fide(photograph: Photograph) -> bool:
            crop = self.pipeline.cut(photograph.image, size, photograph.faces, photograph.aligned)
            return detector.is_bona_fide(crop)

        for index, photograph in enumerate(photographs):
            try:
                bona_fide = await self._workers.submit(partial(is_bona_fide, photograph))
            except PkdError as error:
                raise error.explain(index=index) from None
            if not bona_fide:
                raise NotLive(
                    "the server's detector takes this for a presentation attack. Check the person in another way.",
                    details={"reason": "attack", "index": index, "detector": detector.certificate.detector},
                )

    async def _watch_verification(self, decision: VerifyAnswer, side: Side) -> None:
        gallery = await self.stored(self.store.get, side.gallery) if isinstance(side, SubjectSide) else None
        self.drift.verified(decision, gallery, side.subject if isinstance(side, SubjectSide) else None)
        self._keep_drift()

    def _keep_drift(self) -> None:
        if self.drift.due:
            self.drift.due = False
            self._store_writes.submit(self.drift.flush)

    def _enrolled(self, side: SubjectSide) -> list[ProbeVector]:
        subject = self.store.subject(side.gallery, side.subject, vectors=True)
        if not subject.templates:  # expired in this very moment
            raise UnknownSubject(f"{side.subject} has no template in the gallery {side.gallery}.")
        shown = []
        for one in subject.templates:
            assert one.vector is not None
            vector = one.vector.astype(np.float64)
            of = ComparedTemplate(gallery=side.gallery, subject=side.subject, template=one.id, encoder=one.encoder)
            shown.append(ProbeVector(one.encoder, vector / np.linalg.norm(vector), of))
        return shown

    async def _resolve(self, name: str, given: Side) -> ResolvedSide:
        if isinstance(given, SubjectSide):
            templates = await self.stored(self._enrolled, given)
            return ResolvedSide(name, given, [one.encoder for one in templates], templates)
        if isinstance(given, ImageSide):
            loaded = self.encoders.get(given.encoder)
            return ResolvedSide(name, given, [loaded.encoder.info.id], loaded=loaded)
        return ResolvedSide(name, given, [encoder_of(self.encoders, given)])

    async def _embed_side(self, side: ResolvedSide, limits: Sequence[QualityLimits]) -> None:
        assert isinstance(side.given, ImageSide) and side.loaded
        try:
            vector = await self.embed_one(Photograph.of(side.given), side.loaded, limits)
        except PkdError as error:
            error.details["side"] = side.name
            raise
        side.vectors = [ProbeVector(side.encoders[0], vector)]

    async def embed_one(
        self, photograph: Photograph, loaded: Loaded, limits: Sequence[QualityLimits] = ()
    ) -> NDArray[np.float64]:
        """Embed the face of one photograph as a unit vector, float64 D. Raises LowQuality for one beyond ``limits``."""
        try:
            (done,) = await self.embed_all([photograph.image], loaded, photograph.faces, photograph.aligned)
            if limits:
                require_quality(measure_quality(done, 0), strictest(limits))
        except PkdError as error:
            error.details.pop("index", None)
            raise
        vector = done.vectors[0].astype(np.float64)
        unit: NDArray[np.float64] = vector / np.linalg.norm(vector)
        return unit

    async def embed_all(
        self, images: Sequence[Undecoded], loaded: Loaded, faces: Faces, aligned: bool
    ) -> list[Embedded]:
        """Embed the faces of each image.

        Every image is a job of its own. The first that fails is named by its index; jobs not begun are dropped.
        """
        self.pipeline.check(aligned, loaded)
        jobs = [
            self._workers.submit(partial(self.pipeline.run, image, loaded, faces, aligned, perf_counter()))
            for image in images
        ]
        done: list[Embedded] = []
        try:
            while len(done) < len(jobs):
                done.append(await jobs[len(done)])
        except PkdError as error:
            raise error.explain(index=len(done)) from None
        finally:
            for number in range(len(done), len(jobs)):
                jobs[number].cancel()
            jobs.clear()  # they hold their errors, whose tracebacks hold this frame
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
