"""One graph holds scaling, network and normalisation."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pkd.export.checks.parity import BATCHES, insightface_blob, measure, onnx_runner, synthetic_crops
from pkd.export.graph.build import (
    IR_VERSION,
    OPSET,
    float_graph,
    network_of,
    onnx_network,
    opset_of,
    serialise,
    torch_network,
    uint8_graph,
)
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import make_session, open_onnx
from tests.support.bundle_factory import DIM, network, teacher_file

torch = pytest.importorskip("torch")
CROPS = synthetic_crops(max(BATCHES), 112)
PREPROCESSES = [
    Preprocess(),
    Preprocess(mean=0, std=1),
    Preprocess(channels="bgr", mean=127.5, std=128),
    Preprocess(channels="bgr", mean=0, std=255),
    Preprocess(mean=120.3, std=57.1),
]


def checked(path: Path, preprocess: Preprocess | None = None) -> onnx.ModelProto:
    """Make the bundle graph of an ONNX teacher, after every parity check passed."""
    source = open_onnx(path, preprocess or Preprocess())
    graph = uint8_graph(onnx_network(path), source.info.preprocess, source.info.space.dim)
    onnx.checker.check_model(graph, full_check=True)
    runner = onnx_runner(serialise(graph), lambda crops: crops, path.name)
    for row in measure("uint8", source.embed(CROPS), CROPS, runner):
        assert row.passed, row
    return graph


def save(model: onnx.ModelProto, folder: Path) -> Path:
    (folder / "made.onnx").write_bytes(model.SerializeToString())
    return folder / "made.onnx"


@pytest.mark.parametrize("preprocess", PREPROCESSES, ids=str)
def test_both_graphs_compute_the_network_for_any_preprocessing(tmp_path: Path, preprocess: Preprocess) -> None:
    path = teacher_file(tmp_path / "t.onnx")
    checked(path, preprocess)
    source = open_onnx(path, preprocess)
    for plain in (onnx_network(path), network_of(uint8_graph(onnx_network(path), preprocess, DIM))):
        floats = serialise(float_graph(plain, preprocess, DIM))
        rows = measure("float", source.embed(CROPS), CROPS, onnx_runner(floats, insightface_blob, "t"))
        assert all(row.passed for row in rows)


def test_the_graph_has_one_uint8_input_and_one_unit_output(tmp_path: Path) -> None:
    session = make_session(serialise(checked(teacher_file(tmp_path / "t.onnx"))), 1)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape) == ("crops", "tensor(uint8)", ["batch", 112, 112, 3])
    assert (given.name, given.type, given.shape) == ("embedding", "tensor(float)", ["batch", DIM])


def test_cast_comes_before_transpose_and_nothing_is_done_twice(tmp_path: Path) -> None:
    def front(preprocess: Preprocess) -> list[str]:
        nodes = uint8_graph(network(), preprocess, DIM).graph.node
        return [node.op_type for node in nodes[: [n.op_type for n in nodes].index("Identity")]]

    assert front(Preprocess(mean=0, std=1)) == ["Cast", "Transpose"]
    assert front(Preprocess(channels="bgr")) == ["Cast", "Sub", "Div", "Gather", "Transpose"]


def test_no_early_node_name_makes_insightface_guess_other_pixels() -> None:
    for preprocess in PREPROCESSES:
        for node in float_graph(network(names="Sub/Mul_minus"), preprocess, DIM).graph.node:
            assert not node.name.startswith(("Sub", "Mul", "_minus", "_mul"))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_rows_have_unit_length_however_short_or_long_the_features(scale: float) -> None:
    tiny = network()
    matrix = next(t for t in tiny.graph.initializer if t.name == "matrix")
    values = (numpy_helper.to_array(matrix) * np.float32(scale)).astype(np.float32)
    matrix.CopyFrom(numpy_helper.from_array(values, "matrix"))
    (rows,) = make_session(serialise(uint8_graph(tiny, Preprocess(), DIM)), 1).run(None, {"crops": CROPS})
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_a_row_of_zeros_stays_zeros_instead_of_nan() -> None:
    zero = network()
    matrix = next(t for t in zero.graph.initializer if t.name == "matrix")
    matrix.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(matrix)), "matrix"))
    (rows,) = make_session(serialise(uint8_graph(zero, Preprocess(), DIM)), 1).run(None, {"crops": CROPS})
    assert not rows.any()


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 18])
def test_older_opsets_are_raised(tmp_path: Path, opset: int) -> None:
    graph = checked(teacher_file(tmp_path / "t.onnx", opset=opset))
    assert (opset_of(graph), graph.ir_version) == (OPSET, IR_VERSION)


def test_newer_opsets_stay(tmp_path: Path) -> None:
    assert opset_of(checked(teacher_file(tmp_path / "t.onnx", opset=20))) == 20


def with_unknown_operator(opset: int) -> onnx.ModelProto:
    """Upsample left the operator set at 10: no converter raises a graph that still uses it past that."""
    model = network(opset=opset)
    model.graph.node.insert(0, helper.make_node("Gone", ["input"], ["gone"]))
    model.graph.node[1].input[0] = "gone"
    return model


def test_what_cannot_be_converted_stays_at_its_opset_or_is_refused(tmp_path: Path) -> None:
    assert opset_of(onnx_network(save(with_unknown_operator(13), tmp_path))) == 13
    with pytest.raises(InputError, match="opset 12 cannot be converted to 18"):
        onnx_network(save(with_unknown_operator(12), tmp_path))


@pytest.mark.parametrize("batch", [1, 4, "None"])
def test_a_fixed_or_oddly_named_batch_is_freed(tmp_path: Path, batch: int | str) -> None:
    checked(teacher_file(tmp_path / "t.onnx", batch=batch))


def test_a_batch_that_cannot_be_freed_is_said_so(tmp_path: Path) -> None:
    model = network(batch=1)
    model.graph.node[-1].output[0] = "row"
    model.graph.node.append(helper.make_node("Gather", ["row", "first"], ["embedding"], axis=0))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "first"))
    with pytest.raises(InputError, match=r"batch of 2.*dynamic batch"):
        checked(save(model, tmp_path))


def test_files_as_old_exporters_wrote_them(tmp_path: Path) -> None:
    """Weights among the inputs (file format 3), no name and no shape for the batch, a second output, our own names."""
    model = network(opset=11)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    model.ir_version = 3
    model.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.output.append(helper.make_tensor_value_info("active", TensorProto.FLOAT, None))
    model.graph.node[0].input[0] = model.graph.input[0].name = "crops"
    assert len(checked(save(model, tmp_path)).graph.output) == 1


def test_branches_optional_inputs_and_functions_survive(tmp_path: Path) -> None:
    model = network()
    output = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    twice = helper.make_graph([helper.make_node("Twice", ["flattened"], ["branch"], domain="my")], "t", [], [output])
    same = helper.make_graph([helper.make_node("Identity", ["flattened"], ["branch"])], "e", [], [output])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "most"))
    model.graph.node.insert(3, helper.make_node("If", ["yes"], ["chosen"], then_branch=twice, else_branch=same))
    model.graph.node.insert(4, helper.make_node("Clip", ["chosen", "", "most"], ["clipped"]))
    model.graph.node[5].input[0] = "clipped"
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    opset = helper.make_opsetid("", 18)
    model.functions.append(helper.make_function("my", "Twice", ["a"], ["b"], body, [opset]))
    model.opset_import.append(helper.make_opsetid("my", 1))
    checked(save(model, tmp_path))


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"x\.onnx: not an ONNX file"):
        onnx_network(tmp_path / "x.onnx")


def student() -> torch.nn.Module:  # type: ignore[name-defined]
    from pkd.toolkit.distill.models.backbones import build

    torch.manual_seed(0)
    return build("mobilefacenet:0.25", DIM).eval()


def test_torch_comes_out_plain_quiet_and_with_batch_normalisation_folded(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    traced = torch_network(student(), 112)
    assert (opset_of(traced), traced.ir_version) == (OPSET, IR_VERSION)
    made_by = {out: node.op_type for node in traced.graph.node for out in node.output}
    after = [made_by[n.input[0]] for n in traced.graph.node if n.op_type == "BatchNormalization"]
    assert "Conv" in made_by.values()
    assert "Conv" not in after
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_one_file_that_names_no_path_of_the_machine_it_was_made_on() -> None:
    model = uint8_graph(torch_network(student(), 112), Preprocess(), DIM)
    data = serialise(model)
    assert data == serialise(uint8_graph(torch_network(student(), 112), Preprocess(), DIM))
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in model.graph.initializer)
    for trace in (b".py", b"/site-packages", str(Path.home()).encode(), sys.prefix.encode()):
        assert trace not in data


def test_train_mode_is_refused_wherever_it_is() -> None:
    with pytest.raises(InputError, match="the network is in train mode"):
        torch_network(student().train(), 112)
    partly = student()
    next(m for m in partly.modules() if isinstance(m, torch.nn.BatchNorm2d)).train()
    with pytest.raises(InputError, match=r"\w+\.\d+.* is in train mode"):
        torch_network(partly, 112)
