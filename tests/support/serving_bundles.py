"""Real bundles small enough for tests: an ONNX graph of one pooling and one matrix, golden crops, certificates."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import httpx
import numpy as np
import onnx
import uvicorn
from onnx import TensorProto, helper, numpy_helper

from pkd.serving.api.api_keys import ApiKeys
from pkd.serving.api.app import create_app
from pkd.serving.matching.service import Service
from pkd.serving.server.server import listen, url_of
from pkd.toolkit.bundle.bundle import Bundle, Golden, GraphSpec, Manifest, pack_golden, write_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.certificates.certificate import Assured, Calibration, Certificate, OperatingPoint
from pkd.toolkit.certificates.signing import SigningKey
from pkd.toolkit.core.encoder_info import EmbeddingSpace, EncoderInfo, describe, in_mode
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import make_session
from pkd.toolkit.images.codec import Rgb

DIM = 32
OPSET = 18


def crops(count: int, seed: int = 0) -> Rgb:
    """Smooth random uint8 N×112×112×3 images."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    return np.stack([cv2.resize(one, (112, 112), interpolation=cv2.INTER_CUBIC) for one in coarse])


def png(image: Rgb) -> bytes:
    """Encode uint8 H×W×3 RGB without loss."""
    done, data = cv2.imencode(".png", image[:, :, ::-1])
    assert done
    return data.tobytes()


def weights(seed: int, noise: float = 0.0) -> np.ndarray:
    """float32 147×DIM; ``noise`` moves a student a little away from the teacher of the same seed."""
    base = np.random.default_rng(seed).normal(size=(147, DIM))
    return (base + noise * np.random.default_rng(seed + 1).normal(size=base.shape)).astype(np.float32)


def graph(matrix: np.ndarray) -> bytes:
    """uint8 N×112×112×3 → unit rows: 16-pixel means times ``matrix``."""
    nodes = [
        helper.make_node("Cast", ["crops"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["cast", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "mean"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["nchw"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix", "bias"], ["raw"]),
        helper.make_node("LpNormalization", ["raw"], ["embedding"], axis=1, p=2),
    ]
    constants = {
        "mean": np.float32(127.5),
        "matrix": matrix,
        "bias": np.full(matrix.shape[1], 1e-3, np.float32),
    }
    made = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("crops", TensorProto.UINT8, ["N", 112, 112, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", matrix.shape[1]])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def certificate(query: EncoderInfo, gallery: EncoderInfo, **changes: object) -> Certificate:
    """Thresholds 0.5, 0.6, 0.7 at FMR 1e-2, 1e-3, 1e-4; as a bound each costs the next one, and 1e-4 has none."""
    points = tuple(
        OperatingPoint(
            fmr=fmr,
            threshold=threshold,
            fmr_ci95=(fmr / 2, fmr * 2),
            prediction95=(fmr / 3, fmr * 3),
            raw_threshold=0.5,
            tar=0.9,
            tar_ci95=(0.8, 0.95),
            tar_balanced=0.9,
            tar_balanced_ci95=(0.8, 0.95),
            as_point=Assured(threshold=threshold, tar_balanced=0.9),
            as_bound=Assured(threshold=bound, tar_balanced=0.8) if bound else None,
        )
        for fmr, threshold, bound in ((1e-2, 0.5, 0.6), (1e-3, 0.6, 0.7), (1e-4, 0.7, None))
    )
    calibration = Calibration(
        score=(-1.0, 0.5, 0.6, 0.7),
        fmr=(1.0, 1e-2, 1e-3, 1e-4),
        low=(1.0, 5e-3, 5e-4, 5e-5),
        high=(1.0, 2e-2, 2e-3, 2e-4),
        point=(1.0, 1e-2, 1e-3, 1e-4),
        bound=(1.0, 2e-2, 2e-3, 2e-4),
    )
    made = Certificate(
        query=query.id,
        query_role=query.role,
        gallery=gallery.id,
        gallery_role=gallery.role,
        space=gallery.space.id,
        protocol="all pairs of one set",
        points=points,
        calibration=calibration,
        resolved_scores=(-1.0, 0.7),
        min_fmr=1e-4,
        identities=500,
        genuine_identities=200,
        identity_pairs=100_000,
        images=800,
        genuine_pairs=1200,
        impostor_pairs=300_000,
        data_name="patterns",
        data_digest="0" * 64,
        synthetic=True,
        intervals="percentile bootstrap over identities",
        resamples=1000,
        seed=0,
        tool="test",
        created="2026-01-01T00:00:00Z",
    )
    return made.model_copy(update=changes)


@dataclass(frozen=True)
class Made:
    """One encoder: its graph and who it is."""

    model: bytes
    info: EncoderInfo

    def write(
        self,
        path: Path,
        certificates: list[Certificate] | None = None,
        golden: Golden | None = None,
        key: SigningKey | None = None,
        sealed: SigningKey | None = None,
        targets: Mapping[str, Made] | None = None,
    ) -> Bundle:
        """Write it as a bundle. ``golden``: other golden crops, to make a bundle that fails its self-test.

        ``targets``: precision → the encoder in it, as targets for onnxruntime.
        """
        images = crops(4, seed=99)
        golden = golden or Golden(images, self.embed(images))
        files = {"encoder.onnx": self.model, "golden.npz": pack_golden(golden)}
        for one in certificates or []:
            data = files[f"certificates/{one.file_name}"] = one.model_dump_json().encode()
            if key:
                files[f"certificates/{one.file_name}.sig"] = key.sign(data).text()
        manifest = Manifest(
            encoder=self.info,
            graph=GraphSpec(opset=OPSET),
            golden_tolerance=1e-4,
            tool="test",
            created="2026-01-01T00:00:00Z",
            targets=tuple(_target(precision, one) for precision, one in (targets or {}).items()),
            files={},
        )
        files |= {target.graph: targets[target.precision].model for target in manifest.targets} if targets else {}
        return write_bundle(path, files, manifest, key=sealed)

    def embed(self, images: Rgb) -> np.ndarray:
        """Compute what the graph gives, in a session of its own: the oracle for what the server answers."""
        return np.asarray(make_session(self.model, 1).run(None, {"crops": images})[0])

    def rounded(self, precision: str, matrix: np.ndarray) -> Made:
        """Make the same encoder with ``matrix`` for its weights, as another precision has them: of another id."""
        return Made(graph(matrix), in_mode(self.info, precision))


def _target(precision: str, made: Made) -> Target:
    file = f"targets/onnxruntime-{precision}/encoder.onnx"
    return Target(
        runtime="onnxruntime",
        precision=precision,
        encoder=made.info,
        graph=file,
        file=file,
        golden_tolerance=1e-3,
        checked_with="test",
        made_with="test",
    )


def encoder(name: str, matrix: np.ndarray, space: EmbeddingSpace | None = None) -> Made:
    """Make a teacher, or with ``space`` a student in it."""
    model = graph(matrix)
    digest = hashlib.sha256(model).hexdigest()
    role = "student" if space else "teacher"
    return Made(model, describe(name, role, digest, Preprocess(), matrix.shape[1], space=space))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Family:
    """A teacher, its student and a stranger with a space of its own."""

    teacher: Made
    student: Made
    stranger: Made
    folders: list[Path]


def family(folder: Path) -> Family:
    """Bundles: teacher certified against itself, student → teacher (not the other way), stranger uncertified."""
    teacher = encoder("teacher", weights(1))
    student = encoder("student", weights(1, noise=0.2), teacher.info.space)
    stranger = encoder("stranger", weights(5))
    folders = [folder / "teacher", folder / "student", folder / "stranger"]
    teacher.write(folders[0], [certificate(teacher.info, teacher.info)])
    student.write(folders[1], [certificate(student.info, teacher.info)])
    stranger.write(folders[2])
    return Family(teacher, student, stranger, folders)


@contextmanager
def running(service: Service, keys: ApiKeys | None = None, *, until: int = 200) -> Iterator[httpx.Client]:
    """Run the real server in a thread of this process, as a client; waits until /readyz answers ``until``."""
    listener = listen("127.0.0.1", 0)
    app = create_app(service, keys)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=url_of(listener), timeout=30) as client:
            deadline = time.monotonic() + 20
            while client.get("/readyz").status_code != until:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
