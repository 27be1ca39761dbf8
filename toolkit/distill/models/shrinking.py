"""Shrink an adopted network: remove channels inside its blocks, and fit what reads the rest anew, in closed form.

A convolution whose channels meet nothing but channelwise layers before one other convolution reads them can lose any
of them. The reader's weights are solved by least squares on real crops, first with all channels; then the one goes
whose loss costs the least, the rest making up for it, and so on (optimal brain surgeon, Hassibi and Stork 1993, by
channels; the order of removal is greedy). The error of each number of channels tells how many every layer keeps for a
given number of parameters in all. In a second pass, front to back, each reader is fitted to give what the whole
network gives there, from what the shrunk one has, so that errors before it are made up for, too.

Nothing is trained here, and training must follow: docs/adoption.md has the figures before and after
(benchmarks/adoption.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.utils import Extractor
from torch.nn import functional

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.adopted import Adopted, Features, free_batch
from pkd.toolkit.distill.models.onnx_graph import Numbers, constants_of, shapes_of
from pkd.toolkit.encoders.base import make_session
from pkd.toolkit.images.codec import Rgb

Doubles = NDArray[np.float64]
CHANNELWISE = {"PRelu", "Relu", "LeakyRelu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Elu", "BatchNormalization"}
"""Operators that treat each channel by itself, beside depthwise convolutions."""
FLATTENING = {"Flatten", "Squeeze", "Identity", "Dropout", "GlobalAveragePool"}
MULTIPLE = 8
"""Channels are kept in multiples of that: runtimes compute so many at a time."""
POSITIONS = 200
"""Positions of an image that are looked at, drawn at random."""
BATCH = 50
RIDGE = 1e-4
"""Weight of the ridge, of the mean square of a channel."""


@dataclass
class _Group:
    """Hold a convolution's removable channels.

    ``producer``: makes them. ``between``: channelwise nodes that pass them on. ``reader``: the convolution that reads
    them, None for the features at the network's end.
    """

    producer: onnx.NodeProto
    between: list[onnx.NodeProto]
    reader: onnx.NodeProto | None
    read: str
    """The tensor that the reader reads."""
    sum: onnx.NodeProto | None = None
    """The addition that alone takes what the reader gives."""
    cost: int = 0
    """Parameters of one channel."""
    errors: Doubles = field(default_factory=lambda: np.zeros(0))
    """Share of the reader's variance that is lost, by the number of channels left."""


def shrink(
    student: Adopted,
    parameters: int,
    crops: Rgb,
    targets: NDArray[np.float32],
    rank: int | None,
    *,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Adopted:
    """Make a student of at most ``parameters`` parameters in all, with its map to the teacher's space.

    ``crops``: some hundred real ones, uint8 N×S×S×3. ``targets``: the teacher's embeddings of them, N×D. ``rank``: of
    the map. ``advance``: told of each step that is done. Raises InputError where the network has no such channels, or
    too few to become so small.
    """
    model = onnx.ModelProto()
    model.CopyFrom(student.trunk)
    groups = _groups(model)
    pixels = student.info.preprocess(crops)
    weights = {t.name: t for t in model.graph.initializer}
    outer = rank or targets.shape[1]
    size = sum(int(np.prod(t.dims)) for t in weights.values() if len(t.dims)) + student.width * outer
    size += targets.shape[1] * (1 if rank is None else 1 + rank)
    for group in groups:
        group.cost = _cost(group, weights, outer)
    least = size - sum(group.cost * (_channels(group, weights) - MULTIPLE) for group in groups)
    if least > parameters:
        few = f"{least:,} are left" if groups else f"all {size:,} are needed"
        raise InputError(
            f"--shrink {parameters}: {few} when all channels inside its blocks are gone that can be. "
            "Give more, a smaller --map-rank, or a smaller model."
        )
    if size <= parameters:
        raise InputError(f"--shrink {parameters}: the student has {size:,} parameters with its map. Give fewer.")
    threads = threads or os.cpu_count() or 1
    _measure(student.trunk, groups, pixels, targets, threads)
    advance(1)
    kept = _allocate(groups, [_channels(group, weights) for group in groups], size, parameters)
    width = student.width
    for group, count in zip(groups, kept, strict=True):
        sums = _fit(student.trunk, model, group, pixels, targets, threads)
        chosen, inner = eliminate(sums.gram, sums.cross, _kernel(group, weights), count)
        _keep(model, group, chosen, inner)
        width = count if group.reader is None else width
        advance(1)
    return _made(student, model, width)


def eliminate(gram: Doubles, cross: Doubles, size: int, keep: int) -> tuple[NDArray[np.int64], Doubles]:
    """Choose ``keep`` channels by removing, one after the other, the one whose loss costs the least.

    ``gram``: ZᵀZ of the inputs, (C·size+1)², the last row a constant's, ``size`` inputs a channel. ``cross``: ZᵀY.
    Returns the channels in order and the least-squares weights of their inputs and the constant.
    """
    order, _ = _removal(gram, cross, size, keep)
    chosen = np.setdiff1d(np.arange((len(gram) - 1) // size), order)
    rows = np.append((chosen[:, None] * size + np.arange(size)).ravel(), len(gram) - 1)
    return chosen, np.linalg.solve(_ridged(gram)[np.ix_(rows, rows)], cross[rows])


def _ridged(gram: Doubles) -> Doubles:
    return np.asarray(gram + RIDGE * np.diag(gram)[:-1].mean() * np.diag(np.append(np.ones(len(gram) - 1), 1e-9)))


def _removal(gram: Doubles, cross: Doubles, size: int, keep: int) -> tuple[list[int], list[float]]:
    """Return the channels in the order of their removal, and what each adds to the sum of squared errors."""
    inverse = np.linalg.inv(_ridged(gram))
    weight = inverse @ cross
    count = (len(gram) - 1) // size
    alive = np.ones(count, bool)
    order: list[int] = []
    added: list[float] = []
    while alive.sum() > keep:
        w = weight[:-1].reshape(count, size, -1)
        if size == 1:
            costs = (w[:, 0] ** 2).sum(1) / np.diag(inverse)[:-1]
        else:
            blocks = np.stack([inverse[k * size : (k + 1) * size, k * size : (k + 1) * size] for k in range(count)])
            costs = np.einsum("cio,cio->c", w, np.linalg.solve(blocks, w))
        costs[~alive] = np.inf
        gone = int(costs.argmin())
        rows = slice(gone * size, (gone + 1) * size)
        ratio = np.linalg.solve(inverse[rows, rows], inverse[rows])
        weight -= ratio.T @ weight[rows]
        inverse -= inverse[:, rows] @ ratio
        weight[rows], inverse[rows], inverse[:, rows] = 0, 0, 0
        inverse[rows, rows] = np.eye(size)
        alive[gone] = False
        order.append(gone)
        added.append(float(costs[gone]))
    return order, added


def _groups(model: onnx.ModelProto) -> list[_Group]:
    """Find the convolutions whose channels can be removed, in the order of the graph."""
    constants, shapes = constants_of(model), shapes_of(model)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            if name and name not in constants:
                readers.setdefault(name, []).append(node)
    end = model.graph.output[0].name
    used = [name for node in model.graph.node for name in node.input]
    shared = {name for name in constants if used.count(name) > 1 and constants[name].size > 1}
    found: list[_Group] = []
    for node in model.graph.node:
        if not _is_plain(node, constants):
            continue
        channels = constants[node.input[1]].shape[0]
        between: list[onnx.NodeProto] = []
        name = node.output[0]
        while True:
            if name == end:
                if int(np.prod(shapes[name][1:])) == channels:
                    found.append(_Group(node, between, None, end))
                break
            following = readers.get(name, [])
            if len(following) != 1 or len(following[0].output) != 1 or name == end:
                break
            reader = following[0]
            if _is_plain(reader, constants):
                then = readers.get(reader.output[0], [])
                alone = len(then) == 1 and then[0].op_type == "Add" and reader.output[0] != end
                variables = [i for i in then[0].input if i not in constants] if alone else []
                found.append(_Group(node, between, reader, name, then[0] if len(variables) == 2 else None))
                break
            flat = reader.op_type in FLATTENING and int(np.prod(shapes.get(reader.output[0], (0, 0))[1:])) == channels
            if not (flat or _is_channelwise(reader, constants, channels)):
                break
            between.append(reader)
            name = reader.output[0]
    return [
        g
        for g in found
        if not shared & {i for n in (g.producer, *g.between, *([g.reader] if g.reader else [])) for i in n.input}
    ]


def _is_plain(node: onnx.NodeProto, constants: dict[str, Numbers]) -> bool:
    """Tell whether a node is a convolution over all channels, of known weights and stated padding."""
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    known = node.op_type == "Conv" and all(name in constants for name in node.input[1:])
    return known and options.get("group", 1) == 1 and options.get("auto_pad", b"NOTSET") == b"NOTSET"


def _is_channelwise(node: onnx.NodeProto, constants: dict[str, Numbers], channels: int) -> bool:
    if node.op_type == "Conv":
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        return group == channels and len(constants.get(node.input[1], ())) == channels
    return node.op_type in CHANNELWISE and all(name in constants for name in node.input[1:] if name)


def _channels(group: _Group, weights: dict[str, onnx.TensorProto]) -> int:
    return int(weights[group.producer.input[1]].dims[0])


def _kernel(group: _Group, weights: dict[str, onnx.TensorProto]) -> int:
    """Return the number of the reader's inputs a channel: the area of its kernel."""
    return 1 if group.reader is None else int(np.prod(weights[group.reader.input[1]].dims[2:]))


def _cost(group: _Group, weights: dict[str, onnx.TensorProto], outer: int) -> int:
    """Count the parameters that one channel has, with its part of the map where the map reads it."""
    nodes = [group.producer, *group.between]
    channels = _channels(group, weights)
    own = sum(
        int(np.prod(weights[name].dims)) // channels
        for node in nodes
        for name in node.input[1:]
        if name in weights and channels in weights[name].dims
    )
    if group.reader is None:
        return own + outer
    weight = weights[group.reader.input[1]]
    return own + int(np.prod(weight.dims)) // channels


def _measure(
    trunk: onnx.ModelProto, groups: Sequence[_Group], pixels: NDArray[Any], targets: NDArray[Any], threads: int
) -> None:
    """Write to each group what is lost with so many channels left, from none gone to almost all."""
    weights = {t.name: t for t in trunk.graph.initializer}
    gathered = [_Sums(group, weights) for group in groups]
    names = list(dict.fromkeys(name for each in gathered for name in (each.read, each.wanted, each.other) if name))
    run = _runner(trunk, names, threads)
    for start in range(0, len(pixels), BATCH):
        values = dict(zip(names, run(pixels[start : start + BATCH]), strict=True))
        values[""] = targets[start : start + BATCH]
        for each in gathered:
            each.add(values[each.read], values[each.wanted], values[each.other] if each.other else None)
    for group, each in zip(groups, gathered, strict=True):
        _, added = _removal(each.gram, each.cross, _kernel(group, weights), 1)
        lost = np.concatenate([[0.0], np.cumsum(added)]) / max(each.variance, 1e-12)
        group.errors = np.concatenate([[np.inf], lost[::-1]])


def _fit(
    whole: onnx.ModelProto,
    model: onnx.ModelProto,
    group: _Group,
    pixels: NDArray[Any],
    targets: NDArray[Any],
    threads: int,
) -> _Sums:
    """Gather what the reader reads in ``model``, which is shrunk before it, and what ``whole`` gives behind it."""
    each = _Sums(group, {t.name: t for t in model.graph.initializer})
    mine = _runner(model, [name for name in (each.read, each.other) if name], threads)
    theirs = _runner(whole, [each.wanted], threads) if each.wanted else None
    for start in range(0, len(pixels), BATCH):
        batch = pixels[start : start + BATCH]
        read, *other = mine(batch)
        wanted = theirs(batch)[0] if theirs else targets[start : start + BATCH]
        each.add(read, wanted, other[0] if other else None)
    return each


def _allocate(groups: Sequence[_Group], channels: Sequence[int], size: int, parameters: int) -> list[int]:
    """Choose how many channels each group keeps: the least sum of errors within the budget."""

    def at(price: float) -> list[int]:
        kept = []
        for group, count in zip(groups, channels, strict=True):
            options = np.arange(min(MULTIPLE, count), count + 1, MULTIPLE)
            options = options if options[-1] == count else np.append(options, count)
            kept.append(int(options[(group.errors[options] + price * group.cost * options).argmin()]))
        return kept

    def total(kept: Sequence[int]) -> int:
        return size - sum(g.cost * (c - k) for g, c, k in zip(groups, channels, kept, strict=True))

    low, high = 1e-12, 1e3
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if total(at(middle)) > parameters else (low, middle)
    return at(high)


class _Sums:
    """Gather over images what a group's reader reads, Z with a column of ones, and Y, what it should give.

    ``names``: the tensors that are needed: what is read, what is wanted and, where a sum follows, its other part.
    """

    def __init__(self, group: _Group, weights: dict[str, onnx.TensorProto]) -> None:
        self._group, self._weights = group, weights
        self._random = np.random.default_rng(0)
        self.gram: Any = 0.0
        self.cross: Any = 0.0
        self._sums: Any = 0.0
        self._squares, self._count = 0.0, 0
        self._rows: list[NDArray[np.float64]] = []
        self.read, self.wanted, self.other = group.read, "", ""
        if group.reader is not None:
            given = group.reader.output[0]
            self.wanted = group.sum.output[0] if group.sum else given
            self.other = next(name for name in group.sum.input if name != given) if group.sum else ""

    def add(self, read: NDArray[Any], wanted: NDArray[Any], other: NDArray[Any] | None) -> None:
        """Add some images: N×C×H×W each, or N×width read and N×D wanted at the network's end."""
        if self._group.reader is None:
            self._add(read.reshape(len(read), -1), wanted, wanted)
            return
        positions = wanted.shape[2] * wanted.shape[3]
        chosen = np.sort(self._random.choice(positions, min(POSITIONS, positions), replace=False))

        def rows(values: NDArray[Any]) -> NDArray[Any]:
            taken = values.reshape(*values.shape[:2], -1)[:, :, chosen]
            return np.array(taken.transpose(0, 2, 1).reshape(-1, values.shape[1]))

        z = _patches(read, self._group.reader, self._weights)
        y = rows(wanted)
        self._add(rows(z), y, y if other is None else y - rows(other))

    def _add(self, z: NDArray[Any], wanted: NDArray[Any], y: NDArray[Any]) -> None:
        z = np.concatenate([z, np.ones((len(z), 1), z.dtype)], 1)
        self.gram, self.cross = self.gram + (z.T @ z).astype(np.float64), self.cross + (z.T @ y).astype(np.float64)
        self._sums = self._sums + wanted.sum(0, dtype=np.float64)
        self._squares += float((wanted**2).sum(dtype=np.float64))
        self._count += len(wanted)

    @property
    def variance(self) -> float:
        """Sum of the squared distances of what is wanted from its mean."""
        return self._squares - float((self._sums**2).sum()) / self._count


def _patches(read: NDArray[Any], node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> NDArray[Any]:
    """Lay out what a convolution multiplies: N×C×H×W → N×(C·kernel)×positions."""
    options = {a.name: list(a.ints) for a in node.attribute if a.ints}
    kernel = list(weights[node.input[1]].dims[2:])
    top, left, bottom, right = options.get("pads", [0, 0, 0, 0])
    padded = functional.pad(torch.from_numpy(read), (left, right, top, bottom))
    found = functional.unfold(
        padded,
        tuple(kernel),
        dilation=tuple(options.get("dilations", [1, 1])),
        stride=tuple(options.get("strides", [1, 1])),
    )
    patches: NDArray[Any] = found.numpy()
    return patches


def _runner(model: onnx.ModelProto, names: Sequence[str], threads: int) -> Any:
    """Make a function of pixels that computes these tensors of a graph."""
    shaped = onnx.shape_inference.infer_shapes(model)
    taken = model.graph.input[0].name
    made = free_batch(Extractor(shaped).extract_model([taken], list(names)))
    for value in made.graph.output:
        value.type.tensor_type.ClearField("shape")
    session = make_session(made.SerializeToString(), threads)
    return lambda pixels: session.run(list(names), {taken: pixels})


def _keep(model: onnx.ModelProto, group: _Group, chosen: NDArray[np.int64], inner: Doubles) -> None:
    """Remove all but the ``chosen`` channels, and give the reader the weights ``inner``, (inputs + 1)×outputs."""
    weights = {t.name: t for t in model.graph.initializer}
    channels = _channels(group, weights)

    def put(name: str, values: NDArray[Any]) -> None:
        weights[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))

    for node in (group.producer, *group.between):
        for name in node.input[1:]:
            if name in weights and channels in weights[name].dims:
                values = numpy_helper.to_array(weights[name])
                axis = 0 if node.op_type == "Conv" else list(values.shape).index(channels)
                if values.shape[axis] == channels:
                    put(name, values.take(chosen, axis))
        if node.op_type == "Conv" and node is not group.producer:
            next(a for a in node.attribute if a.name == "group").i = len(chosen)
    if group.reader is not None:
        shape = list(weights[group.reader.input[1]].dims)
        put(group.reader.input[1], inner[:-1].T.reshape(shape[0], len(chosen), *shape[2:]))
        if len(group.reader.input) < 3:
            name = f"{group.reader.output[0]}/bias"
            group.reader.input.append(name)
            model.graph.initializer.append(numpy_helper.from_array(inner[-1].astype(np.float32), name))
        else:
            put(group.reader.input[2], inner[-1])
    elif model.graph.output[0].type.tensor_type.shape.dim:
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = len(chosen)
    del model.graph.value_info[:]


def _made(student: Adopted, model: onnx.ModelProto, width: int) -> Adopted:
    """Describe the shrunk network as an adopted one; its embedding is what its features are."""
    digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    info = describe(f"{student.info.name}-shrunk", "teacher", digest, student.info.preprocess, width)
    features = describe(f"{info.name}-features", "teacher", digest, info.preprocess, width)
    return replace(
        student, info=info, trunk=model, width=width, weight=np.eye(width), bias=np.zeros(width),
        features=Features(features, free_batch(model)),
    )  # fmt: skip
