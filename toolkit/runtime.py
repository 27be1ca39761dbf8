"""Run an encoder: aligned uint8 crops in, unit-norm float32 embeddings out. onnxruntime on CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pkd.toolkit.bundle import Bundle
from pkd.toolkit.errors import BadVector, InputError
from pkd.toolkit.images import Rgb
from pkd.toolkit.preprocess import Preprocess
from pkd.toolkit.space import EncoderInfo, describe

Embeddings = NDArray[np.float32]


class Encoder(Protocol):
    """Anything that embeds: an ONNX file, a bundle, a torch student."""

    @property
    def info(self) -> EncoderInfo:
        """Who this is; certificates and galleries are keyed by ``info.id``."""

    def embed(self, crops: Rgb) -> Embeddings:
        """uint8 N×H×W×3 RGB → float32 N×D with unit rows."""


class OnnxEncoder:
    """An encoder in onnxruntime. Safe to share between threads."""

    def __init__(self, info: EncoderInfo, session: ort.InferenceSession, feed: Callable[[Rgb], NDArray[np.generic]]):
        self.info = info
        self._session = session
        self._feed = feed
        self._input = session.get_inputs()[0].name
        self._output = session.get_outputs()[0].name

    def embed(self, crops: Rgb) -> Embeddings:
        """uint8 N×H×W×3 RGB → float32 N×D with unit rows. Raises InputError or BadVector."""
        self.info.preprocess.check(crops)
        if not len(crops):
            return np.empty((0, self.info.space.dim), np.float32)
        (raw,) = self._session.run([self._output], {self._input: self._feed(crops)})
        return unit_rows(np.asarray(raw, np.float32), self.info.name)


def open_onnx(path: str | Path, preprocess: Preprocess, *, name: str | None = None, threads: int = 1) -> OnnxEncoder:
    """Open a float N×3×H×W ONNX network as a teacher, with its preprocessing stated by the caller.

    The file's SHA-256 is the weights' digest. Raises InputError if the file or its input is not what was stated.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        session = make_session(data, threads)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Give the path of an ONNX file.") from None
    except Exception as error:  # onnxruntime's own errors share no public base class
        raise InputError(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from None
    taken = session.get_inputs()[0]
    size = preprocess.size
    if taken.type != "tensor(float)" or len(taken.shape) != 4 or not _fits(taken.shape[1:], (3, size, size)):
        raise InputError(
            f"{path}: its input is {taken.type} {taken.shape}, expected float N×3×{size}×{size}. "
            "Give an encoder of aligned faces, or state its crop size with the preprocessing (size=…)."
        )
    probe = np.zeros((1, size, size, 3), np.uint8)
    try:
        out = session.run(None, {taken.name: preprocess(probe)})[0]
    except Exception as error:
        raise InputError(f"{path}: does not run on a {size}×{size} crop: {str(error).splitlines()[0]}") from None
    if out.ndim != 2 or len(out) != 1:
        raise InputError(f"{path}: its first output has shape {out.shape}, expected N×D embeddings.")
    info = describe(
        name or path.stem.replace("_", "-"), "teacher", hashlib.sha256(data).hexdigest(), preprocess, out.shape[1]
    )
    if taken.shape[0] == 1:  # a graph fixed to one image still serves, one image at a time
        return _OneByOne(info, session, preprocess)
    return OnnxEncoder(info, session, preprocess)


def open_bundle(bundle: Bundle, *, threads: int = 1) -> OnnxEncoder:
    """Open a bundle's ``encoder.onnx``: uint8 N×H×W×3 in, preprocessing and normalisation inside the graph."""
    session = make_session(bundle.read("encoder.onnx"), threads)
    return OnnxEncoder(bundle.manifest.encoder, session, lambda crops: crops)


def make_session(model: bytes, threads: int) -> ort.InferenceSession:
    """A CPU session that does not spin: spinning doubles the cost where cores are shared."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def unit_rows(vectors: NDArray[np.float32], source: str = "encoder") -> Embeddings:
    """Divide N×D rows by their length. Raises BadVector for NaN, infinity or a zero row."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] < 1e-12)
    if bad.any():
        raise BadVector(f"{source}: {int(bad.sum())} of {len(vectors)} embeddings are zero, NaN or infinite.")
    unit: Embeddings = (vectors / norms).astype(np.float32, copy=False)
    return unit


def batches(count: int, size: int) -> Iterator[range]:
    """Consecutive index ranges of at most ``size``."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


class _OneByOne(OnnxEncoder):
    def embed(self, crops: Rgb) -> Embeddings:
        rows = [super(_OneByOne, self).embed(crops[i : i + 1]) for i in range(len(crops))]
        return np.concatenate(rows) if rows else super().embed(crops)


def _fits(shape: list[object], expected: tuple[int, ...]) -> bool:
    return all(not isinstance(d, int) or d == e for d, e in zip(shape, expected, strict=True))
