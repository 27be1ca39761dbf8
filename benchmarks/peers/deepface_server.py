"""The peer of benchmarks/serving_cost.py for whole photographs: deepface's own API with pkd's detector and encoder.

Run as: python benchmarks/peers/deepface_server.py PORT BUNDLE YUNET WORKERS HOME

deepface loads its networks by file name from ``$DEEPFACE_HOME/.deepface/weights``; there it finds YuNet, and as its
ArcFace the bundle's encoder behind an input of its kind (float N×112×112×3, BGR, 0 to 1). Everything else is deepface
as it ships: Flask under gunicorn, onnxruntime with its default session options.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def main() -> None:
    """Lay out the weights, then become gunicorn."""
    port, bundle, yunet, workers, home = sys.argv[1:]
    weights = Path(home, ".deepface", "weights")
    weights.mkdir(parents=True)
    shutil.copy(yunet, weights / "face_detection_yunet_2023mar.onnx")
    onnx.save(for_deepface(onnx.load(Path(bundle, "encoder.onnx"))), weights / "arcface_weights.onnx")
    environment = {**os.environ, "DEEPFACE_HOME": home, "DEEPFACE_BACKEND_ENGINE": "onnx", "DEEPFACE_LOG_LEVEL": "40"}
    command = [sys.executable, "-m", "gunicorn", "--workers", workers, "--bind", f"127.0.0.1:{port}"]
    os.execve(sys.executable, [*command, "--timeout", "600", "deepface.api.src.app:create_app()"], environment)


def for_deepface(model: onnx.ModelProto) -> onnx.ModelProto:
    """Run the same encoder with deepface's input: back to bytes, BGR to RGB."""
    graph = model.graph
    taken = graph.input[0].name
    front = [
        helper.make_node("Mul", ["bgr", "front/scale"], ["front/pixels"]),
        helper.make_node("Round", ["front/pixels"], ["front/whole"]),
        helper.make_node("Cast", ["front/whole"], ["front/bytes"], to=TensorProto.UINT8),
        helper.make_node("Gather", ["front/bytes", "front/order"], [taken], axis=3),
    ]
    nodes = [*front, *graph.node]
    del graph.input[:], graph.node[:]
    graph.input.append(helper.make_tensor_value_info("bgr", TensorProto.FLOAT, ["batch", 112, 112, 3]))
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.float32(255), "front/scale"))
    graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0], np.int64), "front/order"))
    return model


if __name__ == "__main__":
    main()
