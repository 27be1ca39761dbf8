"""Translate an ONNX graph into a torch network, node by node, with the weights as parameters.

Operators and their uses are listed in ``onnx_operators.OPERATORS``; whatever else a graph has is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference
from torch import Tensor, nn

from pkd.toolkit.core.errors import InputError

Numbers = NDArray[Any]
STEP = "step"
"""Name of a node's module in the network, before its number."""


class UnlikeTorch(Exception):
    """Raised for a use of an operator that is not translated; the message completes "only …"."""


class Node:
    """Show a node of a graph together with what is known of its inputs beforehand: constants, shapes, attributes."""

    def __init__(
        self, proto: onnx.NodeProto, constants: Mapping[str, Numbers], shapes: Mapping[str, tuple[int, ...]], opset: int
    ) -> None:
        self.kind: str = proto.op_type
        self.inputs = tuple(proto.input)
        self.outputs = tuple(proto.output)
        self.options: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        self.opset = opset
        self._constants = constants
        self._shapes = shapes

    def constant(self, i: int) -> Numbers | None:
        """Return the values of input ``i`` where they are known beforehand."""
        return self._constants.get(self.inputs[i]) if i < len(self.inputs) else None

    def given(self, i: int) -> bool:
        """Tell whether there is an input ``i``; trailing ones may be absent and others left empty."""
        return i < len(self.inputs) and bool(self.inputs[i])

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the inputs that are only known when the network runs, in order."""
        return tuple(name for name in self.inputs if name and name not in self._constants)

    def setting(self, name: str, i: int, default: Any = None) -> Any:
        """Return what older operator sets keep in the attribute ``name`` and newer ones in the input ``i``."""
        if self.given(i):
            values = self.constant(i)
            need(values is not None, f"with a constant {name}")
            assert values is not None
            return values.tolist()
        return self.options.get(name, default)

    def shape(self, i: int = 0) -> tuple[int, ...]:
        """Return the inferred shape of input ``i``, 0 for a size that is not known, such as the batch."""
        values = self.constant(i)
        if values is not None:
            return values.shape
        found = self._shapes.get(self.inputs[i])
        need(found is not None, "of tensors whose shape can be inferred")
        assert found is not None
        return found

    def axis(self, value: int, rank: int | None = None) -> int:
        """Return an axis counted from the front. Raises UnlikeTorch for that of the batch."""
        axis = value % (rank or len(self.shape()))
        need(axis > 0, "behind the batch")
        return axis


Translate = Callable[[Node], nn.Module]
"""A node → the module that takes its ``variables`` and gives its output, or a tuple of several."""


def need(met: bool, otherwise: str) -> None:
    """Raise UnlikeTorch with "only ``otherwise``" unless ``met``."""
    if not met:
        raise UnlikeTorch(f"only {otherwise}")


class OnnxModule(nn.Module):
    """Run a graph with one input and one output as a torch network, in the order of its nodes.

    ``step_names``: the modules in the order in which they run, each named for its place: the network's layers.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        operators: Mapping[str, Translate],
        *,
        remedy: str = "Export the model in another form, or train a backbone of pkd's own.",
    ) -> None:
        """Translate ``model``. Raises InputError for an operator, or a use of one, that ``operators`` does not know.

        ``remedy``: the sentence with which the error ends.
        """
        super().__init__()
        graph = model.graph
        constants = constants_of(model)
        shapes = shapes_of(model)
        opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
        (self._taken,) = (value.name for value in graph.input if value.name not in constants)
        self._given = graph.output[0].name
        self._steps: list[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = []
        nodes = [node for node in graph.node if not all(name in constants for name in node.output)]
        last = {name: i for i, node in enumerate(nodes) for name in node.input}
        for i, proto in enumerate(nodes):
            node = Node(proto, constants, shapes, opset)
            known = proto.domain in ("", "ai.onnx") and node.kind in operators
            if not known:
                raise InputError(f"pkd does not translate {node.kind} of this graph. {remedy}")
            try:
                module = operators[node.kind](node)
            except UnlikeTorch as error:
                raise InputError(f"{node.kind} of this graph: {error} is translated. {remedy}") from None
            name = f"{STEP}{i}"
            self.add_module(name, module)
            dead = tuple({v for v in node.variables if last[v] == i and v != self._given})
            self._steps.append((name, node.variables, tuple(n for n in node.outputs if n), dead))
        self.shapes = {name: shapes.get(outputs[0]) for name, _, outputs, _ in self._steps}

    @property
    def step_names(self) -> tuple[str, ...]:
        """Names of the modules in the order in which they run."""
        return tuple(name for name, *_ in self._steps)

    def followers(self, name: str) -> list[str]:
        """Name the steps that read what the step ``name`` gives."""
        outputs = next(outputs for step, _, outputs, _ in self._steps if step == name)
        return [step for step, inputs, *_ in self._steps if set(inputs) & set(outputs)]

    def cuts(self) -> dict[str, str]:
        """Find the steps after which the rest of the network needs only what they give: step → its tensor's name."""
        found: dict[str, str] = {}
        needed = {self._given}
        for name, inputs, outputs, _ in reversed(self._steps):
            if needed == set(outputs[:1]):
                found[name] = outputs[0]
            needed = (needed - set(outputs)) | set(inputs)
        return dict(reversed(found.items()))

    def forward(self, pixels: Tensor, after: str | None = None) -> Tensor:
        """Pass ``pixels`` through the graph's nodes in their order.

        ``after``: the name of a step at which the network can be cut; ``pixels`` is then what that step gives, and
        only the steps behind it run.
        """
        first = 0 if after is None else self.step_names.index(after) + 1
        values: dict[str, Any] = {self._taken if after is None else self._steps[first - 1][2][0]: pixels}
        for name, inputs, outputs, dead in self._steps[first:]:
            made = getattr(self, name)(*(values[i] for i in inputs))
            if len(outputs) == 1:
                values[outputs[0]] = made
            else:
                values.update(zip(outputs, made, strict=True))
            for gone in dead:
                del values[gone]
        result: Tensor = values[self._given]
        return result


class Function(nn.Module):
    """Apply a function of tensors without weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        """Return ``function(*inputs)``."""
        return self.function(*inputs)


class Bound(nn.Module):
    """Apply a function of all inputs of a node, those that are constants in it being kept here.

    Vectors and larger arrays of floats become parameters where ``trained``; the rest stays as it is.
    """

    def __init__(self, node: Node, function: Callable[..., Tensor], *, trained: bool = True) -> None:
        super().__init__()
        self.function = function
        self._places: list[str | None] = []
        for i, name in enumerate(node.inputs):
            values = node.constant(i)
            if values is None:
                self._places.append("" if name else None)
                continue
            tensor = torch.from_numpy(np.array(values))
            if trained and tensor.is_floating_point() and tensor.numel() > 1:
                self.register_parameter(f"input{i}", nn.Parameter(tensor))
            else:
                self.register_buffer(f"input{i}", tensor)
            self._places.append(f"input{i}")

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the function of ``inputs`` and the constants, each in its place."""
        given = iter(inputs)
        return self.function(
            *(None if place is None else getattr(self, place) if place else next(given) for place in self._places)
        )


def constants_of(model: onnx.ModelProto) -> dict[str, Numbers]:
    """Return the arrays that are known before the graph runs, by name."""
    constants: dict[str, Numbers] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = helper.get_attribute_value(node.attribute[0])
            is_tensor = isinstance(value, onnx.TensorProto)
            made = numpy_helper.to_array(value) if is_tensor else np.array(value)
            constants[node.output[0]] = made.astype(np.float32) if made.dtype == np.float64 else made
        elif node.op_type == "Identity" and node.input[0] in constants:  # torch stores equal weights once
            constants[node.output[0]] = constants[node.input[0]]
    return constants


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Infer the shapes of a graph's tensors, by name; 0 for a size that is not known."""
    try:
        graph = shape_inference.infer_shapes(model).graph
    except Exception:  # unknown operators: they are refused by name when their turn comes
        graph = model.graph
    values = [v for v in [*graph.input, *graph.value_info, *graph.output] if v.type.tensor_type.HasField("shape")]
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
