"""Exported graphs in onnxruntime-web, as a browser computes them: its WebAssembly build, in node."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import version_converter

from pkd.export.checks.parity import synthetic_crops
from pkd.export.cli import main
from pkd.export.graph.build import IR_VERSION, OPSET, WEB_IR_VERSION, WEB_OPSET, uint8_graph
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.core.preprocess import Preprocess
from tests.support.bundle_factory import DIM, network

PACKAGE = "onnxruntime-web@1.30.0"
SCRIPT = """
import * as ort from "onnxruntime-web";
import { readFileSync } from "node:fs";
const [crops, size, ...models] = process.argv.slice(2);
const pixels = new Uint8Array(readFileSync(crops));
const count = pixels.length / (size * size * 3);
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal";
const said = {};
for (const model of models) {
  try {
    const session = await ort.InferenceSession.create(readFileSync(model), { executionProviders: ["wasm"] });
    const { embedding } = await session.run({ crops: new ort.Tensor("uint8", pixels, [count, +size, +size, 3]) });
    said[model] = { shape: embedding.dims, values: Array.from(embedding.data) };
  } catch (error) {
    said[model] = { error: String(error.message ?? error) };
  }
}
console.log(JSON.stringify(said));
"""
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """uint8 N×S×S×3 and model files → by file name, ``shape`` and ``values``, or ``error``."""
    folder = tmp_path_factory.mktemp("web")
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("no node and npm here")
    install = [npm, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
    try:
        done = subprocess.run(install, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not install {PACKAGE} within three minutes")
    if done.returncode:
        pytest.skip(f"npm cannot install {PACKAGE}: {done.stderr.strip().splitlines()[-1:]}")
    (folder / "ask.mjs").write_text(SCRIPT)

    def ask(crops: np.ndarray, *models: Path) -> dict[str, Any]:
        (folder / "crops").write_bytes(crops.tobytes())
        command = [node, str(folder / "ask.mjs"), str(folder / "crops"), str(crops.shape[1]), *map(str, models)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        return json.loads(said)  # type: ignore[no-any-return]

    yield ask
    shutil.rmtree(folder)  # 150 MB


@pytest.mark.network
def test_every_file_for_onnxruntime_computes_the_golden_embeddings_in_a_browser(ask: Ask, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.support.every_operator import every_operator

    onnx.save(every_operator(), str(tmp_path / "t.onnx"))
    teacher = ["--teacher", str(tmp_path / "t.onnx"), "--teacher-preprocess", "channels=bgr,mean=127.5,std=128"]
    (tmp_path / "faces").mkdir()
    for i, crop in enumerate(synthetic_crops(40, 112)):
        cv2.imwrite(str(tmp_path / f"faces/{i:02}.png"), crop[..., ::-1])
    options = ["--precision", "fp32", "fp16", "int8", "--calib", str(tmp_path / "faces"), "--json"]
    assert main([*teacher, "-o", str(tmp_path / "made"), *options]) == 0
    bundle = Bundle.open(tmp_path / "made")
    golden = bundle.golden()
    allowed = {bundle.path / "encoder.onnx": bundle.manifest.golden_tolerance}
    allowed |= {bundle.path / str(target.file): target.golden_tolerance for target in bundle.manifest.targets}
    assert len(allowed) == 4
    said = ask(golden.crops, *allowed)
    for path, tolerance in allowed.items():
        assert said[str(path)].get("shape") == [len(golden.crops), DIM], said[str(path)]
        rows = np.array(said[str(path)]["values"]).reshape(-1, DIM)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        worst = 1 - np.sum(rows * golden.embeddings, axis=1).min()
        assert worst <= tolerance, f"{path.name}: {worst} over {tolerance}"


@pytest.mark.network
def test_the_newest_graphs_that_browsers_load_are_those_that_pkd_says(ask: Ask, tmp_path: Path) -> None:
    crops = synthetic_crops(1, 112)
    graph = uint8_graph(network(), Preprocess(), DIM)
    assert (OPSET, graph.ir_version) == (18, IR_VERSION)
    files = {}
    for opset, ir_version in [
        (OPSET, IR_VERSION),
        (WEB_OPSET, WEB_IR_VERSION),
        (WEB_OPSET + 1, IR_VERSION),
        (OPSET, WEB_IR_VERSION + 1),
    ]:
        made = version_converter.convert_version(graph, opset)
        made.ir_version = ir_version
        files[opset, ir_version] = tmp_path / f"{opset}-{ir_version}.onnx"
        onnx.save(made, str(files[opset, ir_version]))
    said = ask(crops, *files.values())
    loads = {key for key, path in files.items() if "values" in said[str(path)]}
    assert loads == {(OPSET, IR_VERSION), (WEB_OPSET, WEB_IR_VERSION)}, said


def test_a_teacher_too_new_for_browsers_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for opset, noted in [(WEB_OPSET, False), (WEB_OPSET + 1, True)]:
        teacher = network(opset=opset)
        teacher.ir_version = WEB_IR_VERSION + 1
        onnx.save(teacher, "t.onnx")
        command = ["--teacher", "t.onnx", "--teacher-preprocess", "mean=127.5,std=127.5", "-o", f"made{opset}"]
        assert main(command) == 0
        assert ("browsers will refuse encoder.onnx" in " ".join(capsys.readouterr().err.split())) == noted
        made = onnx.load_model_from_string(Bundle.open(f"made{opset}").read("encoder.onnx"))
        assert made.ir_version == (WEB_IR_VERSION + 1 if noted else WEB_IR_VERSION)
