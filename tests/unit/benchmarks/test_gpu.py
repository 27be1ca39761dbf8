"""benchmarks/gpu.py at a thousandth of its size, on whatever is here; and the input that it travels with."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pkd.toolkit.data.face_set import FaceSet
from tests.support.training_data import SIZE, write_patterns, write_teacher

ROOT = Path(__file__).resolve().parents[3]
PREPROCESS = json.dumps({"channels": "rgb", "size": SIZE, "mean": 127.5, "std": 127.5, "template": "none"})


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpu_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_stage_runs_or_says_why_not(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--scale", "0.001", "--out", str(out)]) == 0
    stages = json.loads(out.read_text())["stages"]
    assert list(stages) == list(gpu.STAGES)
    for name in ("machine", "losses", "frozen_head", "heads", "training", "export"):
        assert "skipped" not in stages[name] and "error" not in stages[name], stages[name]
    assert stages["training"]["kept"]["steps"] == 6
    assert stages["training"]["views on the device"]["images_per_second"] > 0


def test_a_stage_that_fails_fails_the_benchmark_and_no_other(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: object) -> dict[str, object]:
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu, "STAGES", {"losses": broken, "machine": gpu.machine})
    assert gpu.main(["--only", "losses", "machine", "--out", str(tmp_path / "gpu.json")]) == 1
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert stages["losses"]["error"] == "ValueError: no such kernel" and "torch" in stages["machine"]


def test_the_packed_input_has_both_models_and_crops_of_everybody(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces = write_patterns(tmp_path / "faces", identities=5, images=4)
    write_teacher(tmp_path / "model.onnx")
    (tmp_path / "model.preprocess.json").write_text(PREPROCESS)
    model = str(tmp_path / "model.onnx")
    options = ["--pack", str(tmp_path / "input"), "--faces", str(faces), "--teacher", model, "--student", model]
    assert gpu.main(options) == 0
    assert {path.name for path in (tmp_path / "input").iterdir()} == {
        "faces.tar", "teacher.onnx", "teacher.preprocess.json", "student.onnx", "student.preprocess.json",
    }  # fmt: skip
    assert len(FaceSet.read(tmp_path / "input" / "faces.tar")) == 20
    monkeypatch.setattr(gpu, "PACK_BYTES", 1_000_000 + 2 * 10_000 + 7 * 2500)
    assert gpu.main(options) == 0
    few = FaceSet.read(tmp_path / "input" / "faces.tar")
    assert 5 <= len(few) < 20 and len(few.identities) == 5
