"""Adopt an existing face model as a student: its network up to the layer in front of the embedding, and a new last one.

Adoption is checked against onnxruntime before anything else is done. Facts and traps: a graph is simplified by
onnxruntime's own optimiser at a batch of one, so that shape arithmetic is gone and every size is known; a final
normalisation is left out, for the exported graph has its own; and batch normalisation that an exporter has folded into
the convolutions is put back, since a network without it loses what it knows in its first hundred training steps.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.utils import Extractor
from torch import Tensor, nn

from pkd.toolkit.core.encoder_info import EncoderInfo, describe
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.layers import Adoptable
from pkd.toolkit.distill.models.onnx_graph import OnnxModule, constants_of, shapes_of
from pkd.toolkit.distill.models.onnx_operators import OPERATORS
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.base import Embeddings, Encoder, OnnxEncoder, make_session, ort_reason, unit_rows
from pkd.toolkit.encoders.onnx_ports import Ports
from pkd.toolkit.images.codec import Rgb

TOLERANCE = 1e-5
"""Largest distance of an embedding in torch from onnxruntime's, both at unit length."""
WIDEST = 2048
"""Numbers of the layer in front of the embedding from which on it is not used: its map would be most of the student."""
KEPT_BY_ORT = [
    "ConvBNFusion", "ConvMulFusion", "ConvAddFusion", "MatMul_BatchNormalization_Fusion", "MatMulAddFusion",
]  # fmt: skip
"""Rewrites of onnxruntime that would fold away layers that training wants to have, or merge the batch into an axis."""
LINEAR = {"Gemm", "MatMul", "Conv", "BatchNormalization", "Add", "Sub", "Mul", "Div", "Identity", "Dropout"}
RESHAPES = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}
SUMS = {"ReduceL2", "ReduceSum", "ReduceSumSquare"}
FLOAT16 = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


class AdoptedNetwork(Adoptable):
    """Run an adopted trunk, float32 N×3×S×S → N×width, and a linear map on top of it → N×dim."""

    trunk: OnnxModule

    def __init__(self, trunk: onnx.ModelProto, width: int, dim: int) -> None:
        super().__init__()
        self.trunk = OnnxModule(trunk, OPERATORS)
        self.flatten = nn.Flatten(1)
        self.map: nn.Module = nn.Linear(width, dim)
        self.width, self.dim = width, dim
        self.normalised: tuple[str, ...] = ()
        self.rank: int | None = None
        self.frozen: str | None = None
        self._graph = _without_weights(trunk)
        self.stages = tuple(f"trunk.{name}" for name in _stages(self.trunk))
        for name in self.trunk.step_names:  # what scales pixels is no layer to train
            module = getattr(self.trunk, name)
            if any(p.ndim > 1 and p.numel() > 64 for p in module.parameters()):
                break
            module.requires_grad_(False)

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        """Compute N×dim embeddings, not normalised, of preprocessed N×3×S×S.

        ``features``: x is what the last frozen layer gives, N×C×H×W; only the layers behind it run.
        """
        out: Tensor = self.map(self.flatten(self.trunk(x, self.frozen if features else None)))
        return out

    def freeze(self, step: str) -> None:
        """Keep the trunk's layers up to and with ``step`` as they are."""
        self.frozen = step
        for name in self._up_to(step):
            getattr(self.trunk, name).requires_grad_(False)

    def _up_to(self, step: str | None) -> tuple[str, ...]:
        names = self.trunk.step_names
        return () if step is None else names[: names.index(step) + 1]

    def set_map(self, weight: NDArray[np.float64], bias: NDArray[np.float64], rank: int | None = None) -> None:
        """Replace the last layer: ``weight`` width×dim, ``bias`` dim; as two layers with ``rank`` values in between."""
        self._make_map(rank)
        with torch.no_grad():
            if rank is None:
                layer = self.map
            else:
                u, s, vt = np.linalg.svd(weight, full_matrices=False)
                root = np.sqrt(s[:rank])
                self.map[0].weight.copy_(torch.from_numpy((u[:, :rank] * root).T))  # type: ignore[index]
                layer, weight = self.map[1], root[:, None] * vt[:rank]  # type: ignore[index]
            layer.weight.copy_(torch.from_numpy(weight.T.copy()))  # type: ignore[operator]
            layer.bias.copy_(torch.from_numpy(bias))  # type: ignore[operator]

    def _make_map(self, rank: int | None) -> None:
        self.rank = rank
        two = rank is not None and nn.Sequential(nn.Linear(self.width, rank, bias=False), nn.Linear(rank, self.dim))
        self.map = two or nn.Linear(self.width, self.dim)

    def restore_batch_norm(self, batches: Iterator[Tensor]) -> None:
        """Put batch normalisation back behind the convolutions without, so that the function stays the same.

        ``batches``: some hundred real images, preprocessed. Mean and variance of each convolution's output become the
        running statistics, γ = √(σ² + ε) and β the mean. Frozen layers stay without.
        """
        kept = self._up_to(self.frozen)
        bare = [name for name in self.trunk.step_names if name not in kept and self._is_bare(name)]
        sums: dict[str, list[Any]] = {name: [0, 0.0, 0.0] for name in bare}

        def gather(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                values = output.detach().double().transpose(0, 1).flatten(1)
                total = sums[name]
                total[0] += values.shape[1]
                total[1] = total[1] + values.sum(1)
                total[2] = total[2] + values.square().sum(1)

            return hook

        hooks = [getattr(self.trunk, name).register_forward_hook(gather(name)) for name in bare]
        was = self.training
        self.eval()
        with torch.no_grad():
            for batch in batches:
                self.trunk(batch)
        for hook in hooks:
            hook.remove()
        self._wrap(bare)
        for name in bare:
            count, total, squares = sums[name]
            mean = total / count
            variance = (squares / count - mean.square()).clamp_min(0)
            convolution, norm = _linear_of(getattr(self.trunk, name)[0]), getattr(self.trunk, name)[1]
            bias = 0 if convolution.bias is None else convolution.bias.detach().double()
            with torch.no_grad():
                norm.running_mean.copy_(mean - bias)
                norm.running_var.copy_(variance)
                norm.weight.copy_((variance + norm.eps).sqrt())
                norm.bias.copy_(mean)
            convolution.bias = None
        self.train(was)

    def _is_bare(self, name: str) -> bool:
        """Tell whether a step is a convolution over an area, with no batch normalisation after it."""
        convolution = _linear_of(getattr(self.trunk, name))
        if not isinstance(convolution, nn.Conv2d):
            return False
        shape = self.trunk.shapes[name]
        after = [getattr(self.trunk, follower) for follower in self.trunk.followers(name)]
        area = shape is not None and (shape[2] * shape[3] > 1 or max(convolution.kernel_size) > 1)
        return area and not any(isinstance(module, nn.BatchNorm2d) for module in after)

    def _wrap(self, names: list[str]) -> None:
        for name in names:
            module = getattr(self.trunk, name)
            channels = _linear_of(module).out_channels
            setattr(self.trunk, name, nn.Sequential(module, nn.BatchNorm2d(channels)))
        self.normalised = tuple(names)

    def architecture(self) -> dict[str, Any]:
        """Describe the network without its weights, as plain values and tensors that ``build_adopted`` takes."""
        graph = torch.frombuffer(bytearray(self._graph), dtype=torch.uint8)
        return {
            "graph": graph,
            "width": self.width,
            "dim": self.dim,
            "rank": self.rank,
            "normalised": list(self.normalised),
        }


def build_adopted(architecture: Mapping[str, Any]) -> AdoptedNetwork:
    """Make the network that ``AdoptedNetwork.architecture`` describes; its weights are to be loaded."""
    trunk = onnx.load_model_from_string(zlib.decompress(architecture["graph"].numpy().tobytes()))
    network = AdoptedNetwork(trunk, architecture["width"], architecture["dim"])
    network._make_map(architecture["rank"])
    names = list(architecture["normalised"])
    network._wrap(names)
    for name in names:
        _linear_of(getattr(network.trunk, name)[0]).bias = None
    return network


@dataclass(frozen=True)
class Adopted:
    """Hold a model that is to become a student, in parts.

    ``trunk``: ONNX, float N×3×S×S → the ``width`` numbers in front of the embedding, or the embedding itself.
    ``weight`` and ``bias``: float64 width×d and d, which make its embedding of these numbers.
    ``features``: what computes the trunk in onnxruntime, not normalised.
    """

    info: EncoderInfo
    source: str
    trunk: onnx.ModelProto
    width: int
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    features: Features

    def up_to(self, tensor: str) -> onnx.ModelProto:
        """Return the graph that computes a tensor of the trunk, for any number of images."""
        return free_batch(_cut(self.trunk, self.trunk.graph.input[0].name, tensor))

    def own_rank(self, dim: int) -> int | None:
        """Tell the rank of its last layers where they are two small ones, which save as much for ``dim`` outputs."""
        rank = int(np.linalg.matrix_rank(self.weight, tol=1e-5 * np.linalg.norm(self.weight, 2)))
        saves = rank < min(self.weight.shape) and rank * (self.width + dim) < self.width * dim
        return rank if saves else None

    def network(self, dim: int) -> AdoptedNetwork:
        """Make a trainable network with ``dim`` outputs; its map is that of the model's own embedding where it fits."""
        made = AdoptedNetwork(self.trunk, self.width, dim)
        if dim == self.weight.shape[1]:
            made.set_map(self.weight, self.bias)
        return made


class Features:
    """Compute the numbers that a map is fitted on: an Encoder whose rows are not normalised."""

    def __init__(self, info: EncoderInfo, trunk: onnx.ModelProto) -> None:
        self.info = info
        self._session = make_session(trunk.SerializeToString(), 1)
        self._input = trunk.graph.input[0].name

    def embed(self, crops: Rgb) -> Embeddings:
        """Compute uint8 N×H×W×3 RGB → float32 N×width."""
        self.info.preprocess.check(crops)
        if not len(crops):
            return np.empty((0, self.info.space.dim), np.float32)
        (rows,) = self._session.run(None, {self._input: self.info.preprocess(crops)})
        return np.asarray(rows, np.float32).reshape(len(crops), -1)


def adopt(spec: str, preprocess: str | None = None, crops: Rgb | None = None) -> Adopted:
    """Open a model as a student: FILE.onnx, a bundle, a run, insightface:PACK or a torch checkpoint.

    ``preprocess``: as for a teacher. ``crops``: real ones, uint8 N×S×S×3, on which torch and onnxruntime must agree.
    Raises InputError, naming the operator, for a graph that cannot be trained, and where they differ.
    """
    encoder = open_encoder(spec, preprocess, option="--student-preprocess")
    model = simplify(_network_of(spec, encoder), encoder.info.preprocess.size, spec)
    return adopt_graph(model, encoder, spec, crops)


def adopt_graph(model: onnx.ModelProto, encoder: Encoder, spec: str, crops: Rgb | None = None) -> Adopted:
    """Cut a simplified graph into trunk and embedding, and compare both in torch with ``encoder`` on ``crops``."""
    taken, end = model.graph.input[0].name, _before_normalisation(model)
    front = _in_front_of_embedding(model, end)
    shapes = shapes_of(model)
    if front and int(np.prod(shapes[front][1:])) > WIDEST:
        front = ""
    trunk = _cut(model, taken, front or end)
    width = int(np.prod(shapes[front or end][1:]))
    tail = OnnxModule(_cut(model, front, end), OPERATORS).eval().double() if front else nn.Identity()
    with torch.no_grad():
        shape = shapes[front or end][1:] if front else (width,)
        probes = torch.cat([torch.zeros(1, width), torch.eye(width)]).double().reshape(-1, *shape)
        rows = tail(probes).flatten(1).numpy()
    bias, weight = rows[0], rows[1:] - rows[0]
    digest = hashlib.sha256(f"{encoder.info.id} features {front or end}".encode()).hexdigest()
    own = describe(f"{encoder.info.name}-features", "teacher", digest, encoder.info.preprocess, width)
    found = Adopted(encoder.info, spec, trunk, width, weight, bias, Features(own, free_batch(trunk)))
    found.network(weight.shape[1])  # what cannot be translated is refused here
    if crops is not None:
        _require_equal(found, encoder, crops)
    return found


def _require_equal(found: Adopted, encoder: Encoder, crops: Rgb) -> None:
    expected = encoder.embed(crops)
    network = found.network(found.weight.shape[1]).eval()
    with torch.no_grad():
        rows = unit_rows(network(torch.from_numpy(found.info.preprocess(crops))).numpy(), found.info.name)
        features = network.flatten(network.trunk(torch.from_numpy(found.info.preprocess(crops)))).numpy()
    own = found.features.embed(crops)
    gaps = (
        float(np.linalg.norm(rows - expected, axis=1).max()),
        float((np.linalg.norm(features - own, axis=1) / np.linalg.norm(own, axis=1)).max()),
    )
    if not max(gaps) <= TOLERANCE:
        raise InputError(
            f"--student {found.source}: torch computes embeddings that differ from onnxruntime's by {max(gaps):.1e}, "
            f"more than {TOLERANCE:g}. Please report the model; train a backbone of pkd's own meanwhile."
        )


def _network_of(spec: str, encoder: Encoder) -> onnx.ModelProto:
    """Return the float32 N×3×S×S network behind an encoder as ONNX, with its batch normalisation as it is there."""
    from pkd.toolkit.distill.models.student import TorchEncoder

    if isinstance(encoder, TorchEncoder):
        return _traced(encoder.module, encoder.info.preprocess.size)
    if not isinstance(encoder, OnnxEncoder):
        raise InputError(f"--student {spec}: a {type(encoder).__name__} cannot be trained. Give the float model.")
    if encoder.path is not None:
        return _with_usual_ports(onnx.load(str(encoder.path)), encoder.ports, spec)
    from pkd.toolkit.bundle.bundle import Bundle

    graph = onnx.load_model_from_string(Bundle.open(Path(spec)).read("encoder.onnx"))
    ends = [next((n for n in graph.graph.node if n.name == name), None) for name in ("pkd/network", "pkd/unit")]
    if ends[0] is None or ends[1] is None:
        raise InputError(f"--student {spec}: was not made by pkd-export. Give the model that it was made from.")
    return _cut(graph, ends[0].output[0], ends[1].input[0])


def _with_usual_ports(model: onnx.ModelProto, ports: Ports | None, spec: str) -> onnx.ModelProto:
    """Give a graph float32 N×3×S×S pixels and its embedding as the only output."""
    if ports is None:
        return model
    if ports.input.dtype is not np.float32:
        kind = np.dtype(ports.input.dtype).name
        raise InputError(f"--student {spec}: takes {kind} pixels. Give the float32 file that it was made from.")
    graph = model.graph
    chosen = onnx.ValueInfoProto.FromString(
        next(value for value in graph.output if value.name == ports.output).SerializeToString()
    )
    del graph.output[:]
    graph.output.append(chosen)
    if ports.input.nhwc:
        taken = next(value for value in graph.input if value.name == ports.input.name)
        front = helper.make_node("Transpose", [f"{taken.name}/nchw"], [taken.name], perm=[0, 2, 3, 1])
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
        del graph.node[:]
        graph.node.extend([front, *nodes])
        taken.name = f"{taken.name}/nchw"
    return model


def _traced(module: nn.Module, size: int) -> onnx.ModelProto:
    with TemporaryDirectory() as folder:
        import warnings

        file = Path(folder, "network.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is another exporter
            torch.onnx.export(
                module.eval(), (torch.zeros(1, 3, size, size),), file, dynamo=False, opset_version=18,
                input_names=["pixels"], output_names=["features"], training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
            )  # fmt: skip
        return onnx.load(str(file))


def simplify(model: onnx.ModelProto, size: int, source: str) -> onnx.ModelProto:
    """Fold shape arithmetic and constants at a batch of one, by onnxruntime. Raises InputError for INT8 and float16."""
    initial = {t.name for t in model.graph.initializer}
    kinds = {node.op_type for node in model.graph.node}
    if {t.data_type for t in model.graph.initializer} & FLOAT16:
        raise InputError(f"--student {source}: its weights are float16. Give the float32 file that it was made from.")
    if {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "DynamicQuantizeLinear"} & kinds:
        raise InputError(f"--student {source}: is quantised (INT8). Give the float32 file that it was made from.")
    made = onnx.ModelProto()
    made.CopyFrom(model)
    (taken,) = (value for value in made.graph.input if value.name not in initial)
    taken.CopyFrom(helper.make_tensor_value_info(taken.name, TensorProto.FLOAT, [1, 3, size, size]))
    inputs, outputs = [taken], [made.graph.output[0]]
    inputs, outputs = ([onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in vs] for vs in (inputs, outputs))
    outputs[0].type.tensor_type.ClearField("shape")
    del made.graph.input[:], made.graph.output[:], made.graph.value_info[:]
    made.graph.input.extend(inputs)
    made.graph.output.extend(outputs)
    made.ir_version = max(made.ir_version, 4)  # from here on weights need not be inputs
    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder, "simple.onnx"))
        options.log_severity_level = 4
        try:
            onnxruntime.InferenceSession(
                made.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=KEPT_BY_ORT
            )
        except Exception as error:  # onnxruntime's own errors share no public base class
            raise InputError(f"--student {source}: onnxruntime cannot load it: {ort_reason(error)}") from None
        return onnx.load(options.optimized_model_filepath)


def _before_normalisation(model: onnx.ModelProto) -> str:
    """Return the name of the embedding before a final division by its own length, where the graph has one."""
    maker = {name: node for node in model.graph.node for name in node.output}
    constants = constants_of(model)
    name: str = model.graph.output[0].name
    node = maker.get(name)
    while node is not None and node.op_type in {"Identity", "Dropout", *RESHAPES}:
        name = node.input[0]
        node = maker.get(name)
    if node is not None and node.op_type == "LpNormalization":
        return str(node.input[0])
    if node is not None and node.op_type in ("Div", "Mul") and len(node.input) == 2:
        for x, divisor in (tuple(node.input), tuple(node.input)[::-1]):
            seen: set[str] = set()
            ahead = [divisor]
            while ahead:
                name = ahead.pop()
                if name in ("", x) or name in constants:
                    continue
                before = maker.get(name)
                if before is None or len(seen) > 12:
                    break
                seen.add(before.op_type)
                ahead += before.input
            else:
                if seen & SUMS:
                    return str(x)
    return str(model.graph.output[0].name)


def _in_front_of_embedding(model: onnx.ModelProto, end: str) -> str:
    """Return the name of what the linear layers that make the embedding read, or "" where there are none."""
    maker = {name: node for node in model.graph.node for name in node.output}
    readers = [name for node in model.graph.node for name in node.input]
    constants, shapes = constants_of(model), shapes_of(model)
    name, found = end, ""
    while name in maker:
        node = maker[name]
        variables = [i for i in node.input if i and i not in constants]
        if node.op_type not in LINEAR | RESHAPES or len(variables) != 1 or name not in shapes:
            break
        before = variables[0]
        if node.op_type == "Div" and node.input[0] in constants:
            break
        if node.op_type == "Conv" and any(size != 1 for size in shapes.get(before, (0,))[2:]):
            break
        if node.op_type in ("Gemm", "MatMul", "Conv"):
            found = before
        if readers.count(before) != 1:
            break
        name = before
    return found


def _cut(model: onnx.ModelProto, start: str, end: str) -> onnx.ModelProto:
    """Return the part of a graph between two of its tensors."""
    shaped = onnx.shape_inference.infer_shapes(model)
    return Extractor(shaped).extract_model([start], [end])


def free_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let the first dimension of a graph that was cut at a batch of one vary."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = constants_of(made)
    for node in made.graph.node:
        if node.op_type == "Reshape" and node.input[1] in constants:
            shape = constants[node.input[1]].copy()
            if len(shape) and shape[0] == 1 and -1 not in shape[1:]:
                shape[0] = -1
                made.graph.initializer.append(numpy_helper.from_array(shape, f"{node.output[0]}/free_shape"))
                node.input[1] = f"{node.output[0]}/free_shape"
    del made.graph.value_info[:]
    for value in (made.graph.input[0], made.graph.output[0]):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].Clear()
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return made


def _without_weights(model: onnx.ModelProto) -> bytes:
    """Return a graph, packed, whose large arrays of floats are zeros: its architecture."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size > 1:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(values), tensor.name))
    for node in made.graph.node:
        node.ClearField("doc_string")
    return zlib.compress(made.SerializeToString())


def _stages(network: OnnxModule) -> list[str]:
    """Name the last step at each size of the features that is half the last's."""
    last: dict[int, str] = {}
    for name in network.step_names:
        shape = network.shapes[name]
        if shape is not None and len(shape) == 4 and shape[2] == shape[3] > 1:
            last[shape[2]] = name
    return list(last.values())[1:] if len(last) > 1 else list(last.values())


def _linear_of(module: nn.Module) -> Any:
    """Return the convolution of a step: itself, or the one behind its padding."""
    return module[-1] if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.Conv2d) else module
