# ruff: noqa: E501 (a table)
"""Every operator that is translated, at each rank that ONNX allows for it, against onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("torch")
import torch
from torch import nn

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.onnx_graph import OnnxModule
from pkd.toolkit.distill.models.onnx_operators import OPERATORS

RANDOM = np.random.default_rng(5)
Array = NDArray[Any]


def f(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return RANDOM.uniform(0.2, 2, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def model(
    kind: str, shape: Sequence[int], constants: Sequence[Array | None], opset: int, outputs: int, **options: Any
) -> onnx.ModelProto:
    """One node whose variable input ``x`` comes first, unless a constant named None takes another place."""
    names = ["x" if isinstance(c, str) else "" if c is None else f"c{i}" for i, c in enumerate(["x", *constants])]
    tensors = [numpy_helper.from_array(c, f"c{i + 1}") for i, c in enumerate(constants) if c is not None]
    given = [f"y{i}" for i in range(outputs)]
    nodes = [helper.make_node(kind, names, given, **options)]
    if outputs > 1:
        nodes.append(helper.make_node("Concat", given, ["all"], axis=1))
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("all" if outputs > 1 else "y0", TensorProto.FLOAT, None)],
        tensors,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 8
    return made


def norm(channels: int) -> list[Array]:
    return [f(channels), f(channels), f(channels), positive(channels)]


Case = tuple[str, tuple[int, ...], list[Array | None], dict[str, Any]]
CASES: list[Case] = [
    *(("BatchNormalization", (4, 3, *size), norm(3), {"epsilon": 0.01}) for size in [(), (5,), (5, 6), (3, 4, 5)]),  # type: ignore[list-item]
    *(  # type: ignore[list-item]
        ("Conv", (2, 4, *[9] * n), [f(6, 2, *[3] * n), f(6)], {"group": 2, "strides": [2] * n, "dilations": [2] * n})
        for n in (1, 2, 3)
    ),
    ("Conv", (2, 4, 9, 10), [f(4, 1, 3, 3)], {"group": 4, "pads": [1, 0, 2, 1]}),
    ("Conv", (2, 4, 9, 10), [f(6, 4, 3, 2), f(6)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", (2, 4, 9, 10), [f(6, 4, 4, 2), f(6)], {"auto_pad": "SAME_LOWER"}),
    ("Conv", (2, 4, 9, 10), [f(6, 4, 3, 2), f(6)], {"auto_pad": "VALID"}),
    *(("PRelu", (2, 3, 4, 5), [slope], {}) for slope in (f(3, 1, 1), f(1, 3, 1, 1), f(1), f(5), f(3, 4, 5), f(1, 4, 1))),  # type: ignore[list-item]
    *(("PRelu", shape, [slope], {}) for shape, slope in (((2, 3), f(3)), ((2, 3, 4), f(3, 1)), ((2, 3), f(1)))),  # type: ignore[list-item]
    ("PRelu", (2, 3, 4, 5, 6), [f(3, 1, 1, 1)], {}),
    ("Gemm", (2, 3), [f(3, 4), f(4)], {"alpha": 0.5, "beta": 2.0}),
    ("Gemm", (2, 3), [f(4, 3), f(1, 4)], {"transB": 1}),
    ("Gemm", (2, 3), [f(4, 3), f(1)], {"transB": 1, "alpha": 3.0}),
    ("Gemm", (2, 3), [f(4, 3)], {"transB": 1}),
    ("Gemm", (2, 3), [f(3, 4), f(2, 4)], {"beta": 0.25}),
    *(("MatMul", (2, *size, 3), [f(3, 4)], {}) for size in [(), (5,), (5, 6)]),  # type: ignore[list-item]
    ("MatMul", (2, 5, 6, 3), [f(5, 3, 4)], {}),
    *(("Flatten", (2, *size), [], {}) for size in [(3,), (3, 4), (3, 4, 5)]),
    ("Flatten", (2, 3, 1), [], {"axis": -2}),
    ("Reshape", (2, 3, 4), [ints(0, -1)], {}),
    ("Reshape", (2, 3, 4), [ints(2, 12)], {}),
    ("Reshape", (2, 12), [ints(-1, 3, 4)], {}),
    ("Reshape", (2, 3, 4, 5), [ints(0, 0, 20)], {}),
    ("Squeeze", (2, 3, 1, 1), [], {}),
    ("Squeeze", (2, 3, 1, 1), [ints(2, -1)], {}),
    ("Squeeze", (2, 3, 1), [ints(2)], {}),
    ("Unsqueeze", (2, 3), [ints(2, -1)], {}),
    *((kind, (2, 3, *size), [], {}) for kind in ("GlobalAveragePool", "GlobalMaxPool") for size in [(4,), (4, 5), (2, 3, 4)]),
    *(
        (kind, (2, 3, *[7] * n), [], {"kernel_shape": [3] * n, "strides": [2] * n, "pads": [1] * 2 * n})
        for kind in ("AveragePool", "MaxPool")
        for n in (1, 2, 3)
    ),
    ("AveragePool", (2, 3, 7, 8), [], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 2], "count_include_pad": 1}),
    ("AveragePool", (2, 3, 7, 8), [], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 2]}),
    ("AveragePool", (2, 3, 7, 8), [], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("MaxPool", (2, 3, 7, 8), [], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 2], "strides": [2, 1]}),
    ("MaxPool", (2, 3, 8, 8), [], {"kernel_shape": [3, 3], "ceil_mode": 1, "strides": [2, 2]}),
    ("MaxPool", (2, 3, 9, 9), [], {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    *(("Clip", shape, [np.float32(0), np.float32(6)], {}) for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5))),
    ("Clip", (2, 3), [None, np.float32(0.5)], {}),
    ("Clip", (2, 3), [], {}),
    *(
        (kind, shape, [], {})
        for kind in (
            "Abs", "Elu", "Erf", "Exp", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Neg", "Reciprocal",
            "Relu", "Sigmoid", "Tanh", "Dropout",
        )
        for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5))
    ),
    ("LeakyRelu", (2, 3), [], {"alpha": 0.3}),
    ("Elu", (2, 3), [], {"alpha": 0.3}),
    ("HardSigmoid", (2, 3), [], {"alpha": 1 / 6, "beta": 0.4}),
    *((kind, (2, 3, 4, 5), [c], {}) for kind in ("Add", "Sub", "Mul", "Div") for c in (positive(3, 1, 1), positive(1), positive(5))),  # type: ignore[list-item]
    *((kind, (2, 3), [positive(3)], {}) for kind in ("Add", "Sub", "Mul", "Div")),  # type: ignore[list-item]
    ("Pow", (2, 3), [np.float32(2)], {}),
    ("Pow", (2, 3), [np.float32(3)], {}),
    ("Max", (2, 3), [np.float32(0.1)], {}),
    ("Min", (2, 3), [np.float32(0.1)], {}),
    ("Max", (2, 3), [f(3)], {}),
    ("Min", (2, 3, 4), [f(3, 1)], {}),
    ("Pad", (2, 3), [ints(0, 1, 0, 2)], {}),
    ("Pad", (2, 3, 4), [ints(0, 0, 1, 0, 0, 2), np.float32(1.5)], {}),
    ("Pad", (2, 3, 4, 5), [ints(0, 1, 1, 2, 0, 0, 2, 1)], {}),
    ("Pad", (2, 3, 4, 5), [ints(0, 0, 1, 2, 0, 0, 2, 1)], {"mode": "reflect"}),
    ("Pad", (2, 3, 4, 5), [ints(0, 0, 1, 2, 0, 0, 2, 1)], {"mode": "edge"}),
    ("Slice", (2, 6, 4), [ints(1), ints(5), ints(1), ints(2)], {}),
    ("Slice", (2, 6, 4), [ints(0, -3), ints(2**62, 6), ints(0, 1)], {}),
    ("Gather", (2, 6, 4), [ints(2, 1, 0)], {"axis": 1}),
    ("Gather", (2, 6, 4), [ints(5, 3, 1, 4, -6)], {"axis": -2}),
    ("Gather", (2, 6, 4), [np.array(3)], {"axis": 1}),
    *(("Transpose", (2, 3, 4, 5), [], {"perm": perm}) for perm in ([0, 2, 3, 1], [0, 3, 1, 2])),
    *(
        (kind, shape, [], {"axes": axes, "keepdims": keep})
        for kind in ("ReduceMean", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceSumSquare")
        for shape, axes in (((2, 3), [1]), ((2, 3, 4, 5), [2, 3]), ((2, 3, 4), [-1]))
        for keep in (0, 1)
    ),
    *(("ReduceSum", (2, 3, 4), [axes], {"keepdims": 0}) for axes in (ints(1), ints(1, 2))),  # type: ignore[list-item]
    *(("LpNormalization", shape, [], {"axis": axis, "p": p}) for shape, axis in (((2, 3), 1), ((2, 3, 4), -1)) for p in (1, 2)),
    ("LayerNormalization", (2, 3, 4), [f(4), f(4)], {"axis": -1}),
    ("LayerNormalization", (2, 3, 4), [f(4)], {"axis": 2, "epsilon": 0.1}),
    *(("Softmax", shape, [], {"axis": -1}) for shape in ((2, 3), (2, 3, 4))),
]  # fmt: skip
OLD: list[tuple[int, Case]] = [
    (10, ("Clip", (2, 3, 4), [], {"min": -0.5, "max": 0.5})),
    (10, ("Pad", (2, 3, 4, 5), [], {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 2.0})),
    (9, ("Slice", (2, 6, 4), [], {"starts": [1], "ends": [5], "axes": [1]})),
    (11, ("Squeeze", (2, 3, 1, 1), [], {"axes": [2, 3]})),
    (11, ("Unsqueeze", (2, 3), [], {"axes": [2]})),
    (11, ("ReduceSum", (2, 3, 4), [], {"axes": [2]})),
    (12, ("Softmax", (2, 3), [], {})),
    (8, ("BatchNormalization", (4, 3), norm(3), {"momentum": 0.9})),  # type: ignore[list-item]
    (9, ("Dropout", (2, 3), [], {"ratio": 0.4})),
    (18, ("Pad", (2, 3, 4, 5), [ints(1, 2), None, ints(-1)], {})),
    (18, ("ReduceMean", (2, 3, 4), [ints(2)], {"keepdims": 0})),
    (20, ("Gelu", (2, 3), [], {})),
    (20, ("Gelu", (2, 3), [], {"approximate": "tanh"})),
]


def both(made: onnx.ModelProto, shape: Sequence[int]) -> tuple[Array, Array, OnnxModule]:
    x = f(*shape)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(made.SerializeToString(), options)
    network = OnnxModule(made, OPERATORS).eval()
    with torch.no_grad():
        return session.run(None, {"x": x})[0], network(torch.from_numpy(x)).numpy(), network


@pytest.mark.parametrize(("opset", "case"), [*((17, case) for case in CASES), *OLD], ids=lambda v: str(v)[:60])
def test_equals_onnxruntime(opset: int, case: Case) -> None:
    kind, shape, constants, options = case
    expected, found, _ = both(
        model(kind, shape, [np.asarray(c) if c is not None else None for c in constants], opset, 1, **options), shape
    )
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("opset", "sizes", "options"), [(17, [ints(1, 5)], {}), (11, [], {"split": [2, 4]}), (17, [], {})]
)
def test_split(opset: int, sizes: list[Array], options: dict[str, Any]) -> None:
    expected, found, _ = both(model("Split", (2, 6, 3), sizes, opset, 2, axis=1, **options), (2, 6, 3))
    np.testing.assert_array_equal(found, expected)


def test_every_operator_is_tested() -> None:
    assert {case[0] for case in [*CASES, *(case for _, case in OLD)]} | {"Split", "Concat", "Cast", "Sqrt"} == {
        *OPERATORS
    }


def test_weights_are_parameters_and_single_numbers_are_not() -> None:
    for kind, shape, constants, count in (("Conv", (2, 4, 5, 5), [f(6, 4, 3, 3), f(6)], 222), ("Mul", (2, 3), [f(1)], 0),
                                          ("Add", (2, 3), [f(3)], 3), ("PRelu", (2, 3), [f(3)], 3)):  # fmt: skip
        _, _, network = both(model(kind, shape, constants, 17, 1), shape)
        assert sum(p.numel() for p in network.parameters()) == count
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    ("kind", "shape", "constants", "options", "said"),
    [
        ("Gemm", (3, 2), [f(3, 4)], {"transA": 1}, "Gemm of this graph: only behind the batch"),
        ("Transpose", (2, 3), [], {}, "Transpose of this graph: only behind the batch"),
        ("Reshape", (2, 3), [ints(6)], {}, "Reshape of this graph: only of what is behind the batch"),
        ("Reshape", (2, 4), [ints(4, 2)], {}, "Reshape of this graph: only of what is behind the batch"),
        ("BatchNormalization", (4, 3), norm(3), {"training_mode": 1}, "only with stored statistics"),
        ("ReduceMean", (2, 3), [], {}, "ReduceMean of this graph: only behind the batch"),
        ("CumSum", (2, 3), [np.array(1)], {}, "pkd does not translate CumSum"),
    ],
)
def test_refused_by_name(
    kind: str, shape: tuple[int, ...], constants: list[Array], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        OnnxModule(model(kind, shape, constants, 17, 1, **options), OPERATORS)
