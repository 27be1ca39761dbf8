"""pkd-export as people run it: a process, its exit code, its streams, and a bundle that a device can use alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pkd.toolkit.bundle.bundle import Bundle, self_test
from pkd.toolkit.core.encoder_info import EmbeddingSpace, describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import open_bundle
from tests.support.bundle_factory import DIM, teacher_file

EXPORT = str(Path(sys.executable).with_name("pkd-export"))
STATED = ["--teacher-preprocess", "mean=127.5,std=127.5"]

DEVICE = """
import sys, json, pathlib, hashlib
import numpy as np, onnxruntime
root = pathlib.Path(sys.argv[1])
manifest = json.loads((root / "manifest.json").read_text())
for name, digest in manifest["files"].items():
    assert hashlib.sha256((root / name).read_bytes()).hexdigest() == digest
golden = np.load(root / "golden.npz")
session = onnxruntime.InferenceSession(str(root / "encoder.onnx"), providers=["CPUExecutionProvider"])
(rows,) = session.run(["embedding"], {"crops": golden["crops"]})
assert "pkd" not in sys.modules and "torch" not in sys.modules
print(float(np.max(1 - np.sum(rows * golden["embeddings"], axis=1))))
"""


def export(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([EXPORT, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_a_teacher_becomes_a_bundle_that_onnxruntime_alone_can_use(tmp_path: Path) -> None:
    teacher_file(tmp_path / "t.onnx")
    done = export(tmp_path, "--teacher", "t.onnx", *STATED, "-o", "made", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["bundle"] == "made"
    device = [sys.executable, "-c", DEVICE, str(tmp_path / "made")]
    assert float(subprocess.check_output(device, text=True)) < 1e-6


def test_a_run_becomes_a_bundle_without_noise(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from pkd.toolkit.distill.models.backbones import build
    from pkd.toolkit.distill.models.student import save_student, weights_digest

    torch.manual_seed(0)
    module = build("mobilefacenet:0.25", DIM)
    space = EmbeddingSpace(id="teacher@sha256:" + "0" * 64, dim=DIM)
    info = describe("small", "student", weights_digest(module.state_dict()), Preprocess(), DIM, space=space)
    (tmp_path / "run").mkdir()
    save_student(tmp_path / "run", module, "mobilefacenet:0.25", info, {"method": "none"})
    done = export(tmp_path, "run", "-o", "made", "--float-nchw", "float.onnx", "--licence", "none")
    assert (done.returncode, done.stdout) == (0, "")
    assert "wrote made and float.onnx" in done.stderr
    assert "not gated" in done.stderr
    for noise in ("Warning", "warn", "torch.onnx", "Traceback", "deprecat"):
        assert noise not in done.stderr
    bundle = Bundle.open(tmp_path / "made")
    assert bundle.manifest.encoder == info
    assert self_test(bundle, open_bundle(bundle).embed) < 1e-6


def test_bad_input_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a network")
    done = export(tmp_path, "--teacher", "text.onnx", *STATED, "-o", "made")
    assert (done.returncode, done.stdout) == (2, "")
    assert "text.onnx: it is no whole ONNX file" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.onnx"]


def test_help_shows_examples_and_exit_codes(tmp_path: Path) -> None:
    done = export(tmp_path, "--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert "4 a gate failed" in done.stdout
