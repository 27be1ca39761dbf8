"""A graph whose loop never ends: whatever waits for it, the process is stopped by SIGTERM."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pkd.toolkit.bundle.bundle import Golden
from tests.support.server_process import COMMAND, until
from tests.support.serving_bundles import crops, encoder, weights


def endless(model: bytes) -> bytes:
    """Let what the graph gives go through a loop of 2**62 turns."""
    made = onnx.load_from_string(model)
    output = made.graph.output[0].name
    made.graph.node[-1].output[0] = "before"
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_in"], ["go"]), helper.make_node("Abs", ["x_in"], ["x"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x_in", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
    )
    made.graph.initializer.append(numpy_helper.from_array(np.array(2**62, np.int64), "turns"))
    made.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    made.graph.node.append(helper.make_node("Loop", ["turns", "yes", "before"], ["after"], body=body))
    made.graph.node.append(helper.make_node("Identity", ["after"], [output]))
    return made.SerializeToString()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, images = encoder("teacher", weights(1)), crops(2)
    path = tmp_path_factory.mktemp("endless") / "bundle"
    replace(made, model=endless(made.model)).write(path, golden=Golden(images, made.embed(images)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--drain-seconds=0", "--check-config"])
def test_sigterm_ends_it(bundle: Path, tmp_path: Path, option: str) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([str(COMMAND), str(bundle), "--port", "0", option], stderr=file)
    try:
        assert until(lambda: "nobody can be enrolled" in log.read_text() or process.poll() is not None, 60)
        time.sleep(1)  # for the self-test to begin; before that a signal has an easier time
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) != 0  # three seconds, were the machine idle
    finally:
        process.kill()
    assert "Traceback" not in log.read_text()
