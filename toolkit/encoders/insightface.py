"""Open insightface packs: recogniser and SCRFD detector of ``buffalo_l`` and its kin, or of a folder of files.

insightface itself reads the files, so that what it infers from a graph (scaling, anchors) is what its users get.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pkd.toolkit.bundle.onnx_check import require_one_file
from pkd.toolkit.core.errors import InputError, MissingExtra, plain_reason
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.detector import MIN_SIDE, Face
from pkd.toolkit.images.codec import Rgb

PREFIX = "insightface:"
INPUT_SIZE = (640, 640)
"""Width and height SCRFD searches at; insightface scales the image into it."""


def recogniser(spec: str) -> tuple[Path, Preprocess]:
    """Find the path of the pack's recognition network and the preprocessing insightface gives it.

    Raises InputError where the pack is missing or has no single recogniser, MissingExtra without insightface.
    """
    model = _only(spec, "recognition")
    width, height = model.input_size
    if not isinstance(width, int) or width != height:
        width = 112  # the graph leaves its size open; every ArcFace network of that kind takes 112
    preprocess = Preprocess(size=width, channels="rgb", mean=float(model.input_mean), std=float(model.input_std))
    return Path(model.model_file), preprocess


def detector(spec: str, min_score: float) -> Scrfd:
    """Open the pack's face detector. Raises as ``recogniser``."""
    model = _only(spec, "detection")
    if not model.use_kps:
        raise InputError(f"{model.model_file}: this detector gives no landmarks. Give one that does (…_kps or _bnkps).")
    model.prepare(ctx_id=-1, input_size=INPUT_SIZE, det_thresh=min_score)
    found = Scrfd(model)
    try:
        found.detect(np.zeros((320, 320, 3), np.uint8))
    except Exception as error:  # whatever a foreign graph makes insightface or onnxruntime raise
        raise InputError(
            f"{model.model_file}: insightface cannot run this detector: {plain_reason(error)} Give a pack as published."
        ) from None
    return found


class Scrfd:
    """Run SCRFD as insightface does. Its onnxruntime session is safe to share between threads."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.digest = hashlib.sha256(Path(model.model_file).read_bytes()).hexdigest()

    def detect(self, image: Rgb) -> list[Face]:
        """Search uint8 H×W×3 RGB → faces."""
        if min(image.shape[:2]) < MIN_SIDE:
            return []
        boxes, points = self._model.detect(np.ascontiguousarray(image[:, :, ::-1]))
        return [
            Face(np.asarray(row[:4], np.float32), np.asarray(five, np.float32), min(1.0, float(row[4])))
            for row, five in zip(boxes, points, strict=True)
            if np.isfinite(row).all() and np.isfinite(five).all()
        ]


def _only(spec: str, task: str) -> Any:
    """Open the one model of the pack with that task, opened by insightface."""
    try:
        from insightface.model_zoo import get_model
    except ModuleNotFoundError:
        raise MissingExtra("insightface", "insightface") from None
    folder = _folder(spec.removeprefix(PREFIX))
    files = [folder] if folder.is_file() else sorted(folder.glob("*.onnx"))
    if not files:
        raise InputError(f"{folder}: holds no .onnx file. Give the folder that an insightface pack was unzipped to.")
    found, other = [], []
    for file in files:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # insightface prints; stdout is for results
                model = get_model(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:  # assertions without a text, onnx and onnxruntime errors
            other.append(f"{file.name} cannot be read ({str(error).splitlines()[0] if str(error) else 'no reason'})")
            continue
        kind = getattr(model, "taskname", None) or "unknown"
        if kind == task:
            found.append(model)
        else:
            other.append(f"{file.name} is {kind}")
    for model in found:
        require_one_file(Path(model.model_file).read_bytes(), model.model_file)
    if len(found) != 1:
        names = ", ".join(Path(model.model_file).name for model in found) or "; ".join(other)
        raise InputError(
            f"{folder}: holds {len(found)} {task} networks ({names}). Give a pack or folder with exactly one."
        )
    return found[0]


def _folder(name: str) -> Path:
    """Find the folder (or file) that ``name`` stands for; a pack that is missing is fetched as insightface does."""
    if not name:
        raise InputError("insightface: names no pack. Write insightface:buffalo_l or insightface:FOLDER.")
    path = Path(name).expanduser()
    if path.exists():
        return _unnested(path)
    home = Path(os.environ.get("INSIGHTFACE_HOME") or "~/.insightface").expanduser()
    pack = home / "models" / name
    if not pack.exists():
        if not name.replace("_", "").replace("-", "").isalnum():
            raise InputError(f"{path}: no such folder. Give an insightface pack's name or the folder of its files.")
        _fetch(name, home)
    return _unnested(pack)


def _unnested(folder: Path) -> Path:
    """Follow the folders that a zip made within its own folder, to the one that holds the files."""
    for _ in range(3):
        if folder.is_file() or any(folder.glob("*.onnx")):
            break
        inside = [each for each in folder.iterdir() if each.is_dir() and not each.name.startswith((".", "__"))]
        if len(inside) != 1:
            break
        folder = inside[0]
    return folder


def _fetch(name: str, home: Path) -> None:
    from insightface.utils.storage import ensure_available

    try:
        with contextlib.redirect_stdout(sys.stderr):
            ensure_available("models", name, root=str(home))
    except Exception as error:  # requests' errors, RuntimeError for an unknown name, a bad zip, a full disk
        raise InputError(
            f"insightface pack {name!r} is not in {home / 'models'} and could not be downloaded "
            f"({type(error).__name__}). Put its .onnx files there, or give their folder: insightface:FOLDER."
        ) from None
