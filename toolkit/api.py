"""Use pkd from Python: open encoders, embed, align, compare, and decide by a certificate.

``from pkd.toolkit import open_encoder`` and the like; every task is shown in docs/python.md. Imports everything of the
toolkit but its commands, torch only where an encoder needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pkd.toolkit.certificates.certificate import Assurance, Certificate, Interval
from pkd.toolkit.certificates.certificate import read_certificate as read_certificate
from pkd.toolkit.core.errors import BadImage, InputError
from pkd.toolkit.core.progress import Progress, no_progress
from pkd.toolkit.data.face_set import FaceSet as FaceSet
from pkd.toolkit.encoders.base import Embeddings, Encoder, batches
from pkd.toolkit.encoders.detector import Detector, choose
from pkd.toolkit.encoders.detector import open_detector as open_detector
from pkd.toolkit.encoders.embed import BATCH, embed_faces
from pkd.toolkit.evaluation.results.schema import Comparison
from pkd.toolkit.images.alignment import SIZE, warp
from pkd.toolkit.images.codec import SUFFIXES, Rgb, read_rgb

Image = str | Path | Rgb
"""One aligned crop or photograph: the path of a file, or uint8 H×W×3 RGB."""


class Decision(NamedTuple):
    """Hold what a certificate says of one score at one target false match rate."""

    match: bool
    """True where the score reaches the threshold."""
    score: float
    """Cosine similarity of the query to the gallery."""
    threshold: float
    """Smallest cosine similarity that matches at the target false match rate."""
    fmr: float
    """False match rate of a threshold at this very score, a fraction."""
    fmr_ci95: Interval
    """95 % interval of it."""
    is_upper_bound: bool
    """True where the score lies beyond what the certificate's pairs resolve: ``fmr`` is then the most it can be."""


def open_encoder(source: str | Path, preprocess: str | None = None, *, threads: int = 1) -> Encoder:
    """Open an encoder: a bundle (folder or zip), BUNDLE/targets/NAME, a run, FILE.onnx, FILE.pt, insightface:PACK.

    ``preprocess``: how pixels are scaled, for example ``"mean=127.5,std=127.5"``, or the path of a JSON file; needed
    for FILE.onnx and FILE.pt. ``threads``: of the runtime, per call. Raises InputError, BundleError or MissingExtra.
    """
    from pkd.toolkit.distill.models.open_encoder import open_encoder as open_any

    return open_any(str(source), preprocess, threads=threads, option="preprocess")


def embed(
    encoder: Encoder, images: Image | FaceSet | Sequence[Image], *, cache: Path | None = None, jobs: int | None = None
) -> Embeddings:
    """Embed aligned crops → float32 N×D with unit rows, so that ``a @ b.T`` are cosine similarities.

    ``images``: a FaceSet; the path of a folder, list, .rec or .tar (every image below it, in the order of
    ``FaceSet.read(path, labelled=False).names``); the path of one image; uint8 S×S×3 or N×S×S×3 RGB; or a sequence of
    images. ``cache``: folder that keeps the embeddings of a face set. ``jobs``: threads for a face set, one per core by
    default. Raises BadImage for what cannot be read, InputError for another size than ``encoder.info.preprocess.size``.
    """
    if isinstance(images, str | Path) and Path(images).suffix.lower() not in SUFFIXES:
        images = FaceSet.read(images, labelled=False)
    if isinstance(images, FaceSet):
        return embed_faces(encoder, images, cache=cache, jobs=jobs)
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return _in_batches(encoder, images)
    several = [images] if isinstance(images, str | Path | np.ndarray) else images
    return _in_batches(encoder, [_read(image) for image in several])


def align(photograph: Image, detector: Detector, *, size: int = SIZE) -> Rgb:
    """Cut the face out of a photograph → uint8 size×size×3 RGB, as pkd-align does it: the large, central face.

    Raises NoFace where the detector finds none, BadImage for a file that cannot be read.
    """
    image = _read(photograph)
    return warp(image, choose(detector.detect(image), image).landmarks, size)


def compare(
    teacher: Encoder,
    student: Encoder,
    faces: str | Path | FaceSet,
    *,
    fmrs: Sequence[float] | None = None,
    resamples: int = 1000,
    cache: Path | None = None,
    jobs: int | None = None,
    progress: Progress = no_progress,
) -> tuple[Comparison, ...]:
    """Compare two encoders on all pairs of a face set: true accept rates at false match rates, with 95 % intervals.

    Returns the teacher against itself (``T–T``), the student against itself (``S–S``), and, where both embed into one
    space, the student's queries against the teacher's gallery (``S–T``). ``Comparison.points`` hold ``fmr``,
    ``threshold``, ``tar_balanced`` and ``tar_balanced_ci95`` (every person weighs the same), ``tar`` and ``tar_ci95``
    (every pair does). ``fmrs``: target rates, fractions; by default 1e-2 to 1e-5, as far as the pairs resolve them.
    ``resamples``: of the bootstrap over people. Raises InputError for a set without pairs of one person, UnsupportedFmr
    for a rate in ``fmrs`` that it does not resolve.
    """
    from pkd.toolkit.evaluation.protocols.all_pairs import cross_matrix
    from pkd.toolkit.evaluation.protocols.common import EncoderSet, EvaluationOptions

    if resamples < 100:
        raise InputError(f"resamples={resamples}: a 95 % interval needs at least 100.")
    options = EvaluationOptions(
        fmrs=tuple(fmrs) if fmrs else None, any_space=True, resamples=resamples, cache=cache, jobs=jobs
    )
    read = faces if isinstance(faces, FaceSet) else FaceSet.read(faces)
    found = cross_matrix(read, "faces", EncoderSet(teacher, student), options, progress)
    comparable = teacher.info.space == student.info.space
    return tuple(each for each in found.evaluation.comparisons if comparable or each.query == each.gallery)


def decide(certificate: Certificate, score: float, fmr: float = 1e-3, assurance: Assurance = "point") -> Decision:
    """Decide whether a cosine similarity is a match at the target false match rate ``fmr``, a fraction.

    ``assurance``: ``point``, the rate is met on average over such evaluations; ``bound``, it is kept with 95 %
    confidence, at a higher threshold. ``score``: of a query by ``certificate.query`` against a gallery by
    ``certificate.gallery``; no other pair's. Raises UnsupportedFmr for a rate that the certificate does not resolve,
    BadVector for NaN.
    """
    threshold, at_score = certificate.threshold(fmr, assurance), certificate.fmr_at(score)
    return Decision(score >= threshold, score, threshold, at_score.fmr, at_score.ci95, at_score.is_upper_bound)


def _read(image: Image) -> Rgb:
    if isinstance(image, str | Path):
        return read_rgb(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise BadImage(f"an image is {image.dtype} {image.shape}; give uint8 H×W×3 RGB, or the path of a file.")
    return image


def _in_batches(encoder: Encoder, crops: Rgb | list[Rgb]) -> Embeddings:
    size = encoder.info.preprocess.size
    for i, crop in enumerate(crops):
        if crop.shape != (size, size, 3):
            raise InputError(
                f"image {i}: {crop.shape[1]}×{crop.shape[0]} pixels, expected an aligned {size}×{size} crop. "
                "Cut it out with align(photograph, detector)."
            )
    rows = [encoder.embed(np.stack([crops[i] for i in part])) for part in batches(len(crops), BATCH)]
    return np.concatenate([np.empty((0, encoder.info.space.dim), np.float32), *rows])
