"""Small ONNX networks with the output layouts of YuNet and SCRFD that take a white spot for a face.

They let the real OpenCV and insightface classes run where no face detector is at hand. A spot is an 8×8 white square
on a multiple of 8 pixels; the face reported is ``FACE_SIDE`` pixels wide around its centre, its landmarks upright.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pkd.toolkit.images.alignment import TEMPLATE

FACE_SIDE = 48
STRIDES = (8, 16, 32)
LANDMARKS = (TEMPLATE - 56) * (FACE_SIDE / 112)
"""Offsets of the five landmarks from the spot's centre, pixels."""


def write_spot_detector(path: Path, layout: Literal["yunet", "scrfd"]) -> Path:
    """Write the network to ``path``."""
    nodes, tensors, outputs = [], [], {}

    def head(part: str, stride: int, weight: float, bias: list[float], sigmoid: bool) -> None:
        """One 1×1 convolution over the pooled image → 1×cells×channels (YuNet) or rows×channels (SCRFD)."""
        name, anchors = f"{part}_{stride}", 1 if layout == "yunet" else 2
        values = np.tile(np.array(bias, np.float32), anchors)
        tensors.append(numpy_helper.from_array(np.full((len(values), 3, 1, 1), weight, np.float32), name + "_w"))
        tensors.append(numpy_helper.from_array(values, name + "_b"))
        shape = [1, -1, len(bias)] if layout == "yunet" else [-1, len(bias)]
        tensors.append(numpy_helper.from_array(np.array(shape, np.int64), name + "_shape"))
        nodes.append(helper.make_node("Conv", [f"pool_{stride}", name + "_w", name + "_b"], [name + "_c"]))
        last = name + "_c"
        if sigmoid:
            nodes.append(helper.make_node("Sigmoid", [last], [name + "_s"]))
            last = name + "_s"
        nodes.append(helper.make_node("Transpose", [last], [name + "_t"], perm=[0, 2, 3, 1]))
        nodes.append(helper.make_node("Reshape", [name + "_t", name + "_shape"], [name]))
        outputs[name] = helper.make_tensor_value_info(
            name, TensorProto.FLOAT, [1, None, len(bias)] if layout == "yunet" else [None, len(bias)]
        )

    white = 255.0 if layout == "yunet" else (255 - 127.5) / 128
    for stride in STRIDES:
        nodes.append(
            helper.make_node(
                "AveragePool", ["input"], [f"pool_{stride}"], kernel_shape=[stride, stride], strides=[stride, stride]
            )
        )
        steep = 20 / white / 3
        score = [-16.0 if stride == 8 else -60.0]  # only the finest stride answers
        points = (LANDMARKS / stride + 0.5).ravel().tolist()
        if layout == "yunet":
            head("cls", stride, steep, score, True)
            head("obj", stride, steep, score, True)
            head("bbox", stride, 0.0, [0.5, 0.5, math.log(FACE_SIDE / stride), math.log(FACE_SIDE / stride)], False)
        else:
            head("cls", stride, steep, score, True)
            low, high = FACE_SIDE / 2 / stride - 0.5, FACE_SIDE / 2 / stride + 0.5
            head("bbox", stride, 0.0, [low, low, high, high], False)
        head("kps", stride, 0.0, points, False)
    order = [f"{part}_{stride}" for part in ("cls", "obj", "bbox", "kps") for stride in STRIDES]
    graph = helper.make_graph(
        nodes,
        layout,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, None, None])],
        [outputs[name] for name in order if name in outputs],
        tensors,
    )
    for axis, label in ((2, "height"), (3, "width")):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_param = label
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def picture(width: int, height: int, *spots: tuple[int, int]) -> np.ndarray:
    """Draw a dark uint8 H×W×3 image with a white spot whose top-left corner is at each (x, y)."""
    image = np.full((height, width, 3), 20, np.uint8)
    for x, y in spots:
        image[y : y + 8, x : x + 8] = 255
    return image
