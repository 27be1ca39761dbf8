"""Hold a Core ML program against the graph that it was made from, operator by operator, weights bit by bit.

Only Apple's systems predict with Core ML. The program can be checked anywhere: it is read back from the file, and its
operators are computed by torch with the meaning that the MIL reference gives them. Every one gets the inputs that
onnxruntime has at the same place of the graph, so that none hides behind another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pkd.export.checks.parity import synthetic_crops
from pkd.export.graph.precision_variants import Settings
from pkd.toolkit.core.errors import PkdError
from pkd.toolkit.images.codec import Rgb

if TYPE_CHECKING:
    import torch

Numbers = NDArray[Any]
ALLOWED = {np.dtype(np.float32): 2e-5, np.dtype(np.float16): 4e-3}
"""Largest allowed difference of one operator's output, relative to its largest number: two units in the last place of
float16, and of float32 what the order of a sum of thousands costs."""
# fmt: off
MEANING = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "real_div", "Max": "maximum", "Min": "minimum",
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Sqrt": "sqrt", "Exp": "exp", "Abs": "abs", "Erf": "erf",
    "Conv": "conv", "Gemm": "linear", "MatMul": "matmul", "BatchNormalization": "batch_norm", "PRelu": "prelu",
    "GlobalAveragePool": "reduce_mean", "ReduceMean": "reduce_mean", "ReduceSum": "reduce_sum",
    "MaxPool": "max_pool", "AveragePool": "avg_pool", "Flatten": "reshape", "Reshape": "reshape",
    "Transpose": "transpose", "Gather": "gather", "Softmax": "softmax", "Cast": "cast", "Pow": "square",
    "Clip": "clip", "HardSwish": "mul",
}
# fmt: on
"""Operator of ONNX → operator of MIL that stands for it. A clip with one limit is a maximum or a minimum."""
READERS = {"float32": "read_float_data", "float16": "read_fp16_data", "int32": "read_int32_data"}


class Ref(str):
    """Name a value of the program, where a constant could stand, too."""


@dataclass(frozen=True)
class Step:
    """Hold one operator of a program."""

    kind: str
    name: str
    inputs: Mapping[str, Any]
    """Parameter → a Ref, or the constant itself: an array, a text or a truth value."""
    output: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Program:
    """Hold a program as it was read from its file, and compute it in torch: uint8 N×S×S×3 → float32 N×D."""

    taken: tuple[str, tuple[int, ...]]
    given: str
    steps: tuple[Step, ...]
    version: str
    """Name and version of what computes it here, for the manifest."""

    @classmethod
    def read(cls, model: bytes, weights: bytes) -> Program:
        """Read ``model.mlmodel`` and ``weight.bin``. Raises PkdError for what is no program of one function."""
        import torch
        from coremltools.proto import Model_pb2

        spec = Model_pb2.Model.FromString(model)
        function = spec.mlProgram.functions["main"]
        (block,) = function.block_specializations.values()
        with TemporaryDirectory() as folder:
            path = Path(folder, "weight.bin")
            path.write_bytes(weights)
            known: dict[str, Any] = {}
            steps = []
            for operation in block.operations:
                (output,) = operation.outputs
                if operation.type == "const":
                    known[output.name] = _value(operation.attributes["val"], path)
                    continue
                inputs = {name: _bound(argument, known, path) for name, argument in operation.inputs.items()}
                dtype, shape = _type(output.type.tensorType)
                name = str(operation.attributes["name"].immediateValue.tensor.strings.values[0])
                steps.append(Step(operation.type, name, inputs, output.name, shape, dtype))
        (taken,), (given,) = function.inputs, block.outputs
        version = f"pkd's reading of the program in torch {torch.__version__}; no Core ML"
        return cls((taken.name, _type(taken.type.tensorType)[1]), given, tuple(steps), version)

    def __call__(self, crops: Rgb) -> NDArray[np.float32]:
        """Compute the program on each crop, alone as a device does."""
        return np.concatenate([self._one(crop) for crop in crops])

    def _one(self, crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        values: dict[str, Numbers] = {self.taken[0]: crop[None].astype(np.float32)}
        for step in self.steps:
            values[step.output] = compute(step, values)
        return values[self.given]


def compute(step: Step, values: Mapping[str, Numbers]) -> Numbers:
    """Compute one operator from the values of its inputs, by name. Raises PkdError for one without a meaning here."""
    import torch

    if step.kind not in OPERATORS:
        raise PkdError(f"Core ML: the program has an operator {step.kind} that was not asked for.")
    given = {name: values[value] if isinstance(value, Ref) else value for name, value in step.inputs.items()}
    with torch.inference_mode():
        tensors = {k: torch.from_numpy(np.array(v)) if isinstance(v, np.ndarray) else v for k, v in given.items()}
        made: Numbers = OPERATORS[step.kind](tensors).numpy()
    return made


def compare(program: Program, model: onnx.ModelProto) -> Settings:
    """Compare every operator with its node → figures for the manifest.

    ``model``: for one crop, with the shape of every value. Raises PkdError naming the first operator that is another,
    is at another place, has other weights, or computes something else.
    """
    (crop,) = synthetic_crops(1, program.taken[1][1])
    graph, truth = model.graph, _every_value(model, crop)
    steps = {step.name: step for step in program.steps}
    if len(steps) != len(program.steps):
        raise PkdError("Core ML: two operators of the program have one name.")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values = {program.taken[0]: crop[None].astype(np.float32)}
    shown, operators, weights, largest = 0, 0, 0, dict.fromkeys(ALLOWED, 0.0)
    named: dict[str, str] = {graph.input[0].name: program.taken[0]}
    """Value of the graph → value of the program."""
    for number, node in enumerate(graph.node):
        kind, made = node.op_type, node.output[0]
        if kind == "Constant":
            constants[made] = numpy_helper.to_array(helper.get_attribute_value(node.attribute[0]))
            continue
        if kind in ("Identity", "Dropout") or (kind == "Cast" and node.input[0] == graph.input[0].name):
            source = node.input[0]
            constants |= {made: constants[source]} if source in constants else {}
            named |= {made: named[source]} if source in named else {}
            continue
        own = [step for name, step in steps.items() if name == f"n{number}" or name.startswith(f"n{number}_")]
        last = steps.get(f"n{number}")
        where = f"Core ML: {kind} ({node.name or made})"
        if last is None or last.kind not in (MEANING[kind], *(("maximum", "minimum") if kind == "Clip" else ())):
            raise PkdError(f"{where} is {last.kind if last else 'not there'} in the program.")
        if last.shape != truth[made].shape or last.dtype != truth[made].dtype:
            raise PkdError(f"{where} has {last.dtype} {last.shape}, the graph {truth[made].dtype} {truth[made].shape}.")
        wanted = [named[name] for name in node.input if name in named]
        read = [value for step in own for value in step.inputs.values() if isinstance(value, Ref)]
        inner = {step.output for step in own}
        if sorted(set(read) - inner) != sorted(set(wanted)):
            raise PkdError(
                f"{where} reads {sorted(set(read) - inner)} in the program, {sorted(set(wanted))} in the graph."
            )
        weights += _same_weights(own, [constants[name] for name in node.input if name in constants], where)
        for step in own:
            values[step.output] = compute(step, values)
        found, expected = values[last.output], truth[made]
        if found.shape != expected.shape:
            raise PkdError(f"{where} gives {found.shape} by its settings, the graph {expected.shape}.")
        scale = max(float(np.abs(expected).max()), 1e-6)
        away = float(np.abs(found.astype(np.float64) - expected).max()) / scale
        if not away <= ALLOWED[expected.dtype]:
            raise PkdError(f"{where} is {away:.1e} away from the graph's, {ALLOWED[expected.dtype]:g} is allowed.")
        largest[expected.dtype] = max(largest[expected.dtype], away)
        values[last.output] = expected  # the next one is judged alone
        named[made] = last.output
        shown, operators = shown + len(own), operators + 1
    ports = [step for step in program.steps if step.kind == "identity" and step.output == program.given]
    if shown + len(ports) != len(program.steps) or [s.inputs["x"] for s in ports] != [named[graph.output[0].name]]:
        raise PkdError(f"Core ML: the program has {len(program.steps)} operators, {shown + 1} were asked for.")
    settings: Settings = {
        "mil_operators": len(program.steps),
        "operators_compared": operators,
        "weights_equal_bit_by_bit": weights,
        "largest_difference": float(f"{max(largest.values()):.1e}"),
    }
    return settings


def _same_weights(own: list[Step], constants: list[Numbers], where: str) -> int:
    """Require that the operators hold the node's own constants, bit by bit → how many numbers that are."""
    stored = [v for step in own for v in step.inputs.values() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
    stored = [values for values in stored if values.size > 1]
    count = 0
    for values in stored:
        if not any(_equal(values, constant) for constant in constants):
            raise PkdError(f"{where} has {values.size} weights in the program that are not the graph's.")
        count += values.size
    for constant in constants:
        if constant.dtype.kind == "f" and constant.size > 1 and not any(_equal(v, constant) for v in stored):
            raise PkdError(f"{where} lacks {constant.size} weights of the graph in the program.")
    return count


def _equal(stored: Numbers, constant: Numbers) -> bool:
    """Whether these are the same bits in the same type: as they are, transposed, or one number for every channel."""
    if stored.dtype != constant.dtype:
        return False
    forms = [constant, constant.T, np.broadcast_to(constant.reshape(-1)[:1], stored.shape)]
    sizes = (constant.size, constant.size, stored.size if constant.size == 1 else -1)
    return any(
        size == stored.size and np.ascontiguousarray(form).tobytes() == stored.tobytes()
        for form, size in zip(forms, sizes, strict=True)
    )


def _every_value(model: onnx.ModelProto, crop: NDArray[np.uint8]) -> dict[str, Numbers]:
    """Run the graph in onnxruntime as it stands, and return every value of it by name."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    known = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    del made.graph.output[:]
    for node in made.graph.node:
        made.graph.output.extend(known[name] for name in node.output if name in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {made.graph.input[0].name: crop[None]}), strict=True))


# --- reading


def _type(tensor: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    from coremltools.proto import MIL_pb2

    names = {"FLOAT32": "float32", "FLOAT16": "float16", "INT32": "int32", "BOOL": "bool", "STRING": "str"}
    name = MIL_pb2.DataType.Name(tensor.dataType)
    if name not in names:
        raise PkdError(f"Core ML: the program holds numbers of type {name}, which none was asked for.")
    return np.dtype(names[name]), tuple(int(side.constant.size) for side in tensor.dimensions)


def _value(value: Any, weights: Path) -> Any:
    """Read a constant: numbers as an array, text and truth values as such."""
    from coremltools.libmilstoragepython import _BlobStorageReader

    dtype, shape = _type(value.type.tensorType)
    if value.WhichOneof("value") == "blobFileValue":
        read = getattr(_BlobStorageReader(str(weights)), READERS[dtype.name])
        raw = np.asarray(read(value.blobFileValue.offset))
        if dtype == np.float16 and raw.dtype != np.float16:
            raw = raw.view(np.float16)  # the reader gives the bits
        return raw.reshape(shape)
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    if dtype.kind == "U":
        return str(tensor.strings.values[0])
    if dtype.kind == "b":
        return bool(tensor.bools.values[0])
    numbers = np.frombuffer(tensor.bytes.values, dtype) if kind == "bytes" else getattr(tensor, kind).values
    return np.array(numbers, dtype).reshape(shape)


def _bound(argument: Any, known: Mapping[str, Any], weights: Path) -> Any:
    (binding,) = argument.arguments
    if binding.WhichOneof("binding") == "value":
        return _value(binding.value, weights)
    return known.get(binding.name, Ref(binding.name))


# --- what the operators mean: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html

Given = Mapping[str, Any]


def _padded(given: Given, fill: float) -> torch.Tensor:
    """Pad a picture as stated: MIL names rows before and behind, then columns."""
    from torch.nn.functional import pad

    if given["pad_type"] != "custom":
        raise PkdError(f"Core ML: padding {given['pad_type']} was not asked for.")
    top, bottom, left, right = given["pad"].tolist()
    made: torch.Tensor = pad(given["x"], (left, right, top, bottom), value=fill)
    return made


def _conv(given: Given) -> Any:
    from torch.nn.functional import conv2d

    sides = {"stride": given["strides"].tolist(), "dilation": given["dilations"].tolist()}
    return conv2d(_padded(given, 0.0), given["weight"], given.get("bias"), groups=int(given["groups"]), **sides)


def _linear(given: Given) -> Any:
    from torch.nn.functional import linear

    return linear(given["x"], given["weight"], given.get("bias"))


def _pool(given: Given, most: bool) -> Any:
    import torch
    from torch.nn.functional import avg_pool2d, max_pool2d

    sides = given["kernel_sizes"].tolist(), given["strides"].tolist()
    if most:
        return max_pool2d(_padded(given, -np.inf), *sides)
    means = avg_pool2d(_padded(given, 0.0), *sides)
    if not given["exclude_padding_from_average"]:
        return means
    return means / avg_pool2d(_padded({**given, "x": torch.ones_like(given["x"])}, 0.0), *sides)


def _norm(given: Given) -> Any:
    from torch.nn.functional import batch_norm

    return batch_norm(
        given["x"], given["mean"], given["variance"], given["gamma"], given["beta"], eps=float(given["epsilon"])
    )


def _prelu(given: Given) -> Any:
    from torch.nn.functional import prelu

    return prelu(given["x"], given["alpha"])


def _cast(given: Given) -> Any:
    import torch

    return given["x"].to({"fp32": torch.float32, "fp16": torch.float16}[given["dtype"]])


def _gather(given: Given) -> Any:
    return given["x"].index_select(int(given["axis"]) % given["x"].ndim, given["indices"].reshape(-1))


def _clip(given: Given) -> Any:
    return given["x"].clamp(float(given["alpha"]), float(given["beta"]))


OPERATORS: dict[str, Callable[[Given], Any]] = {
    "add": lambda g: g["x"] + g["y"],
    "sub": lambda g: g["x"] - g["y"],
    "mul": lambda g: g["x"] * g["y"],
    "real_div": lambda g: g["x"] / g["y"],
    "maximum": lambda g: g["x"].maximum(g["y"]),
    "minimum": lambda g: g["x"].minimum(g["y"]),
    "matmul": lambda g: g["x"] @ g["y"],
    "relu": lambda g: g["x"].relu(),
    "sigmoid": lambda g: g["x"].sigmoid(),
    "sigmoid_hard": lambda g: (g["x"] * float(g["alpha"]) + float(g["beta"])).clamp(0, 1),
    "tanh": lambda g: g["x"].tanh(),
    "sqrt": lambda g: g["x"].sqrt(),
    "exp": lambda g: g["x"].exp(),
    "abs": lambda g: g["x"].abs(),
    "erf": lambda g: g["x"].erf(),
    "square": lambda g: g["x"] * g["x"],
    "identity": lambda g: g["x"],
    "reduce_mean": lambda g: g["x"].mean(g["axes"].tolist(), keepdim=bool(g["keep_dims"])),
    "reduce_sum": lambda g: g["x"].sum(g["axes"].tolist(), keepdim=bool(g["keep_dims"])),
    "reshape": lambda g: g["x"].reshape(g["shape"].tolist()),
    "transpose": lambda g: g["x"].permute(g["perm"].tolist()),
    "softmax": lambda g: g["x"].softmax(int(g["axis"])),
    "max_pool": lambda g: _pool(g, True),
    "avg_pool": lambda g: _pool(g, False),
    "batch_norm": _norm,
    "cast": _cast,
    "clip": _clip,
    "conv": _conv,
    "gather": _gather,
    "linear": _linear,
    "prelu": _prelu,
}
