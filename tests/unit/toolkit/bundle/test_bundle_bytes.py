"""The exact bytes of a signed bundle: whoever changes the format by accident sees it here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pkd.toolkit.bundle.archive import write_zip
from pkd.toolkit.bundle.bundle import Bundle, GraphSpec, Manifest, write_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.certificates.signing import SigningKey, TrustedKeys
from pkd.toolkit.core.encoder_info import EmbeddingSpace, EncoderInfo
from pkd.toolkit.core.preprocess import Preprocess

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
EMPTY_MODEL = b"\x08\x08"  # IR version 8, and nothing else

MANIFEST = """\
{
  "schema_version": 3,
  "encoder": {
    "id": "student@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "name": "student",
    "role": "student",
    "numeric_mode": "fp32",
    "space": {
      "id": "teacher@sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
      "dim": 4,
      "metric": "cosine"
    },
    "preprocess": {
      "size": 112,
      "template": "arcface5pt",
      "channels": "rgb",
      "mean": 127.5,
      "std": 127.5
    }
  },
  "graph": {
    "input_name": "crops",
    "input": "uint8 N×H×W×3 RGB",
    "output_name": "embedding",
    "output": "float32 N×D, unit rows",
    "opset": 18
  },
  "golden_tolerance": 0.00001,
  "gate": "not gated",
  "licence": "CC BY 4.0",
  "training": {
    "method": "l2kd",
    "steps": 100,
    "margin": null,
    "best": 0.5,
    "resumed": false
  },
  "targets": [
    {
      "runtime": "onnxruntime",
      "precision": "fp32",
      "encoder": {
        "id": "student@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "name": "student",
        "role": "student",
        "numeric_mode": "fp32",
        "space": {
          "id": "teacher@sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
          "dim": 4,
          "metric": "cosine"
        },
        "preprocess": {
          "size": 112,
          "template": "arcface5pt",
          "channels": "rgb",
          "mean": 127.5,
          "std": 127.5
        }
      },
      "graph": "encoder.onnx",
      "file": "encoder.onnx",
      "golden_tolerance": 0.00001,
      "checked_with": "onnxruntime 1",
      "made_with": "pkd 0.1.0",
      "settings": {}
    },
    {
      "runtime": "openvino",
      "precision": "bf16",
      "encoder": {
        "id": "student@sha256:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
        "name": "student",
        "role": "student",
        "numeric_mode": "bf16",
        "space": {
          "id": "teacher@sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
          "dim": 4,
          "metric": "cosine"
        },
        "preprocess": {
          "size": 112,
          "template": "arcface5pt",
          "channels": "rgb",
          "mean": 127.5,
          "std": 127.5
        }
      },
      "graph": "targets/openvino-bf16/graph.onnx",
      "file": "targets/openvino-bf16/encoder.xml",
      "golden_tolerance": 0.01,
      "checked_with": "openvino 1",
      "made_with": "openvino 1",
      "settings": {
        "INFERENCE_PRECISION_HINT": "bf16",
        "threads": 1
      }
    },
    {
      "runtime": "tensorrt",
      "precision": "bf16",
      "encoder": {
        "id": "student@sha256:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
        "name": "student",
        "role": "student",
        "numeric_mode": "bf16",
        "space": {
          "id": "teacher@sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
          "dim": 4,
          "metric": "cosine"
        },
        "preprocess": {
          "size": 112,
          "template": "arcface5pt",
          "channels": "rgb",
          "mean": 127.5,
          "std": 127.5
        }
      },
      "graph": "targets/openvino-bf16/graph.onnx",
      "file": null,
      "golden_tolerance": 0.01,
      "checked_with": "openvino 1",
      "made_with": "openvino 1",
      "settings": {}
    }
  ],
  "tool": "pkd 0.1.0",
  "created": "2026-01-01T00:00:00+00:00",
  "files": {
    "encoder.onnx": "0b57459772db2f3f6986a135824545af8690c536a865454c3c664767dc2b73f0",
    "golden.npz": "40418e459be9823cf5473309f147331029415d57e55a76bbe5636ead0da1131b",
    "report.html": "33f2799467177287a29260780a107ac98ea63dd6165f67fcc0d74767d0a82090",
    "targets/openvino-bf16/encoder.bin": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "targets/openvino-bf16/encoder.xml": "9d6a064fb2248075588a97f3e7233521dadb5a5eabd1560a849c01b9f4b5c732",
    "targets/openvino-bf16/graph.onnx": "0b57459772db2f3f6986a135824545af8690c536a865454c3c664767dc2b73f0"
  }
}
"""
SIGNATURE = """\
ed25519 sha256:a050837d85070582ccf7394b0988847cc312cb88259b894899f6f239cf1791a5
QwF2Yqiklslr0I7OuaJwmIjWNL7QRnV9jza4mwaaYeLDiyrxiigPT9X2zjOeUyZVqwxipMS5vqCIqi9Y8pXxAQ==
"""
ZIP = "9ed344bc4780a68394ef924f9409c4a9603eb96741c50d70fa380f77003df05a"


def array(dtype: str, shape: str, data: bytes) -> bytes:
    """Write a ``.npy`` file of version 1.0 by hand."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.fixture
def made(tmp_path: Path) -> Bundle:
    info = EncoderInfo(
        id="student@sha256:" + "a" * 64,
        name="student",
        role="student",
        space=EmbeddingSpace(id="teacher@sha256:" + "b" * 64, dim=4),
        preprocess=Preprocess(),
    )
    narrow = info.model_copy(update={"id": "student@sha256:" + "c" * 64, "numeric_mode": "bf16"})
    checks = {"checked_with": "openvino 1", "made_with": "openvino 1"}
    targets = (
        Target(
            runtime="onnxruntime",
            precision="fp32",
            encoder=info,
            graph="encoder.onnx",
            file="encoder.onnx",
            golden_tolerance=1e-5,
            checked_with="onnxruntime 1",
            made_with="pkd 0.1.0",
        ),
        Target(
            runtime="openvino",
            precision="bf16",
            encoder=narrow,
            graph="targets/openvino-bf16/graph.onnx",
            file="targets/openvino-bf16/encoder.xml",
            golden_tolerance=0.01,
            settings={"INFERENCE_PRECISION_HINT": "bf16", "threads": 1},
            **checks,
        ),
        Target(
            runtime="tensorrt",
            precision="bf16",
            encoder=narrow,
            graph="targets/openvino-bf16/graph.onnx",
            file=None,
            golden_tolerance=0.01,
            **checks,  # type: ignore[arg-type]
        ),
    )
    row = np.array([[0.0, 0.6, 0.8, 0.0]], "<f4").tobytes()
    golden = {
        "crops.npy": array("|u1", "(1, 112, 112, 3)", bytes(112 * 112 * 3)),
        "embeddings.npy": array("<f4", "(1, 4)", row),
    }
    write_zip(tmp_path / "golden.npz", golden.items())
    manifest = Manifest(
        encoder=info,
        graph=GraphSpec(opset=18),
        golden_tolerance=1e-5,
        licence="CC BY 4.0",
        training={"method": "l2kd", "steps": 100, "margin": None, "best": 0.5, "resumed": False},
        targets=targets,
        tool="pkd 0.1.0",
        created="2026-01-01T00:00:00+00:00",
        files={},
    )
    files = {
        "encoder.onnx": EMPTY_MODEL,
        "targets/openvino-bf16/graph.onnx": EMPTY_MODEL,
        "targets/openvino-bf16/encoder.xml": b"<net/>",
        "targets/openvino-bf16/encoder.bin": b"",
        "report.html": b"<p>",
        "golden.npz": (tmp_path / "golden.npz").read_bytes(),
    }
    return write_bundle(tmp_path / "made", files, manifest, key=KEY)


def test_the_bytes_of_a_signed_manifest_with_targets_are_pinned(made: Bundle) -> None:
    assert (made.path / "manifest.json").read_text(encoding="utf-8") == MANIFEST
    assert (made.path / "manifest.json.sig").read_text() == SIGNATURE


def test_the_pinned_bytes_are_read_back_and_the_signature_fits_them(made: Bundle) -> None:
    """Without the writer: the reader must keep reading what is out there."""
    assert Manifest.model_validate_json(MANIFEST) == made.manifest
    opened = Bundle.open(made.path, TrustedKeys([KEY.private.public_key()]))
    assert opened.data == MANIFEST.encode()
    assert set(json.loads(MANIFEST)["files"]) == {
        path.relative_to(made.path).as_posix() for path in made.path.rglob("*.*") if path.is_file()
    } - {"manifest.json", "manifest.json.sig"}


def test_the_bytes_of_the_zip_are_pinned(made: Bundle, tmp_path: Path) -> None:
    data = made.pack(tmp_path / "made.zip").read_bytes()
    assert hashlib.sha256(data).hexdigest() == ZIP
