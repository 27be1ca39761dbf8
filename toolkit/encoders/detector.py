"""Find faces in photographs: a YuNet ONNX file or an insightface pack behind one interface."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from pkd.toolkit.bundle.onnx_check import require_one_file
from pkd.toolkit.core.errors import InputError, NoFace
from pkd.toolkit.encoders.base import make_session
from pkd.toolkit.encoders.yunet_dims import free_dims
from pkd.toolkit.images.codec import Rgb

WORK_SIDES = (640, 1920)
"""Longest side, pixels, of the copy that is searched: quick first, larger only where the quick one shows no face."""
KEPT_PIXELS = WORK_SIDES[0] ** 2
"""Pixels of the largest copy after which a thread keeps its network; opening another takes a few milliseconds."""
MIN_SIDE = 16
"""Images smaller than this on either side, pixels, are not searched."""
NMS_OVERLAP = 0.3
FINE = 100
"""Faces smaller than this in the searched copy, pixels, are searched again in a finer one."""
PROBES = ((320, 320), (96, 160))
"""Heights and widths of black images that a detector must run on before it counts as one."""
AS_PUBLISHED = "Give YuNet's float32 .onnx file as OpenCV's model zoo publishes it, unconverted."
YUNET_OUTPUTS = frozenset(f"{part}_{stride}" for part in ("cls", "obj", "bbox", "kps") for stride in (8, 16, 32))


@dataclass(frozen=True)
class Face:
    """Describe one detected face, in pixels of the image that was given.

    ``box``: float32 4, x1 y1 x2 y2; may reach beyond the image. ``landmarks``: float32 5×2, x y of the image-left
    eye, the other eye, nose tip, image-left mouth corner, the other. ``score``: detector confidence, 0–1.
    ``occlusion``: share of the face that is covered, 0–1; None where the detector does not say, as YuNet and
    insightface's do not.
    """

    box: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    score: float
    occlusion: float | None = None


class Detector(Protocol):
    """Find faces in photographs. Safe to share between threads."""

    @property
    def digest(self) -> str:
        """Return the SHA-256 (hex) of the detector's weights."""

    def detect(self, image: Rgb) -> list[Face]:
        """Search uint8 H×W×3 RGB → the faces found, in no particular order; empty where there is none."""


def open_detector(spec: str, min_score: float = 0.5) -> Detector:
    """Open ``PATH.onnx`` (YuNet), ``insightface:PACK`` or ``insightface:FOLDER``. Raises InputError or MissingExtra.

    ``min_score``: faces below this confidence, 0–1, are not reported.
    """
    if not 0 < min_score < 1:
        raise InputError(f"--min-score {min_score:g}: give a confidence between 0 and 1, for example 0.5.")
    if spec.startswith("insightface:"):
        from pkd.toolkit.encoders.insightface import detector

        return detector(spec, min_score)
    return YuNet(Path(spec), min_score)


def choose(faces: Sequence[Face], image: Rgb) -> Face:
    """Choose the face a photograph is of: the largest; on the rim a fifth of its area counts. Raises NoFace."""
    if not faces:
        raise NoFace("no face found. Give a photograph that shows a face, or lower --min-score.")
    height, width = image.shape[:2]

    def weight(face: Face) -> float:
        x1, y1, x2, y2 = face.box.tolist()
        x, y = (x1 + x2) / width - 1, (y1 + y2) / height - 1  # 0 in the middle, ±1 on the rim
        return float((x2 - x1) * (y2 - y1) / (1 + 4 * (x * x + y * y)))

    return max(faces, key=weight)


class YuNet:
    """Run YuNet through OpenCV, which keeps state between calls: every thread gets a network of its own."""

    def __init__(self, path: Path, min_score: float) -> None:
        self._model = _yunet_bytes(path)
        self._min_score = min_score
        self._local = threading.local()
        self.digest = hashlib.sha256(self._model).hexdigest()
        try:
            for height, width in PROBES:
                self._search(np.zeros((height, width, 3), np.uint8), 1)
        except cv2.error as error:
            raise InputError(f"detector {path}: {_opencv_reason(error)} {AS_PUBLISHED}") from None

    @cached_property
    def device_file(self) -> bytes:
        """Return the network for runtimes that keep to declared sizes, with its sizes left open."""
        return free_dims(self._model)

    def detect(self, image: Rgb) -> list[Face]:
        """Search uint8 H×W×3 RGB → faces."""
        if min(image.shape[:2]) < MIN_SIDE:
            return []
        longest = max(image.shape[:2])
        for side in WORK_SIDES:
            scale = min(1.0, side / longest)
            found = self._search(image, scale)
            if found:
                return [
                    self._refine(image, face) if scale < 1 and _side(face) * scale < FINE else face for face in found
                ]
            if scale == 1:
                break
        return []

    def _refine(self, image: Rgb, face: Face) -> Face:
        """Find the same face again in a finer copy of its surroundings; the landmarks of tiny faces are coarse."""
        reach = 1.5 * _side(face)
        centre = (face.box[:2] + face.box[2:]) / 2
        x1, y1 = np.maximum(0, np.floor(centre - reach)).astype(int)
        x2, y2 = np.ceil(centre + reach).astype(int)
        surroundings = image[y1:y2, x1:x2]
        if min(surroundings.shape[:2]) < MIN_SIDE:
            return face
        finer = self._search(surroundings, min(1.0, 3 * FINE / max(surroundings.shape[:2])))
        corner = np.array([x1, y1], np.float32)
        moved = [replace(f, box=f.box + np.tile(corner, 2), landmarks=f.landmarks + corner) for f in finer]
        same = [f for f in moved if np.linalg.norm((f.box[:2] + f.box[2:]) / 2 - centre) < 0.5 * _side(face)]
        return max(same, key=lambda f: f.score, default=face)

    def _search(self, image: Rgb, scale: float) -> list[Face]:
        height, width = (max(MIN_SIDE, round(side * scale)) for side in image.shape[:2])
        copy = image if scale == 1 else cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        network = self._network()
        network.setInputSize((width, height))
        _, rows = network.detect(np.ascontiguousarray(copy[:, :, ::-1]))
        if width * height > KEPT_PIXELS:
            del self._local.network  # it would keep what the large copy took, 180 MB for each thread of a server
        if rows is None:
            return []
        stretch = np.array([image.shape[1] / width, image.shape[0] / height], np.float32)
        return [_face(row, stretch) for row in rows if np.isfinite(row).all()]

    def _network(self) -> cv2.FaceDetectorYN:
        network: cv2.FaceDetectorYN | None = getattr(self._local, "network", None)
        if network is None:
            network = _open_network(self._model, self._min_score)
            self._local.network = network
        return network


_quiet = threading.Lock()


def _open_network(model: bytes, min_score: float) -> cv2.FaceDetectorYN:
    """Open YuNet without OpenCV 5's warning on stderr that it ignores the default target."""
    with _quiet:
        level = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)
        try:
            buffer = np.frombuffer(model, np.uint8)
            empty = np.empty(0, np.uint8)
            return cv2.FaceDetectorYN.create("onnx", buffer, empty, (320, 320), min_score, NMS_OVERLAP, 5000)
        finally:
            cv2.utils.logging.setLogLevel(level)


def _yunet_bytes(path: Path) -> bytes:
    """Read the file and look at its outputs: OpenCV takes any ONNX file without complaint and fails later."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"detector {path}: {error.strerror}. Give the path of a YuNet .onnx file, or insightface:PACK."
        ) from None
    require_one_file(data, path)
    try:
        outputs = {output.name for output in make_session(data, 1).get_outputs()}
    except Exception as error:  # onnxruntime's own errors share no public base class
        raise InputError(f"detector {path}: not an ONNX file: {str(error).splitlines()[0]}") from None
    if not outputs >= YUNET_OUTPUTS:
        raise InputError(
            f"detector {path}: not a YuNet network, its outputs are {', '.join(sorted(outputs)[:4])}. Give a YuNet "
            ".onnx file whose outputs are cls, obj, bbox and kps at strides 8, 16 and 32."
        )
    return data


def _opencv_reason(error: cv2.error) -> str:
    """Say what OpenCV's network module stumbled over, without its C++."""
    operator = re.search(r"op_type ?= ?'?(\w+)|parsing \w+ \[(\w+)\]|\[(\w+)\]:\(", str(error))
    what = f"its operator {next(filter(None, operator.groups()))}" if operator else "a node of it"
    return f"onnxruntime loads it, but OpenCV, which runs it, does not take {what}."


def _side(face: Face) -> float:
    """Return the longer side of the box, pixels."""
    return float(np.max(face.box[2:] - face.box[:2]))


def _face(row: NDArray[np.float32], stretch: NDArray[np.float32]) -> Face:
    """Read OpenCV's row: x, y, width, height, five points, score. Pixel centres are whole numbers: hence the ½."""
    corner, extent = row[:2], row[2:4]
    box = np.concatenate([corner * stretch, (corner + extent) * stretch])
    landmarks = (row[4:14].reshape(5, 2) + 0.5) * stretch - 0.5
    return Face(box.astype(np.float32), landmarks.astype(np.float32), min(1.0, float(row[14])))
