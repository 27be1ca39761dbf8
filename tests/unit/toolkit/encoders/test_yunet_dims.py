"""A detector whose sizes are declared takes any size once they are freed, and computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.encoders.base import make_session
from pkd.toolkit.encoders.yunet_dims import free_dims
from tests.support.spot_detector import write_spot_detector


def fixed(path: Path, side: int) -> bytes:
    """Write the spot detector with the declarations that the public 640×640 file has."""
    model = onnx.load(write_spot_detector(path, "yunet"))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, (1, 3, side, side), strict=True):
        dim.Clear()
        dim.dim_value = size
    for output in model.graph.output:
        stride = int(output.name.rpartition("_")[2])
        output.type.tensor_type.shape.dim[1].Clear()
        output.type.tensor_type.shape.dim[1].dim_value = (side // stride) ** 2
    return onnx.shape_inference.infer_shapes(model).SerializeToString()


def run(data: bytes, picture: np.ndarray) -> list[np.ndarray]:
    return make_session(data, 1).run(None, {"input": picture})


def test_any_multiple_of_32_is_taken_and_the_same_is_computed(tmp_path: Path) -> None:
    data = fixed(tmp_path / "yunet.onnx", 64)
    freed = free_dims(data)
    onnx.checker.check_model(onnx.load_model_from_string(freed))
    assert (
        onnx.load_model_from_string(data).graph.value_info and not onnx.load_model_from_string(freed).graph.value_info
    )
    rng = np.random.default_rng(0)
    picture = rng.uniform(0, 255, (1, 3, 64, 64)).astype(np.float32)
    for before, after in zip(run(data, picture), run(freed, picture), strict=True):
        np.testing.assert_array_equal(before, after)
    wide = rng.uniform(0, 255, (1, 3, 96, 160)).astype(np.float32)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(data, wide)
    assert run(freed, wide)[0].shape[1] == 96 * 160 // 64


def test_what_is_free_stays_so_and_twice_is_once(tmp_path: Path) -> None:
    once = free_dims(fixed(tmp_path / "yunet.onnx", 64))
    assert free_dims(once) == once


@pytest.mark.parametrize("data", [b"GIF89a", b"\x3a\xff\xff\xff\x7f", b"\x0f" * 9])
def test_what_is_no_onnx_file_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="the detector is no ONNX file"):
        free_dims(data)


@pytest.mark.shared
def test_the_public_file_of_640_pixels_becomes_the_dynamic_one(shared: Path) -> None:
    made, known = (shared / f"models/yunet_n_{name}.onnx" for name in ("640_640", "dynamic"))
    picture = np.random.default_rng(1).uniform(0, 255, (1, 3, 224, 320)).astype(np.float32)
    for one, other in zip(run(free_dims(made.read_bytes()), picture), run(known.read_bytes(), picture), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
