"""Encoders embed crops as their graph does, whatever the batch."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pkd.export.checks.parity import synthetic_crops
from pkd.toolkit.bundle.bundle import write_bundle
from pkd.toolkit.core.errors import BadVector, BundleError, InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import OnnxEncoder, batches, make_session, open_bundle, open_onnx, unit_rows
from pkd.toolkit.encoders.detector import open_detector
from tests.support.bundle_factory import DIM, bundle, content, encoder, network, teacher_file


def one_node(
    operator: str, shape_in: list[int | str], shape_out: list[int | str], kind: int, **attributes: object
) -> bytes:
    node = helper.make_node(operator, ["x"], ["y"], **attributes)  # type: ignore[arg-type]
    taken = helper.make_tensor_value_info("x", kind, shape_in)
    given = helper.make_tensor_value_info("y", kind, shape_out)
    graph = helper.make_graph([node], "g", [taken], [given])
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    ).SerializeToString()
    return made


def test_embeddings_are_those_of_the_network_divided_by_their_length(tmp_path: Path) -> None:
    preprocess = Preprocess(channels="bgr", mean=100, std=50)
    opened = encoder(tmp_path, preprocess)
    crops = synthetic_crops(5, 112)
    (raw,) = make_session((tmp_path / "tiny.onnx").read_bytes(), 1).run(None, {"input": preprocess(crops)})
    np.testing.assert_allclose(opened.embed(crops), raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)


def test_the_identity_is_that_of_the_file_and_its_preprocessing(tmp_path: Path) -> None:
    same, again = encoder(tmp_path), encoder(tmp_path)
    scaled, other = encoder(tmp_path, Preprocess(std=128)), encoder(tmp_path, seed=1)
    assert same.info == again.info
    assert len({same.info.id, scaled.info.id, other.info.id}) == 3
    assert same.info.space.dim == DIM


def test_no_crops_give_no_rows(tmp_path: Path) -> None:
    empty = np.empty((0, 112, 112, 3), np.uint8)
    assert encoder(tmp_path).embed(empty).shape == (0, DIM)
    assert open_bundle(bundle(tmp_path)).embed(empty).shape == (0, DIM)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_graph_of_a_fixed_batch_embeds_any_number(tmp_path: Path, batch: int, count: int) -> None:
    crops = synthetic_crops(count, 112)
    fixed, free = encoder(tmp_path, batch=batch).embed(crops), encoder(tmp_path).embed(crops)
    np.testing.assert_allclose(fixed, free, atol=1e-6)
    assert encoder(tmp_path, batch=batch).embed(crops[:0]).shape == (0, DIM)


@pytest.mark.parametrize(
    ("crops", "said"),
    [
        (np.zeros((1, 112, 112, 3), np.float32), "float32"),
        (np.zeros((112, 112, 3), np.uint8), r"\(112, 112, 3\)"),
        (np.zeros((1, 3, 112, 112), np.uint8), "this encoder takes uint8 N×112×112×3"),
        (np.zeros((1, 96, 112, 3), np.uint8), "96"),
    ],
)
def test_crops_of_another_form_are_refused(tmp_path: Path, crops: np.ndarray, said: str) -> None:
    for opened in (encoder(tmp_path), open_bundle(bundle(tmp_path, said.replace("\\", "")))):
        with pytest.raises(InputError, match=said):
            opened.embed(crops)


def test_files_that_are_no_encoder_are_refused_in_one_line(tmp_path: Path) -> None:
    detector = network()
    detector.graph.input.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, [1]))
    floats = TensorProto.FLOAT
    cases = {
        "empty": (b"", "no whole ONNX"),
        "text": (b"not onnx at all", "no whole ONNX"),
        "cut": (network().SerializeToString()[:-100], "no whole ONNX"),
        "two inputs": (detector.SerializeToString(), "2 inputs"),
        "uint8": (one_node("Identity", ["n", 3, 112, 112], ["n", 3, 112, 112], TensorProto.UINT8), "takes bytes"),
        "nhwc": (one_node("Identity", ["n", 112, 112, 3], ["n", 112, 112, 3], floats), "1×112×112×3; an embedding"),
        "160 pixels": (one_node("Identity", ["n", 3, 160, 160], ["n", 3, 160, 160], floats), "size="),
        "no vectors": (
            one_node("Identity", ["n", 3, 112, 112], ["n", 3, 112, 112], floats),
            "1×3×112×112; an embedding",
        ),
        "one vector": (one_node("Flatten", ["n", 3, 112, 112], [1, "d"], floats, axis=0), "1 rows for 4"),
    }
    for name, (data, said) in cases.items():
        path = tmp_path / f"{name.replace(' ', '-')}.onnx"
        path.write_bytes(data)
        with pytest.raises(InputError, match=said) as caught:
            open_onnx(path, Preprocess())
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            open_onnx(path, Preprocess())


@pytest.mark.parametrize("rows", [[[np.nan, 1]], [[np.inf, 1]], [[0, 0]], [[1e-20, 0]], [[1, 0], [0, 0]]])
def test_rows_without_a_direction_are_refused(rows: list[list[float]]) -> None:
    with pytest.raises(BadVector, match=f"of {len(rows)} embeddings"):
        unit_rows(np.array(rows, np.float32))


def test_a_network_that_gives_nan_is_refused(tmp_path: Path) -> None:
    broken = network()
    bias = next(t for t in broken.graph.initializer if t.name == "bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(DIM, np.nan, np.float32), "bias"))
    path = tmp_path / "nan.onnx"
    onnx.save(broken, str(path))
    opened = open_onnx(path, Preprocess())
    with pytest.raises(BadVector, match="nan: 2 of 2"):
        opened.embed(synthetic_crops(2, 112))


@pytest.mark.parametrize(
    "model",
    [
        b"\x08\x08",  # a model of IR version 8, and nothing else
        network().SerializeToString(),
        one_node("Identity", ["n", 112, 112, 3], ["n", 112, 112, 3], TensorProto.UINT8),
    ],
    ids=["no graph", "float input", "no embedding"],
)
def test_a_bundle_whose_graph_is_not_what_it_says_is_refused(tmp_path: Path, model: bytes) -> None:
    files, manifest = content()
    written = write_bundle(tmp_path / "made", {**files, "encoder.onnx": model}, manifest)
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        open_bundle(written)


def test_threads_may_share_an_encoder(tmp_path: Path) -> None:
    opened: OnnxEncoder = open_bundle(bundle(tmp_path))
    crops = synthetic_crops(6, 112)
    alone = [opened.embed(crops[i : i + 1]) for i in range(6)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            together = list(pool.map(lambda i: opened.embed(crops[i : i + 1]), range(6)))
            np.testing.assert_array_equal(np.concatenate(together), np.concatenate(alone))


def test_batches_cover_everything_once() -> None:
    assert [list(r) for r in batches(5, 2)] == [[0, 1], [2, 3], [4]]
    assert list(batches(0, 2)) == []


def test_teacher_names_follow_from_the_file(tmp_path: Path) -> None:
    assert open_onnx(teacher_file(tmp_path / "my_teacher_v2.onnx"), Preprocess()).info.name == "my-teacher-v2"
    assert open_onnx(teacher_file(tmp_path / "my model (2).onnx"), Preprocess()).info.name == "my-model-2"
    assert open_onnx(teacher_file(tmp_path / "x.onnx"), Preprocess(), name="y").info.name == "y"


def test_a_graph_that_fails_while_running_says_where_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = network()
    model.graph.node[-1].output[0] = "row"
    model.graph.node.append(helper.make_node("Add", ["row", "wrong"], ["embedding"], name="the_sum"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((2, 5), np.float32), "table"))
    model.graph.node.insert(0, helper.make_node("Resize", ["table", "", "scales"], ["wrong"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2], np.float32), "scales"))
    (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"bad\.onnx: .*(the_sum|shape)") as caught:
        open_onnx(tmp_path / "bad.onnx", Preprocess())
    assert "onnxruntime_src" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_weights_in_another_file_are_refused_and_the_remedy_works(tmp_path: Path) -> None:
    """The id is the file's SHA-256: two networks with one file and other weights would share certificates and cache."""
    path = tmp_path / "t.onnx"
    onnx.save(network(), path, save_as_external_data=True, location="t.data", size_threshold=0)
    with pytest.raises(InputError, match=r"t\.onnx: keeps the weights of '\w+' in another file") as refused:
        open_onnx(path, Preprocess())
    with pytest.raises(InputError, match="in another file"):
        open_detector(str(path))
    command = str(refused.value).partition("Put them inside: ")[2]
    subprocess.run(command.replace("python ", f"{sys.executable} ", 1), shell=True, check=True, cwd=tmp_path)
    crops = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    one_file = open_onnx(tmp_path / "one-file.onnx", Preprocess())
    assert np.allclose(one_file.embed(crops), encoder(tmp_path).embed(crops), atol=1e-6)
