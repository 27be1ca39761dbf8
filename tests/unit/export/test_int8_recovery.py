"""What is tried where INT8 fails its gate: layers in float32, as few as needed, judged ever more strictly."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from pkd.export.checks import gate
from pkd.export.cli import main
from pkd.export.options import ExportOptions
from pkd.export.pipeline import export
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.core.cli_options import add_options, read_options
from pkd.toolkit.core.progress import Advance, no_progress
from pkd.toolkit.evaluation.protocols.common import EvaluationOptions
from tests.support.evaluation_faces import PREPROCESS, write_people

BAD = "net/Bad"


def write_uneven(path: Path, factor: float) -> None:
    """Write a network, float N×3×112×112 → N×32, that INT8 ruins.

    A channel is made ``factor`` times smaller, and as much larger by the next layer, whose other weights are then too
    small for the steps of its INT8.
    """
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return random.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)

    first, bad, matrix = weight(16, 3, 8, 8), weight(16, 16, 1, 1), weight(32, 16 * 14 * 14).T.copy()
    first[0] /= factor
    bad[:, 0] *= factor
    constants = {"first": first, "bad": bad, "matrix": matrix}
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], name="First", strides=[8, 8]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "bad"], ["c"], name="Bad"),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "matrix"], ["y"], name="Last"),
    ]
    graph = helper.make_graph(
        nodes,
        "uneven",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gate, "EvaluationOptions", partial(EvaluationOptions, resamples=200))  # decides the same
    write_uneven(tmp_path / "t.onnx", 200.0)
    write_people(tmp_path / "calib", [2] * 30, seed=1)
    write_people(tmp_path / "people", [4] * 40, noise=60.0)
    stated = ["--teacher", "t.onnx", "--teacher-preprocess", PREPROCESS, "-o", "made", "--json"]
    return [*stated, "--precision", "int8", "--calib", "calib", "--gate", "people", "--gate-fmr", "0.05"]


def test_the_costliest_layer_stays_in_float32_until_the_gate_passes(command: list[str]) -> None:
    labels: list[str] = []

    def recorded(label: str, total: int | None = None, /) -> AbstractContextManager[Advance]:
        labels.append(label)
        return no_progress(label, total)

    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    add_options(parser, ExportOptions)
    options = read_options(ExportOptions, parser.parse_args([*command, "--max-tar-drop", "0.1"]))
    told = export(options, Console(quiet=True), recorded)
    ordered, tried = told["gated"]
    assert (ordered["passed"], ordered["tried"], ordered["level"]) == (False, "", 0.95)
    assert (tried["passed"], tried["tried"], tried["level"]) == (True, "1 layer in float32", 0.95)  # K = 1
    assert ordered["encoder"] != tried["encoder"] and ordered["reference"] == tried["reference"]
    measured = [label for label in labels if label.startswith(("embedding", "gate"))]
    assert measured == ["embedding the gallery", "gate fp32", *["gate onnxruntime-int8"] * 2], "people and fp32 once"
    (target,) = Bundle.open("made").manifest.targets
    assert target.settings["layers_in_fp32"] == BAD == told["sensitivity"]["u8s8"][0]["layer"]
    assert target.encoder.id == tried["encoder"]
    assert [c.query for c in Bundle.open("made").certificates()] == [tried["encoder"]], "none of a failed try"
    said = Bundle.open("made").manifest.gate
    assert said.startswith("passed: ") and "in try 2 on these people: 1 layer in float32" in said


def test_what_no_try_rescues_writes_nothing(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--max-tar-drop", "0"]) == 4
    assert "in try 2 on these people: 1 layer in float32, too much. Nothing was written." in capsys.readouterr().err
    assert not Path("made").exists()


def test_an_ordered_number_of_layers_is_not_searched_for(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--max-tar-drop", "0", "--keep-float", "1"]) == 4
    assert " in try " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--qat"], "a bundle or a teacher has no run"),
        (["--qat-steps", "5"], "go with --qat"),
    ],
)
def test_qat_without_a_run_is_refused(
    command: list[str], options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *options]) == 2
    assert said in capsys.readouterr().err
