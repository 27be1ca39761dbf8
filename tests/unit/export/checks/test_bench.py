"""What a bundle's targets cost: measured in processes of their own, beside the baseline of the same round."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pkd.export.checks.bench import BATCHES, BENCH, BenchProcess, skipping
from pkd.export.cli import main
from pkd.export.graph.build import serialise, uint8_graph
from pkd.export.options import ExportOptions
from pkd.export.pipeline import export
from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.core.progress import no_progress
from pkd.toolkit.encoders.base import open_graph
from tests.support.bundle_factory import bundle, content, network, teacher_file

BALLAST_MB = 400


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a bundle with --bench by a process that holds much memory itself."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("bench")
    teacher = teacher_file(folder / "t.onnx")
    ballast = np.ones(BALLAST_MB << 17)
    options = ExportOptions(  # type: ignore[call-arg]
        teacher=str(teacher),
        teacher_preprocess="mean=127.5,std=127.5",
        out=folder / "b",
        format=("onnx", "openvino", "trt"),
        bench=True,
    )
    export(options, Console(quiet=True), no_progress, bench_rounds=2)
    assert ballast.any()
    return folder / "b"


@pytest.fixture(scope="module")
def found(exported: Path) -> dict[str, Any]:
    """Its bench.json."""
    return json.loads(Bundle.open(exported).read(BENCH))


@pytest.mark.slow
def test_every_target_that_runs_is_measured_and_the_others_say_why(found: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in found["rows"]}
    has = importlib.util.find_spec("insightface") is not None
    assert list(rows) == ["encoder.onnx", "onnxruntime-fp32", "openvino-fp32", *(["insightface"] if has else [])]
    assert "tensorrt-fp32" in found["skipped"]
    assert has or "pip install 'pkd[insightface]'" in found["skipped"]["insightface"]
    for row in rows.values():
        assert row["runtime"].split()[0] in ("onnxruntime", "openvino", "insightface")
        assert row["golden_error"] < 1e-5, "the same weights"
        assert [time["batch"] for time in row["times"]] == list(BATCHES)
        assert all(time["cpu_ms"] > 0 and time["wall_ms"] > 0 for time in row["times"])
    assert [time["ratio"] for time in rows["encoder.onnx"]["times"]] == [1, 1, 1]
    assert found["rounds"] == 2
    assert found["cpu"]


@pytest.mark.slow
def test_sizes_are_of_what_the_runtime_loads(exported: Path, found: dict[str, Any]) -> None:
    rows = {row["name"]: row["bytes"] for row in found["rows"]}
    assert rows["encoder.onnx"] == (exported / "encoder.onnx").stat().st_size
    parts = (exported / "targets/openvino-fp32" / f"encoder.{end}" for end in ("xml", "bin"))
    assert rows["openvino-fp32"] == sum(part.stat().st_size for part in parts)


@pytest.mark.slow
def test_memory_is_the_measured_process_own(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        assert 0.1 < row["memory_mb"] < BALLAST_MB / 2, "neither its parent's nor that of its imports"


@pytest.mark.slow
def test_times_are_cpu_milliseconds_per_image(exported: Path, found: dict[str, Any]) -> None:
    opened = Bundle.open(exported)
    encoder = open_graph(opened, opened.manifest.encoder, "encoder.onnx")
    crops = np.resize(opened.golden().crops, (32, 112, 112, 3))
    encoder.embed(crops)
    began = process_time()
    for _ in range(20):
        encoder.embed(crops)
    here = 1e3 * (process_time() - began) / (20 * 32)
    assert here / 5 < found["rows"][0]["times"][-1]["cpu_ms"] < here * 5


@pytest.mark.slow
def test_the_table_names_no_path_of_this_machine(exported: Path) -> None:
    text = (exported / BENCH).read_text()
    assert "/tmp" not in text and str(Path.home()) not in text


@pytest.mark.slow
def test_figures_of_other_files_do_not_stay(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from-bundle", str(exported), "--precision", "fp32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bench"] is None
    assert not (exported / BENCH).exists()


def test_a_target_that_computes_another_encoder_is_not_timed(tmp_path: Path) -> None:
    files, manifest = content()
    wrong = Target(
        runtime="onnxruntime",
        precision="fp32",
        encoder=manifest.encoder,
        graph="targets/onnxruntime-fp32/encoder.onnx",
        file="targets/onnxruntime-fp32/encoder.onnx",
        golden_tolerance=1e-5,
        checked_with="x",
        made_with="x",
    )
    other = serialise(uint8_graph(network(seed=1), Preprocess(), 16))
    made = write_bundle(
        tmp_path / "b", {**files, wrong.graph: other}, manifest.model_copy(update={"targets": (wrong,)})
    )
    skipped: dict[str, str] = {}
    with BenchProcess(made.path, wrong.name, tmp_path) as process, skipping(wrong.name, skipped):
        process.warm_up()
    assert skipped[wrong.name].startswith("BUNDLE: onnxruntime-fp32: golden crops come out")


def test_a_process_that_ends_is_out_of_the_race(tmp_path: Path) -> None:
    skipped: dict[str, str] = {}
    with BenchProcess(bundle(tmp_path).path, "encoder.onnx", tmp_path) as process:
        process.warm_up()
        running = {"encoder.onnx": process}
        process.process.kill()
        with skipping("encoder.onnx", skipped, running):
            process.measure(8)
    assert skipped == {"encoder.onnx": "its process ended with exit code -9."}
    assert not running
