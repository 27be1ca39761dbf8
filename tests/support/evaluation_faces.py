"""Small real input for evaluation: folders of image files, a teacher ONNX file and a student bundle in its space."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
from onnx import numpy_helper

from pkd.export.checks.parity import synthetic_crops
from pkd.export.graph.build import serialise, uint8_graph
from pkd.toolkit.bundle.bundle import Golden, GraphSpec, Manifest, pack_golden, write_bundle
from pkd.toolkit.core.encoder_info import EmbeddingSpace, EncoderInfo, describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import open_onnx
from pkd.toolkit.images.codec import write_rgb
from tests.support import bundle_factory as factory

PREPROCESS = "mean=127.5,std=127.5"


def write_people(folder: Path, images: list[int], *, seed: int = 0, noise: float = 40.0) -> Path:
    """``images[i]`` crops of person i as ``<folder>/p000/p000_0001.png``: a coarse pattern each, plus noise."""
    random = np.random.default_rng(seed)
    for person, count in enumerate(images):
        name = f"p{person:03d}"
        pattern = random.integers(0, 256, (7, 7, 3)).astype(np.float32)
        (folder / name).mkdir(parents=True)
        for number in range(1, count + 1):
            coarse = np.clip(pattern + noise * random.normal(size=pattern.shape), 0, 255).astype(np.uint8)
            write_rgb(folder / name / f"{name}_{number:04d}.png", cv2.resize(coarse, (112, 112)))  # type: ignore[arg-type]
    return folder


def write_teacher(folder: Path, **options: int) -> Path:
    """Write a small network as ``teacher.onnx``."""
    return factory.teacher_file(folder / "teacher.onnx", **options)


def teacher_info(path: Path) -> EncoderInfo:
    """Return what pkd-evaluate will call this teacher."""
    return open_onnx(path, Preprocess.parse(PREPROCESS)).info


def write_student(
    folder: Path, space: EmbeddingSpace | None, *, noise: float = 0.5, name: str = "student", turned: bool = False
) -> Path:
    """Write a bundle of the teacher's network with its last layer disturbed; its own space where ``space`` is None.

    ``turned``: its embeddings are rotated, too, so that they know nothing of the teacher's until they are turned back.
    """
    model = factory.network(dim=space.dim if space else factory.DIM)
    for weight in model.graph.initializer:
        if weight.name == "matrix":
            values = numpy_helper.to_array(weight)
            random = np.random.default_rng(1)
            moved = values + noise * values.std() * random.normal(size=values.shape)
            if turned:
                moved = np.linalg.qr(random.normal(size=(len(moved), len(moved))))[0] @ moved
            weight.CopyFrom(numpy_helper.from_array(moved.astype(np.float32), "matrix"))
    preprocess = Preprocess()
    digest = hashlib.sha256(model.SerializeToString()).hexdigest()
    info = describe(name, "student", digest, preprocess, factory.DIM, space=space)
    plain = folder / f"{name}.onnx"
    plain.write_bytes(model.SerializeToString())
    crops = synthetic_crops(2, 112)
    files = {
        "encoder.onnx": serialise(uint8_graph(model, preprocess, factory.DIM)),
        "golden.npz": pack_golden(Golden(crops, open_onnx(plain, preprocess).embed(crops))),
    }
    manifest = Manifest(
        encoder=info,
        graph=GraphSpec(opset=18),
        golden_tolerance=1e-5,
        tool="pkd test",
        created="2026-01-01T00:00:00+00:00",
        files={},
    )
    return write_bundle(folder / name, files, manifest).path
