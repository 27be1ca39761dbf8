"""Decode, detect, align and encode one image of a request, in a worker thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from pkd.serving.core.errors import MultipleFaces, NoDetector, NotAligned, TooManyFaces
from pkd.serving.core.schemas import Faces
from pkd.serving.inference.batching import Inference
from pkd.serving.inference.decoding import Undecoded, decode
from pkd.serving.inference.registry import Loaded
from pkd.toolkit.core.errors import NoFace
from pkd.toolkit.core.gpu import Device
from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.encoders.detector import Detector, Face, choose
from pkd.toolkit.images.alignment import ALIGNED_TO, warp
from pkd.toolkit.images.codec import Rgb
from pkd.toolkit.images.quality import FaceQuality, measure_face

MAX_FACES = 256
"""Most faces of one photograph that ``faces=all`` embeds; more are refused once they are counted."""
BATCHES: dict[Device, int] = {"cpu": 8, "cuda": 32}
"""Most crops of one photograph that are given to the encoder at once. On a CPU more of them are no faster, and
onnxruntime keeps what the largest batch took: 4 MB a crop."""


@dataclass
class Timing:
    """Count the milliseconds spent on one image."""

    decode: float = 0.0
    detect: float = 0.0
    queue: float = 0.0
    infer: float = 0.0

    @staticmethod
    def total(timings: Sequence[Timing]) -> dict[str, float]:
        """Sum each stage over the images, rounded to a microsecond."""
        return {
            "decode": round(sum([one.decode for one in timings]), 3),
            "detect": round(sum([one.detect for one in timings]), 3),
            "queue": round(sum([one.queue for one in timings]), 3),
            "infer": round(sum([one.infer for one in timings]), 3),
        }


@dataclass(frozen=True)
class Embedded:
    """Hold the faces of one image.

    ``vectors`` float32 N×D; ``quality`` N; ``faces`` N, or None for an aligned crop.
    """

    vectors: Embeddings
    quality: Sequence[FaceQuality]
    faces: Sequence[Face] | None
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True)
class Pipeline:
    """Hold the detector and the encoders that worker threads share; all of it is safe to use from several threads."""

    detector: Detector | None
    inference: Inference
    max_faces: int = MAX_FACES
    """Most faces of one photograph that are embedded."""
    batch: int = BATCHES["cpu"]
    """Most crops that are given to the encoder at once."""

    def check(self, aligned: bool, loaded: Loaded) -> None:
        """Raise NoDetector or NotAligned for a photograph where only aligned crops can be taken."""
        if aligned:
            return
        template = loaded.encoder.info.preprocess.template
        if template != ALIGNED_TO:
            raise NotAligned(
                f"this encoder takes crops of the template {template!r}, and photographs are aligned to {ALIGNED_TO} "
                "alone. Cut the crops as it was trained, and send them with aligned=true.",
                details={"expected": template, "got": ALIGNED_TO},
            )
        if self.detector is None:
            raise NoDetector(
                "this server was started without a face detector. Send aligned crops (pkd-align) with aligned=true, "
                "or start pkd-serve with --detector."
            )

    def run(self, image: Undecoded, loaded: Loaded, faces: Faces, aligned: bool, submitted: float) -> Embedded:
        """Embed the faces of one image. ``submitted``: when it was queued (``perf_counter``).

        Raises BadImage, ImageTooLarge, UnsupportedMedia, NoDetector, NoFace, MultipleFaces or NotAligned.
        """
        start = perf_counter()
        rgb = decode(image)
        decoded = perf_counter()
        size = loaded.encoder.info.preprocess.size
        self.check(aligned, loaded)
        found = None if aligned else self._detect(rgb, faces)
        timing = Timing(queue=1e3 * (start - submitted), decode=1e3 * (decoded - start))
        vectors: list[Embeddings] = []
        quality: list[FaceQuality] = []
        batches: Iterable[Rgb] = [_as_crop(rgb, size)] if found is None else _cropped(rgb, found, size, self.batch)
        for crops in batches:
            for crop in crops:  # before the encoder sweeps them out of the caches
                face = found[len(quality)] if found else None
                quality.append(measure_face(crop, face.landmarks, face.occlusion) if face else measure_face(crop))
            detected = perf_counter()
            vectors.append(self.inference.embed(loaded.encoder, crops))
            embedded = perf_counter()
            timing.detect += 1e3 * (detected - decoded)
            timing.infer += 1e3 * (embedded - detected)
            decoded = embedded
        return Embedded(vectors[0] if len(vectors) == 1 else np.concatenate(vectors), quality, found, timing)

    def cut(self, image: Undecoded, size: int, faces: Faces, aligned: bool) -> Rgb:
        """Cut the very face that ``run`` would embed → uint8 size×size×3. Raises what ``run`` raises."""
        rgb = decode(image)
        if aligned:
            crop: Rgb = _as_crop(rgb, size)[0]
            return crop
        if self.detector is None:
            raise NoDetector("this server was started without a face detector. Start pkd-serve with --detector.")
        (face,) = self._detect(rgb, "largest" if faces == "all" else faces)
        return warp(rgb, face.landmarks, size)

    def _detect(self, rgb: Rgb, faces: Faces) -> list[Face]:
        assert self.detector is not None
        found = self.detector.detect(rgb)
        if faces == "all":
            if len(found) > self.max_faces:
                raise TooManyFaces(
                    f"{len(found):,} faces were found, at most {self.max_faces} are embedded at once. Cut the "
                    "photograph into parts, or ask for the largest face.",
                    details={"found": len(found), "limit": self.max_faces},
                )
            return sorted(found, key=_area, reverse=True)
        if not found:
            raise NoFace("no face was found. Send a photograph that shows one, upright and not too small.")
        if faces == "exactly_one" and len(found) > 1:
            raise MultipleFaces(
                f"{len(found)} faces were found, exactly one was asked for.", details={"found": len(found)}
            )
        return [choose(found, rgb)]


def _as_crop(rgb: Rgb, size: int) -> Rgb:
    if rgb.shape != (size, size, 3):
        raise NotAligned(
            f"the image has {rgb.shape[1]}×{rgb.shape[0]} pixels; with aligned=true this encoder takes {size}×{size} "
            "crops. Align it with pkd-align, or leave aligned out.",
            details={"expected": [size, size], "got": [rgb.shape[1], rgb.shape[0]]},
        )
    return rgb[None]


def _cropped(rgb: Rgb, faces: Sequence[Face], size: int, batch: int) -> Iterator[Rgb]:
    """Give aligned crops of faces in batches: all at once, hundreds of faces would take gigabytes in the encoder."""
    for begin in range(0, max(1, len(faces)), batch):
        crops = [warp(rgb, face.landmarks, size) for face in faces[begin : begin + batch]]
        yield np.stack(crops) if crops else np.empty((0, size, size, 3), np.uint8)


def _area(face: Face) -> float:
    return float((face.box[2] - face.box[0]) * (face.box[3] - face.box[1]))
