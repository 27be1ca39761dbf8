"""Typed graphs: the encoder's graph in a precision, as one family of runtimes wants it, and whose numbers it gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx

from pkd.export.calibration import Calibration
from pkd.export.half import to_half
from pkd.export.quantize import LayerCost, calibrate, embeddings, layers, quantise, sensitivity, similarity_rms
from pkd.export.ranges import Ranges
from pkd.export.rewrite import decompose_prelu, shorten_names
from pkd.export.to_onnx import serialise
from pkd.toolkit.errors import InputError
from pkd.toolkit.space import EncoderInfo, in_mode

Settings = dict[str, str | int | float | bool]
Progress = Callable[[str, int], Callable[[int], None]]
"""Label and total → a function that is told of each step."""


@dataclass(frozen=True)
class Form:
    """What distinguishes the graphs of two runtimes in one precision."""

    int8: str
    """One of quantize.FORMS."""
    keeps_prelu: bool


@dataclass(frozen=True)
class TypedGraph:
    """A graph as bytes of an ONNX file, the encoder that it computes, and what its numbers depend on."""

    data: bytes
    encoder: EncoderInfo
    settings: Settings


@dataclass
class TypedGraphs:
    """Makes each graph once, on demand, from the plain uint8 graph ``plain`` of the encoder ``info``."""

    plain: onnx.ModelProto
    info: EncoderInfo
    calibration: Calibration | None
    keep_float: int
    progress: Progress
    costs: dict[str, list[LayerCost]] = field(default_factory=dict)
    """INT8 form → what each layer costs, where that was measured."""
    _made: dict[tuple[str, Form], TypedGraph] = field(default_factory=dict)

    def give(self, precision: str, form: Form, graph: TypedGraph) -> None:
        """A graph that is known already, from an older bundle."""
        self._made.setdefault((precision, form), graph)

    def get(self, precision: str, form: Form) -> TypedGraph:
        """The graph in ``precision``. Raises InputError where it cannot be made."""
        if (precision, form) not in self._made:
            self._made[precision, form] = self._make(precision, form)
        return self._made[precision, form]

    def _make(self, precision: str, form: Form) -> TypedGraph:
        graph = self.plain if form.keeps_prelu else decompose_prelu(self.plain)
        if precision == "fp32":
            return TypedGraph(serialise(graph), self.info, {})
        if precision == "bf16":  # the runtime rounds, see openvino_runtime.HINTS
            return TypedGraph(serialise(graph), in_mode(self.info, "bf16"), {})
        if precision == "fp16":
            return TypedGraph(serialise(shorten_names(to_half(graph))), in_mode(self.info, "fp16"), {})
        return self._int8(graph, form)

    def _int8(self, graph: onnx.ModelProto, form: Form) -> TypedGraph:
        calibration = self.calibration
        if calibration is None:
            raise InputError("--precision int8 needs real crops to find the ranges on: pass --calib DIR or LIST.")
        crops, method = calibration.crops, calibration.method
        passes = 1 if method == "minmax" else 2
        ranges = calibrate(graph, crops, method, self.progress(f"calibrate int8-{form.int8}", passes * len(crops)))
        keep = self._costliest(graph, ranges, form.int8, calibration)
        made = quantise(graph, ranges, form.int8, keep)
        data = serialise(shorten_names(made))
        held = calibration.held_out
        settings: Settings = {
            "int8": form.int8,
            "calibration": f"{method} on {len(crops)} crops of {calibration.name}",
            "layers_in_fp32": ", ".join(keep) or "none",
            "similarity_rms": round(similarity_rms(embeddings(made, held), embeddings(graph, held)), 5),
        }
        digest = hashlib.sha256(data).hexdigest()  # another calibration is another encoder
        return TypedGraph(data, in_mode(self.info, f"int8-{form.int8}-{digest[:16]}"), settings)

    def _costliest(self, graph: onnx.ModelProto, ranges: Ranges, form: str, calibration: Calibration) -> list[str]:
        if not self.keep_float:
            return []
        advance = self.progress(f"layer sensitivity int8-{form}", len(layers(graph)))
        self.costs[form] = sensitivity(graph, ranges, form, calibration.held_out, advance)
        return [cost.layer for cost in self.costs[form][: self.keep_float]]
