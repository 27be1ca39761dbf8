"""Small real encoders and bundles for tests: an ONNX network made with onnx.helper, no torch and no training."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pkd.export.checks.parity import synthetic_crops
from pkd.export.graph.build import serialise, uint8_graph
from pkd.toolkit.bundle.bundle import Bundle, Golden, GraphSpec, Manifest, pack_golden, write_bundle
from pkd.toolkit.certificates.certificate import Assured, Calibration, Certificate, OperatingPoint
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import OnnxEncoder, open_onnx

DIM = 16


def network(
    *, seed: int = 0, size: int = 112, batch: int | str = "n", opset: int = 18, dim: int = DIM, names: str = ""
) -> onnx.ModelProto:
    """float32 N×3×S×S → N×dim: convolution, PReLU, flatten by a Reshape as torch writes it, fully connected."""
    random = np.random.default_rng(seed)
    grid = (size - 16) // 16 + 1

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = random.normal(0, 1 / np.sqrt(np.prod(shape[1:]) or 1), shape).astype(np.float32)
        return numpy_helper.from_array(values, name)

    flat = 8 * grid * grid
    leading = batch if isinstance(batch, int) else 0
    nodes = [
        helper.make_node("Conv", ["input", "kernel"], ["convolved"], name=f"{names}Conv", strides=[16, 16]),
        helper.make_node("PRelu", ["convolved", "slope"], ["active"], name=f"{names}PRelu"),
        helper.make_node("Reshape", ["active", "flat"], ["flattened"], name=f"{names}Reshape"),
        helper.make_node("Gemm", ["flattened", "matrix", "bias"], ["embedding"], name=f"{names}Gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, dim])],
        [
            weight("kernel", 8, 3, 16, 16),
            numpy_helper.from_array(np.full((8, 1, 1), 0.25, np.float32), "slope"),
            numpy_helper.from_array(np.array([leading, flat], np.int64), "flat"),
            weight("matrix", dim, flat),
            numpy_helper.from_array(np.zeros(dim, np.float32), "bias"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def teacher_file(path: Path, **options: Any) -> Path:
    """``network(**options)`` as a file."""
    onnx.save(network(**options), str(path))
    return path


def encoder(folder: Path, preprocess: Preprocess | None = None, **options: Any) -> OnnxEncoder:
    """``network(**options)`` opened as a teacher."""
    return open_onnx(teacher_file(folder / "tiny.onnx", **options), preprocess or Preprocess())


@cache
def content(preprocess: Preprocess | None = None) -> tuple[dict[str, bytes], Manifest]:
    """Files and manifest of a valid bundle, not yet written."""
    with TemporaryDirectory() as folder:
        source = encoder(Path(folder), preprocess)
    crops = synthetic_crops(4, source.info.preprocess.size)
    files = {
        "encoder.onnx": serialise(uint8_graph(network(), source.info.preprocess, DIM)),
        "golden.npz": pack_golden(Golden(crops, source.embed(crops))),
    }
    manifest = Manifest(
        encoder=source.info,
        graph=GraphSpec(opset=18),
        golden_tolerance=1e-5,
        tool="pkd test",
        created="2026-01-01T00:00:00+00:00",
        files={},
    )
    return files, manifest


def bundle(folder: Path, name: str = "bundle", preprocess: Preprocess | None = None) -> Bundle:
    """Write a valid bundle at ``folder/name``."""
    files, manifest = content(preprocess)
    return write_bundle(folder / name, files, manifest)


def certificate(query: str, gallery: str, space: str, *, data_name: str = "test") -> Certificate:
    """Make a well-formed certificate of the ordered pair."""
    rate: dict[str, Any] = {
        "fmr_ci95": (0.0, 0.02),
        "prediction95": (0.0, 0.03),
        "raw_threshold": 0.31,
        "tar": 0.9,
        "tar_ci95": (0.8, 1.0),
        "tar_balanced": 0.9,
    }
    assured = Assured(threshold=0.3, tar_balanced=0.9)
    point = OperatingPoint(fmr=0.01, threshold=0.3, tar_balanced_ci95=(0.8, 1.0), as_point=assured, **rate)
    return Certificate(
        query=query,
        query_role="student",
        gallery=gallery,
        gallery_role="teacher",
        space=space,
        protocol="all pairs of one set",
        points=(point,),
        calibration=Calibration(
            score=(0.0, 0.3), fmr=(0.5, 0.01), low=(0.4, 0.0), high=(0.6, 0.02), point=(0.5, 0.01), bound=(0.6, 0.02)
        ),
        resolved_scores=(0.0, 0.3),
        min_fmr=0.01,
        identities=50,
        genuine_identities=10,
        identity_pairs=1000,
        images=140,
        genuine_pairs=60,
        impostor_pairs=9000,
        data_name=data_name,
        data_digest="0" * 64,
        intervals="percentile bootstrap over identities",
        resamples=1000,
        seed=0,
        tool="pkd test",
        created="2026-01-01T00:00:00+00:00",
    )


def rewrite(path: Path, **changes: object) -> None:
    """Change fields of a manifest as an attacker would, hashes of other files left alone."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(changes)
    (path / "manifest.json").write_text(json.dumps(manifest))


def replace_file(path: Path, name: str, data: bytes) -> None:
    """Change a file and its hash."""
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(data)
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewrite(path, files={**files, name: hashlib.sha256(data).hexdigest()})
