"""Translate the operators of ONNX that face encoders consist of, each at every rank that ONNX allows for it.

Semantics: https://onnx.ai/onnx/operators, all operator sets from 7 on. Where an option moved from an attribute to an
input, both are read. Sizes of an image are static; the first axis is the batch, which nothing may touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 — its usual name

from pkd.toolkit.distill.models.onnx_graph import Bound, Function, Node, Translate, need


def _sides(node: Node, kernel: Sequence[int]) -> list[tuple[int, int]]:
    """Return the padding before and after each spatial axis, in numbers also where it is stated by a rule."""
    n = len(kernel)
    rule = node.options.get("auto_pad", b"NOTSET")
    if rule in (b"NOTSET", b""):
        pads = node.options.get("pads", [0] * 2 * n)
        return list(zip(pads[:n], pads[n:], strict=True))
    if rule == b"VALID":
        return [(0, 0)] * n
    sizes = node.shape()[2:]
    need(all(sizes), "with static sizes under auto_pad")
    strides, dilations = (node.options.get(name, [1] * n) for name in ("strides", "dilations"))
    totals = [
        max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)
    ]
    halves = [(total // 2, total - total // 2) for total in totals]
    return halves if rule == b"SAME_UPPER" else [(b, a) for a, b in halves]


def _flat(sides: Sequence[tuple[int, int]]) -> list[int]:
    """Return padding in the order of ``F.pad``: the last axis first."""
    return [p for side in reversed(sides) for p in side]


def _conv(node: Node) -> nn.Module:
    shape = node.shape(1)
    n = len(shape) - 2
    need(1 <= n <= 3, "in one to three dimensions")
    sides = _sides(node, shape[2:])
    even = all(a == b for a, b in sides)
    strides, dilations = (tuple(node.options.get(name, [1] * n)) for name in ("strides", "dilations"))
    padding = tuple(a for a, _ in sides) if even else (0,) * n
    groups = node.options.get("group", 1)
    weight, bias = node.constant(1), node.constant(2)
    if weight is None or (node.given(2) and bias is None):  # what a dequantiser gives
        need(even, "with the same padding on opposite sides")
        run = getattr(F, f"conv{n}d")

        def convolve(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            made: Tensor = run(x, w, b, strides, padding, dilations, groups)
            return made

        return Bound(node, convolve)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    made = kind(shape[1] * groups, shape[0], tuple(shape[2:]), strides, padding, dilations, groups, bias is not None)  # type: ignore[arg-type]
    _fill(made, weight, bias)
    return made if even else nn.Sequential(Function(partial(F.pad, pad=_flat(sides))), made)


def _gemm(node: Node) -> nn.Module:
    alpha, beta = (node.options.get(name, 1.0) for name in ("alpha", "beta"))
    turn_a, turn_b = (bool(node.options.get(name, 0)) for name in ("transA", "transB"))
    weight, bias = node.constant(1), node.constant(2)
    need(not turn_a or node.constant(0) is not None, "behind the batch (no transA)")
    outputs = node.shape(1)[0 if turn_b else 1]
    plain = weight is not None and not turn_a and (bias is not None or not node.given(2))
    if plain and (bias is None or bias.size in (1, outputs)):
        assert weight is not None
        rows = weight if turn_b else weight.T
        made = nn.Linear(rows.shape[1], rows.shape[0], bias is not None)
        _fill(made, alpha * rows, None if bias is None else np.broadcast_to(beta * bias.reshape(-1), (len(rows),)))
        return made

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, rows = a.T if turn_a else a, b if turn_b else b.T
        if alpha == beta == 1 and (c is None or c.dim() == 1):
            return F.linear(a, rows, c)
        product: Tensor = alpha * F.linear(a, rows)
        return product if c is None else product + beta * c

    return Bound(node, run)


def _matmul(node: Node) -> nn.Module:
    weight = node.constant(1)
    if weight is None or weight.ndim != 2:
        return Bound(node, torch.matmul)
    made = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    _fill(made, weight.T, None)
    return made


def _batch_norm(node: Node) -> nn.Module:
    values = [node.constant(i) for i in range(1, 5)]
    need(all(v is not None for v in values), "with constant statistics")
    need(not node.options.get("training_mode"), "with stored statistics (no training_mode)")
    need(node.options.get("spatial", 1) == 1, "with one mean a channel (no spatial=0)")
    need(sum(bool(name) for name in node.outputs) == 1, "with one output")
    rank = len(node.shape())
    need(2 <= rank <= 5, "of N×C, N×C×L, N×C×H×W or N×C×D×H×W")
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank]
    gamma, beta, mean, variance = (torch.from_numpy(np.array(v, np.float32)) for v in values)
    made = kind(len(gamma), node.options.get("epsilon", 1e-5), 1 - node.options.get("momentum", 0.9))
    assert isinstance(made, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    made.weight.data, made.bias.data = gamma, beta
    made.running_mean, made.running_var = mean, variance
    return made


def _fill(module: nn.Module, weight: Any, bias: Any) -> None:
    with torch.no_grad():
        for name, values in (("weight", weight), ("bias", bias)):
            if values is not None:
                getattr(module, name).copy_(torch.from_numpy(np.array(values, np.float32)))


def _prelu(node: Node) -> nn.Module:
    slope = node.constant(1)
    rank = len(node.shape())
    if slope is None:
        return Bound(node, lambda x, a: F.prelu(x, a.reshape(-1)))
    wide = (1,) * (rank - slope.ndim) + slope.shape  # broadcast as numpy does it, from the last axis
    if slope.size == 1 or (rank >= 2 and wide[1] == slope.size):
        made = nn.PReLU(slope.size)
        _fill(made, slope.reshape(-1), None)
        return made
    need(len(wide) == rank and wide[0] == 1, "with a slope for each channel or value")
    return Bound(node, lambda x, a: torch.clamp(x, min=0) + a * torch.clamp(x, max=0))


def _pool(node: Node, *, largest: bool) -> nn.Module:
    kernel = node.options["kernel_shape"]
    n = len(kernel)
    sides = _sides(node, kernel)
    strides, dilations = (node.options.get(name, [1] * n) for name in ("strides", "dilations"))
    ceil = bool(node.options.get("ceil_mode", 0))
    need(sum(bool(name) for name in node.outputs) == 1 and not node.options.get("storage_order"), "with one output")
    if largest:
        run = getattr(F, f"max_pool{n}d")

        def pooled(x: Tensor) -> Tensor:
            x = F.pad(x, _flat(sides), value=-math.inf) if any(map(any, sides)) else x
            result: Tensor = run(x, kernel, strides, 0, dilations, ceil)
            return result

        return Function(pooled)
    need(all(d == 1 for d in dilations), "without dilation")
    mean = getattr(F, f"avg_pool{n}d")
    counted = bool(node.options.get("count_include_pad", 0))
    if all(a == b for a, b in sides):
        return Function(lambda x: mean(x, kernel, strides, [a for a, _ in sides], ceil, counted))
    need(not ceil, "with the same padding on opposite sides, or without ceil_mode")

    def uneven(x: Tensor) -> Tensor:
        total: Tensor = mean(F.pad(x, _flat(sides)), kernel, strides)
        return total if counted else total / mean(F.pad(torch.ones_like(x), _flat(sides)), kernel, strides)

    return Function(uneven)


def _reduce(node: Node, run: Callable[[Tensor, list[int], bool], Tensor]) -> nn.Module:
    rank = len(node.shape())
    axes = node.setting("axes", 1)
    if not axes and node.options.get("noop_with_empty_axes"):
        return nn.Identity()
    chosen = [node.axis(a) for a in axes] if axes else list(range(rank))
    need(0 not in chosen, "behind the batch")
    keep = bool(node.options.get("keepdims", 1))
    return Function(lambda x: run(x, chosen, keep))


def _clip(node: Node) -> nn.Module:
    low, high = node.setting("min", 1), node.setting("max", 2)
    if (low, high) == (0, 6):
        return nn.ReLU6()
    return Function(lambda x: torch.clamp(x, low, high) if (low, high) != (None, None) else x)


def _arithmetic(run: Callable[[Tensor, Tensor], Tensor]) -> Translate:
    return lambda node: Bound(node, run)


def _extreme(node: Node, *, largest: bool) -> nn.Module:
    scalars = [c for i in range(len(node.inputs)) if (c := node.constant(i)) is not None and c.size == 1]
    if len(node.inputs) == 2 and len(scalars) == 1:
        limit = float(scalars[0].reshape(-1)[0])
        return Function(lambda x: torch.clamp(x, min=limit) if largest else torch.clamp(x, max=limit))
    need(len(node.inputs) == 2, "of two tensors")
    return Bound(node, torch.maximum if largest else torch.minimum)


def _power(node: Node) -> nn.Module:
    exponent = node.constant(1)
    need(exponent is not None and exponent.size == 1, "to a constant power")
    assert exponent is not None
    number = float(exponent.reshape(-1)[0])
    return Function((lambda x: x * x) if number == 2 else (lambda x: torch.pow(x, number)))


def _pad(node: Node) -> nn.Module:
    rank = len(node.shape())
    pads = node.setting("pads", 1)
    axes = [a % rank for a in (node.setting("axes", 3) or range(rank))]
    sides = [(0, 0)] * rank
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        sides[axis] = (before, after)
    need(sides[0] == (0, 0), "behind the batch")
    mode = node.options.get("mode", b"constant").decode()
    value = node.setting("value", 2, 0.0) or 0.0
    value = value[0] if isinstance(value, list) else value
    if mode == "constant":
        return Function(lambda x: F.pad(x, _flat(sides[1:]), value=value))
    need(mode in ("reflect", "edge") and sides[1] == (0, 0) and rank > 2, "of images, by a value, mirrored or the edge")
    how = "reflect" if mode == "reflect" else "replicate"
    return Function(lambda x: F.pad(x, _flat(sides[2:]), mode=how))


def _concat(node: Node) -> nn.Module:
    variable = next(i for i, name in enumerate(node.inputs) if name in node.variables)
    axis = node.axis(node.options["axis"], len(node.shape(variable)))
    need(len(node.variables) == len(node.inputs), "of tensors none of which is a constant")
    return Function(lambda *parts: torch.cat(parts, axis))


def _split(node: Node) -> nn.Module:
    axis = node.axis(node.options.get("axis", 0))
    sizes = node.setting("split", 1)
    size, count = node.shape()[axis], len(node.outputs)
    each = math.ceil(size / count)
    parts = sizes or [min(each, size - i * each) for i in range(count)]
    return Function(lambda x: torch.split(x, parts, axis) if count > 1 else x)


def _slice(node: Node) -> nn.Module:
    starts, ends = node.setting("starts", 1), node.setting("ends", 2)
    axes = node.setting("axes", 3) or list(range(len(starts)))
    steps = node.setting("steps", 4) or [1] * len(starts)
    need(all(step > 0 for step in steps), "with steps forward")
    rank = len(node.shape())
    cuts: list[slice] = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cut = slice(start, end, step)
        whole = axis % rank == 0 and start == 0 and end >= 1 << 31 and step == 1
        cuts[axis if whole else node.axis(axis)] = cut
    return Function(lambda x: x[tuple(cuts)])


def _gather(node: Node) -> nn.Module:
    indices = node.constant(1)
    axis = node.axis(node.options.get("axis", 0))
    need(indices is not None and indices.ndim <= 1, "of whole channels")
    assert indices is not None
    size = node.shape()[axis]
    chosen = [int(i) % size if i < 0 else int(i) for i in indices.reshape(-1)]
    if indices.ndim == 0:
        return Function(lambda x: x.select(axis, chosen[0]))
    if len(chosen) <= 4:  # slices put together: XNNPACK does not pick by index
        return Function(lambda x: torch.cat([x.narrow(axis, i, 1) for i in chosen], axis))
    return Bound(node, lambda x, which: torch.index_select(x, axis, which.long() % size))


def _transpose(node: Node) -> nn.Module:
    perm = list(node.options.get("perm", range(len(node.shape()))[::-1]))
    need(perm[0] == 0, "behind the batch")
    return Function(lambda x: torch.permute(x, perm))


def _flatten(node: Node) -> nn.Module:
    need(node.options.get("axis", 1) % len(node.shape()) == 1, "behind the batch")
    return nn.Flatten(1)


def _reshape(node: Node) -> nn.Module:
    wanted = node.setting("shape", 1)
    shape = node.shape()
    sizes = [shape[i] if size == 0 and i else size for i, size in enumerate(wanted)]
    need(len(sizes) > 1 and not (node.options.get("allowzero") and 0 in wanted), "of what is behind the batch")
    if all(shape[1:]):
        total = math.prod(shape[1:])
        rest = [s if s > 0 else total // max(1, math.prod(s for s in sizes[1:] if s > 0)) for s in sizes[1:]]
        need(math.prod(rest) == total, "of what is behind the batch")
    else:
        need(sizes[0] in (0, -1) and len(sizes) == 2, "to flatten what is behind the batch")
        rest = [-1]
    return nn.Flatten(1) if len(rest) == 1 else Function(lambda x: x.reshape(x.shape[0], *rest))


def _squeeze(node: Node) -> nn.Module:
    shape, given = node.shape(), node.setting("axes", 1)
    axes = given if given is not None else [i for i, size in enumerate(shape) if size == 1 and i]
    chosen = sorted((node.axis(a) for a in axes), reverse=True)

    def run(x: Tensor) -> Tensor:
        for axis in chosen:
            x = x.squeeze(axis)
        return x

    return Function(run)


def _unsqueeze(node: Node) -> nn.Module:
    axes = node.setting("axes", 1)
    chosen = sorted(node.axis(a, len(node.shape()) + len(axes)) for a in axes)

    def run(x: Tensor) -> Tensor:
        for axis in chosen:
            x = x.unsqueeze(axis)
        return x

    return Function(run)


def _normalise(node: Node) -> nn.Module:
    axis, order = node.axis(node.options.get("axis", -1)), node.options.get("p", 2)
    return Function(lambda x: x / x.norm(order, axis, keepdim=True))


def _layer_norm(node: Node) -> nn.Module:
    axis = node.axis(node.options.get("axis", -1))
    sizes = node.shape()[axis:]
    scale, shift = node.constant(1), node.constant(2)
    need(all(sizes) and scale is not None and scale.shape == sizes, "over static sizes with a constant scale")
    made = nn.LayerNorm(sizes, node.options.get("epsilon", 1e-5), bias=shift is not None)
    _fill(made, scale, shift)
    return made


def _cast(node: Node) -> nn.Module:
    need(node.options["to"] == onnx.TensorProto.FLOAT, "to float32")
    return Function(lambda x: x.float())


def _global_pool(run: Callable[..., Tensor]) -> Translate:
    def translate(node: Node) -> nn.Module:
        spatial = list(range(2, len(node.shape())))
        return Function(lambda x: run(x, spatial, keepdim=True))

    return translate


def _softmax(node: Node) -> nn.Module:
    rank = len(node.shape())
    axis = node.axis(node.options.get("axis", 1 if node.opset < 13 else -1))
    need(node.opset >= 13 or axis == rank - 1, "over the last axis")
    return Function(lambda x: torch.softmax(x, axis))


def _pure(run: Callable[..., Tensor]) -> Translate:
    return lambda node: Bound(node, run)


def _hard_sigmoid(node: Node) -> nn.Module:
    alpha, beta = node.options.get("alpha", 0.2), node.options.get("beta", 0.5)
    return Function(lambda x: torch.clamp(alpha * x + beta, 0, 1))


OPERATORS: dict[str, Translate] = {
    "Abs": _pure(torch.abs),
    "Add": _arithmetic(torch.add),
    "AveragePool": partial(_pool, largest=False),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _arithmetic(torch.div),
    "Dropout": lambda node: nn.Identity(),
    "Elu": lambda node: nn.ELU(node.options.get("alpha", 1.0)),
    "Erf": _pure(torch.erf),
    "Exp": _pure(torch.exp),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": lambda node: nn.GELU(node.options.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda node: nn.Hardswish(),
    "Identity": lambda node: nn.Identity(),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node: nn.LeakyReLU(node.options.get("alpha", 0.01)),
    "LpNormalization": _normalise,
    "MatMul": _matmul,
    "Max": partial(_extreme, largest=True),
    "MaxPool": partial(_pool, largest=True),
    "Min": partial(_extreme, largest=False),
    "Mul": _arithmetic(torch.mul),
    "Neg": _pure(torch.neg),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _power,
    "Reciprocal": _pure(torch.reciprocal),
    "ReduceL1": partial(_reduce, run=lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": partial(_reduce, run=lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceMax": partial(_reduce, run=torch.amax),
    "ReduceMean": partial(_reduce, run=torch.mean),
    "ReduceSum": partial(_reduce, run=torch.sum),
    "ReduceSumSquare": partial(_reduce, run=lambda x, axes, keep: x.square().sum(axes, keep)),
    "Relu": lambda node: nn.ReLU(),
    "Reshape": _reshape,
    "Sigmoid": lambda node: nn.Sigmoid(),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _pure(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _arithmetic(torch.sub),
    "Tanh": lambda node: nn.Tanh(),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""Name of the operator → how a node of it becomes a module."""
