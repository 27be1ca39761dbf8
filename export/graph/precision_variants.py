"""Make the encoder's graph in a precision, as one family of runtimes wants it, and say which encoder it computes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx

from pkd.export.graph.build import serialise
from pkd.export.graph.fp16 import to_half
from pkd.export.graph.rewrite import shorten_names
from pkd.export.quantization.quantize import (
    LayerCost,
    calibrate,
    embeddings,
    layers,
    quantise,
    sensitivity,
    similarity_rms,
)
from pkd.export.quantization.ranges import Calibration, Ranges
from pkd.toolkit.core.encoder_info import EncoderInfo, in_mode
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.progress import Progress

Settings = dict[str, str | int | float | bool]
INT8_SETTINGS = (
    *("int8", "calibration", "layers_in_fp32", "similarity_rms"),
    *("qat_steps", "qat_images", "qat_data", "qat_seed", "qat_from", "qat_encoder"),
)
"""Settings of a target that belong to its INT8 graph, not to the file that was built from it."""
Rewrite = Callable[[onnx.ModelProto], onnx.ModelProto]


@dataclass(frozen=True)
class GraphForm:
    """Say how a family of runtimes wants the graph of each precision written."""

    int8: str
    """Type of INT8: one of quantize.INT8_TYPES."""
    float_rewrite: Rewrite | None = None
    """Rewrite of graphs in float; None: they stay as they are."""
    int8_rewrite: Rewrite | None = None
    """Rewrite of a graph after it was quantised, whose own sums are not to be rounded."""
    wide: str = "u16s8"
    """Type of w8a16: ``u16s8`` or ``s16s8``."""


@dataclass(frozen=True)
class Variant:
    """Hold a graph as bytes of an ONNX file, the encoder that it computes, and what its numbers depend on."""

    data: bytes
    encoder: EncoderInfo
    settings: Settings


@dataclass(frozen=True)
class Int8Weights:
    """Hold what INT8 graphs are made from: the plain uint8 graph, its encoder, and how its weights were trained on."""

    plain: onnx.ModelProto
    encoder: EncoderInfo
    settings: Settings = field(default_factory=dict)


@dataclass
class _Int8State:
    """Keep what is known of one INT8 form: ranges and costs are measured once for given weights."""

    weights: Int8Weights
    label: str
    ranges: Ranges
    in_float: int
    """Number of the costliest layers that stay in float32."""
    costs: list[LayerCost] = field(default_factory=list)


@dataclass
class PrecisionVariants:
    """Make each variant once, on demand, from the plain uint8 graph ``plain`` of ``encoder``."""

    plain: onnx.ModelProto
    encoder: EncoderInfo
    calibration: Calibration | None
    """Real crops that INT8 needs; None: there can be no INT8."""
    keep_float: int
    """Number of the costliest layers that stay in float32 in INT8."""
    progress: Progress
    known: dict[tuple[str, GraphForm], Variant] = field(default_factory=dict)
    """Precision and form → variant: those of an older bundle at first, then all that were made."""
    costs: dict[str, list[LayerCost]] = field(default_factory=dict)
    """INT8 type, ``(qat)`` where its weights were trained on → cost of each layer, where that was measured."""
    _int8: dict[GraphForm, _Int8State] = field(default_factory=dict)

    def get(self, precision: str, form: GraphForm) -> Variant:
        """Return the graph in ``precision``. Raises InputError where it cannot be made."""
        if (precision, form) not in self.known:
            self.known[precision, form] = self._make(precision, form)
        return self.known[precision, form]

    def keep_in_float(self, form: GraphForm, count: int) -> None:
        """Leave ``count`` of the costliest layers of this INT8 form in float32 from now on."""
        self._state(form).in_float = count
        self.known.pop(("int8", form), None)

    def use_weights(self, form: GraphForm, weights: Int8Weights) -> None:
        """Make this INT8 form from other weights from now on."""
        self._int8[form] = self._measured(form, weights, " (qat)")
        self.known.pop(("int8", form), None)

    def layer_count(self, form: GraphForm) -> int:
        """Count the layers that INT8 computes."""
        return len(layers(self._state(form).weights.plain))

    def _make(self, precision: str, form: GraphForm) -> Variant:
        if precision == "int8":
            return self._quantised(form)
        if precision == "w8a16":
            return self._wide(form)
        graph = form.float_rewrite(self.plain) if form.float_rewrite else self.plain
        if precision == "fp16":
            graph = shorten_names(to_half(graph))
        return Variant(serialise(graph), in_mode(self.encoder, precision), {})  # the runtime rounds bf16 itself

    def _quantised(self, form: GraphForm) -> Variant:
        state, calibration = self._state(form), self._require_calibration()
        in_float = self._costliest(form, state)
        made = quantise(state.weights.plain, state.ranges, form.int8, in_float)
        if form.int8_rewrite:
            made = form.int8_rewrite(made)
        data = serialise(shorten_names(made))
        held = calibration.held_out
        settings: Settings = {
            "int8": form.int8,
            "calibration": f"{calibration.method} on {len(calibration.crops)} crops of {calibration.name}",
            "layers_in_fp32": ", ".join(in_float) or "none",
            "similarity_rms": round(similarity_rms(embeddings(made, held), embeddings(self.plain, held)), 5),
            **state.weights.settings,
        }
        digest = hashlib.sha256(data).hexdigest()  # another calibration is another encoder
        return Variant(data, in_mode(state.weights.encoder, f"int8-{form.int8}-{digest[:16]}"), settings)

    def _wide(self, form: GraphForm) -> Variant:
        """Make the graph of 8-bit weights and 16-bit activations: of so many steps none has to be saved by clipping."""
        calibration = self._require_calibration()
        with self.progress("calibrate w8a16", len(calibration.crops)) as advance:
            ranges = calibrate(self.plain, calibration.crops, "minmax", advance)
        made = quantise(self.plain, ranges, form.wide)
        data = serialise(shorten_names(form.int8_rewrite(made) if form.int8_rewrite else made))
        held = calibration.held_out
        settings: Settings = {
            "int8": form.wide,
            "calibration": f"minmax on {len(calibration.crops)} crops of {calibration.name}",
            "similarity_rms": round(similarity_rms(embeddings(made, held), embeddings(self.plain, held)), 5),
        }
        return Variant(data, in_mode(self.encoder, f"w8a16-{hashlib.sha256(data).hexdigest()[:16]}"), settings)

    def _state(self, form: GraphForm) -> _Int8State:
        if form not in self._int8:
            self._int8[form] = self._measured(form, Int8Weights(self.plain, self.encoder), "")
        return self._int8[form]

    def _measured(self, form: GraphForm, weights: Int8Weights, note: str) -> _Int8State:
        calibration, label = self._require_calibration(), f"{form.int8}{note}"
        with self.progress(f"calibrate int8-{label}", calibration.passes * len(calibration.crops)) as advance:
            ranges = calibrate(weights.plain, calibration.crops, calibration.method, advance)
        return _Int8State(weights, label, ranges, self.keep_float)

    def _costliest(self, form: GraphForm, state: _Int8State) -> list[str]:
        if state.in_float and not state.costs:
            plain, held = state.weights.plain, self._require_calibration().held_out
            expected = embeddings(self.plain, held)
            with self.progress(f"layer sensitivity int8-{state.label}", len(layers(plain))) as advance:
                state.costs = sensitivity(plain, state.ranges, form.int8, held, advance, expected)
            self.costs[state.label] = state.costs
        return [cost.layer for cost in state.costs[: state.in_float]]

    def _require_calibration(self) -> Calibration:
        if self.calibration is None:
            raise InputError("--precision int8 and w8a16 need real crops for their ranges: pass --calib DIR or LIST.")
        return self.calibration
