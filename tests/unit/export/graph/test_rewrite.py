"""Each rewrite leaves a graph's numbers as they were."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pkd.export.graph.rewrite import decompose_prelu, fold_batch_norm, split_prelu
from pkd.toolkit.encoders.base import make_session
from tests.support.bundle_factory import network

RANDOM = np.random.default_rng(7)


def weights(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(RANDOM.normal(0, 0.5, shape).astype(np.float32), name)


def norm(channels: int, name: str = "norm") -> list[onnx.TensorProto]:
    """Scale, shift, mean and variance of a batch normalisation, none of them trivial."""
    values = [RANDOM.normal(1, 0.3, channels), *RANDOM.normal(0, 0.5, (2, channels)), RANDOM.uniform(0.3, 3, channels)]
    return [numpy_helper.from_array(v.astype(np.float32), f"{name}{i}") for i, v in enumerate(values)]


def graph(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], *, taken: tuple[int, ...], rank: int = 2
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *taken])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        constants,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def normalise(source: str, made: str, name: str = "norm") -> onnx.NodeProto:
    return helper.make_node("BatchNormalization", [source, *(f"{name}{i}" for i in range(4))], [made], epsilon=1e-3)


def counted(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def same(before: onnx.ModelProto, after: onnx.ModelProto, *, batch: int = 3) -> Counter[str]:
    """List the operators of ``after``, once both gave the same numbers."""
    onnx.checker.check_model(after, full_check=True)
    shape = [batch, *(d.dim_value for d in before.graph.input[0].type.tensor_type.shape.dim[1:])]
    name, x = before.graph.input[0].name, RANDOM.normal(size=shape).astype(np.float32)
    one, other = (
        np.concatenate([v.reshape(-1) for v in make_session(m.SerializeToString(), 1).run(None, {name: x})])
        for m in (before, after)
    )
    np.testing.assert_allclose(other, one, atol=1e-6 * max(1.0, float(np.abs(one).max())))
    return counted(after)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("pads", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_after_a_convolution(groups: int, pads: int, bias: bool) -> None:
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    nodes = [
        helper.make_node("Conv", inputs, ["c"], group=groups, pads=[pads] * 4, strides=[2, 2]),
        normalise("c", "y"),
    ]
    model = graph(nodes, [weights("w", 16, 8 // groups, 3, 3), weights("b", 16), *norm(16)], taken=(8, 9, 9), rank=4)
    assert same(model, fold_batch_norm(model)) == {"Conv": 1}


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_before_a_convolution_only_where_nothing_is_padded(groups: int) -> None:
    constants = [weights("w", 16, 8 // groups, 3, 3), weights("b", 16), *norm(8)]

    def model(**options: object) -> onnx.ModelProto:
        nodes = [normalise("x", "n"), helper.make_node("Conv", ["n", "w", "b"], ["y"], group=groups, **options)]  # type: ignore[arg-type]
        return graph(nodes, constants, taken=(8, 5, 5), rank=4)

    assert same(model(), fold_batch_norm(model())) == {"Conv": 1}
    for padded in ({"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}):
        assert same(model(**padded), fold_batch_norm(model(**padded))) == {"Conv": 1, "BatchNormalization": 1}


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("scaled", [1.0, 0.7])
def test_after_a_fully_connected_layer(transposed: int, scaled: float) -> None:
    shape = (6, 10) if transposed else (10, 6)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["g"], transB=transposed, alpha=scaled, beta=1.5),
        normalise("g", "y"),
    ]
    model = graph(nodes, [weights("w", *shape), weights("b", 6), *norm(6)], taken=(10,))
    assert same(model, fold_batch_norm(model)) == {"Gemm": 1}


def test_after_a_product_of_matrices_but_not_of_sequences() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["g"]), normalise("g", "y")]
    rows = graph(nodes, [weights("w", 10, 6), *norm(6)], taken=(10,))
    assert same(rows, fold_batch_norm(rows)) == {"Gemm": 1}
    sequences = graph(nodes, [weights("w", 10, 6), *norm(5)], taken=(5, 10), rank=3)  # channels are not the columns
    assert same(sequences, fold_batch_norm(sequences)) == {"MatMul": 1, "BatchNormalization": 1}


@pytest.mark.parametrize("by", ["Flatten", "Reshape"])
def test_before_a_fully_connected_layer_through_the_flattening(by: str) -> None:
    flat = helper.make_node("Flatten", ["n"], ["f"], axis=1)
    if by == "Reshape":
        flat = helper.make_node("Reshape", ["n", "shape"], ["f"])
    nodes = [normalise("x", "n"), flat, helper.make_node("Gemm", ["f", "w", "b"], ["y"], transB=1)]
    shape = numpy_helper.from_array(np.array([0, 4 * 3 * 2]), "shape")
    model = graph(nodes, [weights("w", 7, 24), weights("b", 7), shape, *norm(4)], taken=(4, 3, 2))
    assert same(model, fold_batch_norm(model)) == {by: 1, "Gemm": 1}


def test_what_another_node_reads_is_not_folded_away() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        normalise("c", "n"),
        helper.make_node("Add", ["c", "n"], ["y"]),
    ]
    model = graph(nodes, [weights("w", 4, 4, 1, 1), *norm(4)], taken=(4, 5, 5), rank=4)
    assert same(model, fold_batch_norm(model))["BatchNormalization"] == 1


def test_shared_weights_are_folded_for_one_reader_only() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        normalise("c", "n"),
        helper.make_node("Conv", ["n", "w"], ["y"]),
    ]
    model = graph(nodes, [weights("w", 4, 4, 1, 1), *norm(4)], taken=(4, 5, 5), rank=4)
    before = model.SerializeToString()
    assert same(model, fold_batch_norm(model)) == {"Conv": 2}
    assert model.SerializeToString() == before, "the argument is left alone"


def test_a_normalisation_that_still_learns_or_is_computed_stays() -> None:
    training = normalise("c", "y")
    training.attribute.append(helper.make_attribute("training_mode", 1))
    training.output.extend(["mean", "variance"])
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), training]
    model = graph(nodes, [weights("w", 4, 4, 1, 1), *norm(4)], taken=(4, 5, 5), rank=4)
    assert counted(fold_batch_norm(model))["BatchNormalization"] == 1


def test_prelu_becomes_four_operators_also_where_its_slope_is_shared() -> None:
    slope = weights("slope", 4, 1, 1)
    nodes = [
        helper.make_node("Identity", ["slope"], ["copy"]),
        helper.make_node("PRelu", ["x", "slope"], ["p"]),
        helper.make_node("PRelu", ["p", "copy"], ["y"]),
    ]
    model = graph(nodes, [slope], taken=(4, 5, 5), rank=4)
    assert same(model, decompose_prelu(model)) == {"Relu": 2, "Mul": 4, "Add": 2}
    assert same(model, split_prelu(model)) == {"Relu": 2, "Clip": 2, "Mul": 2, "Add": 2}


def test_a_slope_that_is_computed_stays() -> None:
    nodes = [helper.make_node("Neg", ["x"], ["s"]), helper.make_node("PRelu", ["x", "s"], ["y"])]
    model = graph(nodes, [], taken=(4,))
    assert same(model, decompose_prelu(model)) == {"Neg": 1, "PRelu": 1}


def test_nothing_that_a_branch_reads_is_folded_or_dropped() -> None:
    output = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    plus = helper.make_graph([helper.make_node("Add", ["c", "w0"], ["branch"])], "t", [], [output])
    same_ = helper.make_graph([helper.make_node("Identity", ["c"], ["branch"])], "e", [], [output])
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        normalise("c", "n"),
        helper.make_node("If", ["yes"], ["i"], then_branch=plus, else_branch=same_),
        helper.make_node("Add", ["i", "n"], ["y"]),
    ]
    yes = numpy_helper.from_array(np.array(True), "yes")
    model = graph(nodes, [weights("w", 4, 4, 1, 1), weights("w0", 1), yes, *norm(4)], taken=(4, 5, 5), rank=4)
    assert same(model, fold_batch_norm(model))["BatchNormalization"] == 1


@pytest.mark.parametrize("spec", ["mobilefacenet:0.25", "mobilefacenet-relu:0.25", "repvit:0.25", "iresnet18"])
def test_whole_backbones_stay_within_a_millionth(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from pkd.export.graph import build as graph
    from pkd.toolkit.distill.models.backbones import build

    torch.manual_seed(0)
    module = build(spec, 128)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.normal_(part.bias, 0, 0.3)
        if isinstance(part, torch.nn.PReLU):
            torch.nn.init.uniform_(part.weight, 0, 0.5)
    folded = graph.torch_network(module.eval(), 112)
    monkeypatch.setattr(graph, "fold_batch_norm", lambda network: network)
    plain = graph.torch_network(module, 112)
    pixels = RANDOM.uniform(-1, 1, (2, 3, 112, 112)).astype(np.float32)
    expected, *made = (
        make_session(model.SerializeToString(), 1).run(None, {"pixels": pixels})[0]
        for model in (plain, folded, decompose_prelu(folded), split_prelu(folded))
    )
    for rows in made:
        unit, reference = (r / np.linalg.norm(r, axis=1, keepdims=True) for r in (rows, expected))
        np.testing.assert_allclose(unit, reference, rtol=0, atol=1e-6)
    assert counted(plain)["BatchNormalization"] > counted(folded)["BatchNormalization"]
    left = counted(folded)["BatchNormalization"]
    assert left == (8 if spec == "iresnet18" else 0), "only those before padded convolutions may stay"


def test_the_factory_network_is_rewritten_too() -> None:
    assert same(network(), decompose_prelu(network()), batch=2)["PRelu"] == 0
