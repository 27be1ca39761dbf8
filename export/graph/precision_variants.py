"""Typed graphs: the encoder's graph in a precision, as one family of runtimes wants it, and whose numbers it gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx

from pkd.export.graph.build import serialise
from pkd.export.graph.fp16 import to_half
from pkd.export.graph.rewrite import shorten_names
from pkd.export.quantization.calibration import Calibration
from pkd.export.quantization.quantize import (
    LayerCost,
    calibrate,
    embeddings,
    layers,
    quantise,
    sensitivity,
    similarity_rms,
)
from pkd.export.quantization.ranges import Ranges
from pkd.toolkit.core.encoder_info import EncoderInfo, in_mode
from pkd.toolkit.core.errors import InputError

Settings = dict[str, str | int | float | bool]
Rewrite = Callable[[onnx.ModelProto], onnx.ModelProto]
Progress = Callable[[str, int], Callable[[int], None]]
"""Label and total → a function that is told of each step."""


@dataclass(frozen=True)
class Form:
    """What distinguishes the graphs of two runtimes in one precision."""

    int8: str
    """One of quantize.FORMS."""
    float_rewrite: Rewrite | None = None
    """What a graph in float goes through; None: nothing."""
    int8_rewrite: Rewrite | None = None
    """What a graph goes through after it was quantised: its own sums are not to be rounded."""


@dataclass(frozen=True)
class TypedGraph:
    """A graph as bytes of an ONNX file, the encoder that it computes, and what its numbers depend on."""

    data: bytes
    encoder: EncoderInfo
    settings: Settings


@dataclass(frozen=True)
class Retrained:
    """Weights that were trained on for INT8: their plain uint8 graph, the encoder that it is, and how it was made."""

    plain: onnx.ModelProto
    info: EncoderInfo
    settings: Settings


@dataclass
class Int8Source:
    """What the INT8 graphs of one form are made from. Ranges and costs are measured once."""

    plain: onnx.ModelProto
    info: EncoderInfo
    settings: Settings
    label: str
    keep: int
    """How many of the costliest layers stay in float32."""
    ranges: Ranges
    costs: list[LayerCost] = field(default_factory=list)


@dataclass
class TypedGraphs:
    """Makes each graph once, on demand, from the plain uint8 graph ``plain`` of the encoder ``info``."""

    plain: onnx.ModelProto
    info: EncoderInfo
    calibration: Calibration | None
    keep_float: int
    progress: Progress
    costs: dict[str, list[LayerCost]] = field(default_factory=dict)
    """INT8 form, ``(qat)`` where its weights were trained on → what each layer costs, where that was measured."""
    _made: dict[tuple[str, Form], TypedGraph] = field(default_factory=dict)
    _sources: dict[Form, Int8Source] = field(default_factory=dict)

    def give(self, precision: str, form: Form, graph: TypedGraph) -> None:
        """A graph that is known already, from an older bundle."""
        self._made.setdefault((precision, form), graph)

    def get(self, precision: str, form: Form) -> TypedGraph:
        """The graph in ``precision``. Raises InputError where it cannot be made."""
        if (precision, form) not in self._made:
            self._made[precision, form] = self._make(precision, form)
        return self._made[precision, form]

    def leave(self, form: Form, count: int) -> None:
        """From now on ``count`` of the costliest layers of this INT8 form stay in float32."""
        self._source(form).keep = count
        self._made.pop(("int8", form), None)

    def retrain(self, form: Form, retrained: Retrained) -> None:
        """From now on this INT8 form is made from other weights."""
        self._sources[form] = self._measured(form, retrained.plain, retrained.info, retrained.settings, " (qat)")
        self._made.pop(("int8", form), None)

    def layers(self, form: Form) -> int:
        """How many layers INT8 computes."""
        return len(layers(self._source(form).plain))

    def _make(self, precision: str, form: Form) -> TypedGraph:
        if precision == "int8":
            return self._int8(form)
        graph = form.float_rewrite(self.plain) if form.float_rewrite else self.plain
        if precision == "fp32":
            return TypedGraph(serialise(graph), self.info, {})
        if precision == "bf16":  # the runtime rounds, see openvino_runtime.HINTS
            return TypedGraph(serialise(graph), in_mode(self.info, "bf16"), {})
        return TypedGraph(serialise(shorten_names(to_half(graph))), in_mode(self.info, "fp16"), {})

    def _int8(self, form: Form) -> TypedGraph:
        source, calibration = self._source(form), self._calibration()
        keep = self._costliest(form, source)
        made = quantise(source.plain, source.ranges, form.int8, keep)
        if form.int8_rewrite:
            made = form.int8_rewrite(made)
        data = serialise(shorten_names(made))
        held = calibration.held_out
        settings: Settings = {
            "int8": form.int8,
            "calibration": f"{calibration.method} on {len(calibration.crops)} crops of {calibration.name}",
            "layers_in_fp32": ", ".join(keep) or "none",
            "similarity_rms": round(similarity_rms(embeddings(made, held), embeddings(self.plain, held)), 5),
            **source.settings,
        }
        digest = hashlib.sha256(data).hexdigest()  # another calibration is another encoder
        return TypedGraph(data, in_mode(source.info, f"int8-{form.int8}-{digest[:16]}"), settings)

    def _source(self, form: Form) -> Int8Source:
        if form not in self._sources:
            self._sources[form] = self._measured(form, self.plain, self.info, {}, "")
        return self._sources[form]

    def _measured(
        self, form: Form, plain: onnx.ModelProto, info: EncoderInfo, settings: Settings, note: str
    ) -> Int8Source:
        calibration, label = self._calibration(), f"{form.int8}{note}"
        passes = 1 if calibration.method == "minmax" else 2
        advance = self.progress(f"calibrate int8-{label}", passes * len(calibration.crops))
        ranges = calibrate(plain, calibration.crops, calibration.method, advance)
        return Int8Source(plain, info, settings, label, self.keep_float, ranges)

    def _costliest(self, form: Form, source: Int8Source) -> list[str]:
        if source.keep and not source.costs:
            held = self._calibration().held_out
            advance = self.progress(f"layer sensitivity int8-{source.label}", len(layers(source.plain)))
            expected = embeddings(self.plain, held)
            source.costs = sensitivity(source.plain, source.ranges, form.int8, held, advance, expected)
            self.costs[source.label] = source.costs
        return [cost.layer for cost in source.costs[: source.keep]]

    def _calibration(self) -> Calibration:
        if self.calibration is None:
            raise InputError("--precision int8 needs real crops to find the ranges on: pass --calib DIR or LIST.")
        return self.calibration
