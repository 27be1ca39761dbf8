"""Read stage features: from named submodules of a torch network or named tensors of an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pkd.toolkit.core.errors import InputError, MissingExtra
from pkd.toolkit.distill.models.student import TorchEncoder
from pkd.toolkit.encoders.base import Encoder, OnnxEncoder, make_session, ort_reason
from pkd.toolkit.images.codec import Rgb

ALTERNATIVES = "Use rkd, cckd, kd or l2kd instead, which need its embeddings only."


class FeatureHooks:
    """Keep the outputs of a network's named submodules from its last forward pass."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self._outputs: dict[str, Tensor] = {}
        self._names = tuple(names)
        for name in self._names:
            network.get_submodule(name).register_forward_hook(self._keeper(name))

    def pop(self) -> list[Tensor]:
        """Return their outputs in order as float32, and forget them."""
        return [self._outputs.pop(name).float() for name in self._names]

    def _keeper(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._outputs[name] = output

        return keep


class TeacherStages(Protocol):
    """Compute a frozen teacher's stage features."""

    def __call__(self, crops: Rgb) -> list[Tensor]:
        """Map crops, uint8 N×H×W×3 RGB, to N×C×h×w float32 per stage, fine resolution first."""


class _TorchStages:
    def __init__(self, teacher: TorchEncoder, names: Sequence[str]) -> None:
        self._teacher = teacher
        self._taps = FeatureHooks(teacher.module, names)

    def __call__(self, crops: Rgb) -> list[Tensor]:
        self._teacher.embed(crops)
        return [features.clone() for features in self._taps.pop()]  # out of inference mode


class _OnnxStages:
    def __init__(self, teacher: OnnxEncoder, model: bytes, names: Sequence[str], threads: int) -> None:
        self._session = make_session(model, threads)
        self._names = list(names)
        self._teacher = teacher

    def __call__(self, crops: Rgb) -> list[Tensor]:
        fed = {self._session.get_inputs()[0].name: self._teacher.info.preprocess(crops)}
        return [torch.from_numpy(np.asarray(found, np.float32)) for found in self._session.run(self._names, fed)]


@dataclass(frozen=True)
class StagePlan:
    """Pair stages of student and teacher of equal resolution, fine first."""

    teacher: TeacherStages
    pairs: tuple[tuple[int, int], ...]
    """Positions among the student's and among the teacher's stages."""
    channels: list[tuple[int, int]]
    """(student, teacher) channels of each pair."""
    sides: list[int]
    """Height and width of each pair, pixels."""


def plan_stages(
    teacher: Encoder, names: Sequence[str], student: nn.Module, size: int, least: int, threads: int = 1
) -> StagePlan:
    """Pair the stages of a student and a teacher on crops of ``size`` pixels.

    ``names``: tensors of an ONNX teacher or submodules of a torch one; by default its stages, which in an ONNX graph
    are the last four-dimensional tensor at each resolution. ``least``: pairs the method needs. Raises InputError,
    saying what to use instead.
    """
    teacher_stages = open_stages(teacher, names, threads)
    crops = np.zeros((2, size, size, 3), np.uint8)
    taught = [tuple(features.shape[1:]) for features in teacher_stages(crops)]
    hooks = FeatureHooks(student, student.stages)  # type: ignore[arg-type]
    with torch.inference_mode():
        student.eval()(torch.zeros(2, 3, size, size))
    own = [tuple(features.shape[1:]) for features in hooks.pop()]
    by_side = {shape[-1]: i for i, shape in enumerate(taught) if len(shape) == 3 and shape[1] == shape[2]}
    pairs = tuple((i, by_side[shape[-1]]) for i, shape in enumerate(own) if shape[-1] in by_side)
    if len(pairs) < least:
        raise InputError(
            f"teacher {teacher.info.name}: its stages {_shapes(taught)} and the student's {_shapes(own)} have "
            f"{len(pairs)} resolutions in common, at least {least} are needed. Name others with --teacher-stages. "
            f"{ALTERNATIVES}"
        )
    return StagePlan(
        teacher_stages, pairs, [(own[i][0], taught[j][0]) for i, j in pairs], [own[i][-1] for i, _ in pairs]
    )  # fmt: skip


def open_stages(teacher: Encoder, names: Sequence[str], threads: int = 1) -> TeacherStages:
    """Open the stage features of a torch or ONNX teacher. Raises InputError naming the stages that it has."""
    if isinstance(teacher, TorchEncoder):
        names = tuple(names) or tuple(getattr(teacher.module, "stages", ()))
        known = dict(teacher.module.named_modules())
        if not names:
            raise InputError(f"teacher {teacher.info.name}: names no stages. Name submodules with --teacher-stages.")
        if unknown := [name for name in names if name not in known]:
            some = ", ".join([name for name in known if name.count(".") < 2][1:40])
            raise InputError(
                f"--teacher-stages {unknown[0]}: {teacher.info.name} has no such submodule. It has {some}."
            )
        return _TorchStages(teacher, names)
    if isinstance(teacher, OnnxEncoder) and teacher.path is not None:
        return _open_onnx_stages(teacher, names, threads)
    raise InputError(
        f"teacher {teacher.info.name}: the stages of a bundle's graph cannot be read. Give the ONNX file or the run "
        f"that it was made from. {ALTERNATIVES}"
    )


def _open_onnx_stages(teacher: OnnxEncoder, names: Sequence[str], threads: int) -> TeacherStages:
    try:
        import onnx
    except ImportError:
        raise MissingExtra("onnx", "export") from None
    assert teacher.path is not None
    model = onnx.shape_inference.infer_shapes(onnx.load(teacher.path))
    made = {name for node in model.graph.node for name in node.output}
    last: dict[int, str] = {}
    for tensor in model.graph.value_info:
        shape = [d.dim_value for d in tensor.type.tensor_type.shape.dim]
        floats = tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        if tensor.name in made and floats and len(shape) == 4 and shape[2] == shape[3] > 1 and shape[1] > 3:
            last[shape[2]] = tensor.name
    if unknown := [name for name in names if name not in made]:
        found = ", ".join(f"{name} ({side}×{side})" for side, name in sorted(last.items(), reverse=True)) or "none"
        raise InputError(
            f"--teacher-stages {unknown[0]}: {teacher.path.name} has no such tensor. The last of each size: {found}."
        )
    chosen = list(names) or [last[side] for side in sorted(last, reverse=True)]
    if not chosen:
        raise InputError(f"teacher {teacher.path}: its graph shows no stage features (N×C×H×W tensors). {ALTERNATIVES}")
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in chosen if name not in present)
    try:
        stages = _OnnxStages(teacher, model.SerializeToString(), chosen, threads)
        size = teacher.info.preprocess.size
        stages(np.zeros((2, size, size, 3), np.uint8))
    except Exception as error:  # onnxruntime's own errors share no public base class
        raise InputError(
            f"teacher {teacher.path}: its stages cannot be read: {ort_reason(error)} {ALTERNATIVES}"
        ) from None
    return stages


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in shapes) or "(none)"
