"""Build Core ML targets, for Apple's devices: ``.mlpackage``, an ML program in float32 or float16.

pkd translates the ONNX graph operator by operator into MIL, with none of coremltools' optimisations, so that each
operator of the program can be held against one of the graph's (``coreml_check``). Core ML itself computes on Apple's
systems only. Whatever is written here was therefore never measured in Core ML: the target is an encoder of its own,
which no certificate covers, and the conformance kit is how its user proves it on the device.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from pkd.export.formats.base import Built, Format, Tell, need_packages
from pkd.export.formats.coreml_check import Program, compare
from pkd.export.graph.precision_variants import GraphForm, Variant
from pkd.export.options import BuildOptions
from pkd.toolkit.core.errors import InputError, PkdError, plain_reason

Numbers = NDArray[Any]
PACKAGE = "encoder.mlpackage"
MODEL, WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights/weight.bin"
NOT_MEASURED = "Core ML: it runs on Apple's systems only; prove it there with the conformance kit"
BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "real_div", "Max": "maximum", "Min": "minimum"}
UNARY = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Sqrt": "sqrt", "Exp": "exp", "Abs": "abs", "Erf": "erf"}
DTYPES = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}
MODE = {"fp32": np.float32, "fp16": np.float16}


def to_coreml(model: bytes) -> dict[str, bytes]:
    """Convert the ONNX of ``uint8_graph``, in float32 or float16, to the files of ``encoder.mlpackage``, by name.

    The program takes ``crops``, float32 1×S×S×3 with the values 0 to 255, and gives ``embedding``, float32 1×D. It asks
    for iOS 15 or macOS 12. Raises InputError naming an operator, or a use of one, that is not translated.
    """
    with quiet():
        import coremltools as ct

        program = _Translation(fixed(model).graph).program()
        try:
            made = ct.convert(
                program,
                convert_to="mlprogram",
                compute_precision=ct.precision.FLOAT32,  # leaves float16 where the graph has it, and adds none
                minimum_deployment_target=ct.target.iOS15,
                pass_pipeline=ct.PassPipeline.EMPTY,
                skip_model_load=True,
            )
            with TemporaryDirectory() as folder:
                root = Path(folder, PACKAGE)
                made.save(str(root))
                paths = sorted(path for path in root.rglob("*") if path.is_file())
                files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
        except PkdError:
            raise
        except Exception as error:  # coremltools' errors share no base class
            raise InputError(
                f"coremltools {version('coremltools')} cannot write the program: {plain_reason(error)} "
                "Leave --format coreml out."
            ) from None
    files = _reproducible(files)
    return {f"{PACKAGE}/{name}": data for name, data in files.items()}


def fixed(model: bytes) -> onnx.ModelProto:
    """Read the graph of ``uint8_graph`` for one crop, with the shape and the type of every value."""
    graph = onnx.load_model_from_string(model)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return shape_inference.infer_shapes(graph, data_prop=True)


def _reproducible(files: dict[str, bytes]) -> dict[str, bytes]:
    """Order protobuf's maps, and replace the package's random identifiers by such as the content gives."""
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model.FromString(files[f"Data/{MODEL}"])
    files[f"Data/{MODEL}"] = model.SerializeToString(deterministic=True)
    manifest = json.loads(files["Manifest.json"])
    made = {id: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])) for id, entry in manifest["itemInfoEntries"].items()}
    manifest["itemInfoEntries"] = {made[id]: entry for id, entry in manifest["itemInfoEntries"].items()}
    manifest["rootModelIdentifier"] = made[manifest["rootModelIdentifier"]]
    first = {"Manifest.json": (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()}
    return first | {name: data for name, data in files.items() if name != "Manifest.json"}


class _Translation:
    """Write a graph as a MIL program. The operator of node n is called ``n<n>``."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        from coremltools.converters.mil import Builder

        self.graph, self.build = graph, Builder
        self.constants: dict[str, Numbers] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        values = [*graph.input, *graph.value_info, *graph.output]
        self.shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
        self.held: dict[str, Any] = {}

    def program(self) -> Any:
        import coremltools as ct

        (taken,), (given,) = self.graph.input, self.graph.output
        shape = (1, *self.shapes[taken.name][1:])

        def body(crops: Any) -> Any:
            self.held[taken.name] = crops
            for number, node in enumerate(self.graph.node):
                try:
                    self._node(node, f"n{number}")
                except KeyError as missing:  # a constant, where the translation knows values alone, or the reverse
                    raise unknown(node, f"of {missing} is not translated") from None
            return self.build.identity(x=self.held[given.name], name=given.name)

        # the builder names inputs by the parameters of the function
        decorate = self.build.program(input_specs=[self.build.TensorSpec(shape=shape)], opset_version=ct.target.iOS15)
        return decorate(body)

    def _node(self, node: onnx.NodeProto, name: str) -> None:
        kind, options = node.op_type, {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if kind == "Constant":
            self.constants[node.output[0]] = numpy_helper.to_array(options["value"])
        elif kind in ("Identity", "Dropout"):
            source, made = node.input[0], node.output[0]
            held: dict[str, Any] = self.constants if source in self.constants else self.held
            held[made] = held[source]
        elif kind not in OPERATORS:
            raise unknown(node, "is not translated")
        elif len(node.output) != 1:
            raise unknown(node, "is translated with one output only")
        else:
            self.held[node.output[0]] = OPERATORS[kind](self, node, options, name)

    # --- what operators read

    def value(self, name: str) -> Any:
        """Return a value of the program, or a constant."""
        return self.constants[name] if name in self.constants else self.held[name]

    def fixed(self, node: onnx.NodeProto, i: int) -> Numbers:
        if i >= len(node.input) or node.input[i] not in self.constants:
            raise unknown(node, f"is translated with a constant input {i} only")
        return self.constants[node.input[i]]

    def optional(self, node: onnx.NodeProto, i: int) -> Numbers | None:
        return self.fixed(node, i) if i < len(node.input) and node.input[i] else None

    # --- operators

    def cast(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        """Cast to float32 or float16. That of the crops is none: the program takes float32."""
        wanted = DTYPES.get(options["to"])
        if wanted is None:
            raise unknown(node, "is translated to float32 and float16 only")
        if node.input[0] == self.graph.input[0].name:
            return self.held[node.input[0]]
        return self.build.cast(x=self.value(node.input[0]), dtype=wanted, name=name)

    def binary(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        if len(node.input) != 2:
            raise unknown(node, "is translated of two values only")
        x, y = map(self.value, node.input)
        return getattr(self.build, BINARY[node.op_type])(x=x, y=y, name=name)

    def unary(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        return getattr(self.build, UNARY[node.op_type])(x=self.value(node.input[0]), name=name)

    def power(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        if np.any(self.fixed(node, 1) != 2):
            raise unknown(node, "is translated as a square only")
        return self.build.square(x=self.value(node.input[0]), name=name)

    def clip(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        low, high = (options[key] if key in options else self.optional(node, i) for i, key in ((1, "min"), (2, "max")))
        x = self.value(node.input[0])
        dtype = MODE["fp16" if "16" in str(x.dtype) else "fp32"]
        if low is None or high is None:
            end = high if low is None else low
            if end is None:
                raise unknown(node, "has no limit")
            limit = self.build.minimum if low is None else self.build.maximum
            return limit(x=x, y=dtype(end), name=name)
        return self.build.clip(x=x, alpha=dtype(low), beta=dtype(high), name=name)

    def prelu(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        shape, slope = self.shapes[node.input[0]], self.fixed(node, 1)
        if len(shape) != 4 or slope.size not in (1, shape[1]) or slope.ndim == 4:
            raise unknown(node, "is translated with one slope, or one a channel, of pictures only")
        alpha = np.ascontiguousarray(np.broadcast_to(slope.reshape(-1), (shape[1],)))
        return self.build.prelu(x=self.value(node.input[0]), alpha=alpha, name=name)

    def norm(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        if len(self.shapes[node.input[0]]) != 4:
            raise unknown(node, "is translated of pictures only")
        gamma, beta, mean, variance = (self.fixed(node, i) for i in range(1, 5))
        values = {"gamma": gamma, "beta": beta, "mean": mean, "variance": variance}
        epsilon = gamma.dtype.type(options.get("epsilon", 1e-5))
        return self.build.batch_norm(x=self.value(node.input[0]), **values, epsilon=epsilon, name=name)

    def conv(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        weight, bias = self.fixed(node, 1), self.optional(node, 2)
        if weight.ndim != 4 or options.get("auto_pad", b"NOTSET") != b"NOTSET":
            raise unknown(node, "is translated for pictures with stated padding only")
        values = {} if bias is None else {"bias": bias}
        return self.build.conv(
            x=self.value(node.input[0]),
            weight=weight,
            **values,
            strides=options.get("strides", [1, 1]),
            dilations=options.get("dilations", [1, 1]),
            groups=options.get("group", 1),
            **_padding(options),
            name=name,
        )

    def dense(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        usual = not options.get("transA") and options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0
        weight, bias = self.fixed(node, 1), self.optional(node, 2)
        rows = weight if options.get("transB") else np.ascontiguousarray(weight.T)
        if weight.ndim != 2 or not usual or (bias is not None and bias.size != len(rows)):
            raise unknown(node, "is translated as a linear layer only")
        values = {} if bias is None else {"bias": bias.reshape(-1)}
        return self.build.linear(x=self.value(node.input[0]), weight=rows, **values, name=name)

    def product(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        x, y = map(self.value, node.input)
        return self.build.matmul(x=x, y=y, name=name)

    def pool(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        plain = not options.get("ceil_mode") and set(options.get("dilations", [1])) == {1}
        kernel = options["kernel_shape"]
        if len(kernel) != 2 or not plain or options.get("auto_pad", b"NOTSET") != b"NOTSET":
            raise unknown(node, "is translated for pictures, with stated padding and without dilation only")
        values = {"kernel_sizes": kernel, "strides": options.get("strides", [1, 1]), **_padding(options)}
        x = self.value(node.input[0])
        if node.op_type == "MaxPool":
            return self.build.max_pool(x=x, **values, name=name)
        excluded = not options.get("count_include_pad", 0)
        return self.build.avg_pool(x=x, **values, exclude_padding_from_average=excluded, name=name)

    def reduce(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        axes, keep = [2, 3], True
        if node.op_type != "GlobalAveragePool":
            stated = self.optional(node, 1)
            found = options.get("axes") if stated is None else stated.tolist()
            if not found:
                raise unknown(node, "is translated with stated axes only")
            axes, keep = [int(axis) for axis in found], bool(options.get("keepdims", 1))
        make = self.build.reduce_sum if node.op_type == "ReduceSum" else self.build.reduce_mean
        return make(x=self.value(node.input[0]), axes=axes, keep_dims=keep, name=name)

    def reshape(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        shape = self.shapes.get(node.output[0], ())
        if not shape or not all(shape):
            raise unknown(node, "has an output whose shape depends on values")
        return self.build.reshape(x=self.value(node.input[0]), shape=shape, name=name)

    def transpose(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        rank = len(self.shapes[node.input[0]])
        return self.build.transpose(x=self.value(node.input[0]), perm=options.get("perm", range(rank)[::-1]), name=name)

    def gather(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        chosen = self.fixed(node, 1).astype(np.int32)
        return self.build.gather(x=self.value(node.input[0]), indices=chosen, axis=options.get("axis", 0), name=name)

    def hard_swish(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        x = self.value(node.input[0])
        dtype = MODE["fp16" if "16" in str(x.dtype) else "fp32"]
        gate = self.build.sigmoid_hard(x=x, alpha=dtype(1 / 6), beta=dtype(0.5), name=f"{name}_gate")
        return self.build.mul(x=x, y=gate, name=name)

    def softmax(self, node: onnx.NodeProto, options: dict[str, Any], name: str) -> Any:
        return self.build.softmax(x=self.value(node.input[0]), axis=options.get("axis", -1), name=name)


def _padding(options: dict[str, Any]) -> dict[str, Any]:
    top, left, bottom, right = options.get("pads", [0] * 4)
    return {"pad_type": "custom", "pad": [top, bottom, left, right]}


OPERATORS: dict[str, Callable[[_Translation, onnx.NodeProto, dict[str, Any], str], Any]] = {
    **dict.fromkeys(BINARY, _Translation.binary),
    **dict.fromkeys(UNARY, _Translation.unary),
    **dict.fromkeys(["MaxPool", "AveragePool"], _Translation.pool),
    **dict.fromkeys(["GlobalAveragePool", "ReduceMean", "ReduceSum"], _Translation.reduce),
    **dict.fromkeys(["Flatten", "Reshape"], _Translation.reshape),
    "Cast": _Translation.cast,
    "Pow": _Translation.power,
    "Clip": _Translation.clip,
    "PRelu": _Translation.prelu,
    "BatchNormalization": _Translation.norm,
    "Conv": _Translation.conv,
    "Gemm": _Translation.dense,
    "MatMul": _Translation.product,
    "HardSwish": _Translation.hard_swish,
    "Softmax": _Translation.softmax,
    "Transpose": _Translation.transpose,
    "Gather": _Translation.gather,
}


def unknown(node: onnx.NodeProto, why: str) -> InputError:
    """Make the refusal of an operator."""
    return InputError(f"Core ML: {node.op_type} ({node.name or node.output[0]}) {why}. Leave --format coreml out.")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what coremltools says of the system it is on, of torch's version, and of its progress."""
    before, stderr = logging.root.manager.disable, sys.stderr
    logging.disable(logging.CRITICAL)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.stderr = nowhere
            yield
    finally:
        sys.stderr = stderr
        logging.disable(before)


def _build(graph: Variant, precision: str, options: BuildOptions, tell: Tell) -> Built:
    tell("translating into MIL")
    files = to_coreml(graph.data)
    tell("comparing operator by operator")
    program = Program.read(files[f"{PACKAGE}/Data/{MODEL}"], files.get(f"{PACKAGE}/Data/{WEIGHTS}", b""))
    settings = compare(program, fixed(graph.data))
    return Built(
        files,
        f"pkd, coremltools {version('coremltools')}",
        {"not_measured": NOT_MEASURED, "deployment_target": "iOS 15, macOS 12", **settings},
        program.version,
        program,
    )


FORMAT = Format(
    "coreml",
    ("fp32", "fp16"),
    GraphForm("s8s8"),
    _build,
    need_packages("coreml", "coremltools", "torch"),
    elsewhere=True,
)
