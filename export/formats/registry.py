"""Targets: which runtimes an encoder can be exported to, in which precisions. One table, one small function each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pkd.export.checks.golden import COUNT, TOLERANCE
from pkd.export.checks.parity import ParityRow, measure, onnx_runner
from pkd.export.formats.executorch import to_executorch
from pkd.export.formats.ncnn import to_ncnn
from pkd.export.formats.openvino import to_ir
from pkd.export.formats.tensorrt import BuildOptions, build_engine
from pkd.export.graph.precision_variants import Form, Settings, TypedGraph, TypedGraphs
from pkd.export.graph.rewrite import decompose_prelu, split_prelu
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.cli_support import tool_version
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import InputError, TargetUnavailable
from pkd.toolkit.encoders.base import Embeddings, Encoder, unit_rows
from pkd.toolkit.encoders.executorch import ExecuTorchNet
from pkd.toolkit.encoders.ncnn import NcnnNet
from pkd.toolkit.encoders.openvino import HINTS, OpenVinoModel
from pkd.toolkit.encoders.tensorrt import load_engine
from pkd.toolkit.images.codec import Rgb

Embed = Callable[[Rgb], NDArray[np.float32]]
Tell = Callable[[str], None]
PORTS = ("crops", "embedding")
"""Input and output of every graph of a bundle, see to_onnx."""
ORT = f"onnxruntime {onnxruntime.__version__}"


@dataclass(frozen=True)
class Built:
    """What a runtime loads: files by name (the first is opened), what made them, and a way to run them here."""

    files: dict[str, bytes]
    made_with: str
    settings: Settings
    checked_with: str
    """The runtime that ``embed`` runs in, and its version."""
    embed: Embed | None
    """Raw rows of the built file itself; None where only a device that is not here can run it."""


def _onnx(graph: TypedGraph, precision: str, options: BuildOptions, tell: Tell) -> Built:
    embed = onnx_runner(graph.data, lambda crops: crops, "the graph for onnxruntime")
    return Built({"encoder.onnx": graph.data}, tool_version(), {}, ORT, embed)


def _openvino(graph: TypedGraph, precision: str, options: BuildOptions, tell: Tell) -> Built:
    xml, weights, version = to_ir(graph.data)
    model = OpenVinoModel(xml, weights, precision, 1)
    settings: Settings = {"INFERENCE_PRECISION_HINT": HINTS[precision]}
    return Built({"encoder.xml": xml, "encoder.bin": weights}, f"openvino {version}", settings, model.version, model)


def _ncnn(graph: TypedGraph, precision: str, options: BuildOptions, tell: Tell) -> Built:
    param, weights, version = to_ncnn(graph.data)
    net = NcnnNet(param, weights, 1)
    return Built({"encoder.param": param, "encoder.bin": weights}, f"pnnx {version}", {}, net.version, net)


def _executorch(graph: TypedGraph, precision: str, options: BuildOptions, tell: Tell) -> Built:
    program, given, version = to_executorch(graph.data)
    net = ExecuTorchNet(program, 1)
    settings: Settings = {"xnnpack_operations": given}
    return Built({"encoder.pte": program}, f"executorch {version}", settings, net.version, net)


def _tensorrt(graph: TypedGraph, precision: str, options: BuildOptions, tell: Tell) -> Built:
    return _engine("tensorrt", graph, options, tell)


def _tensorrt_rtx(graph: TypedGraph, precision: str, options: BuildOptions, tell: Tell) -> Built:
    return _engine("tensorrt_rtx", graph, options, tell)


def _engine(package: str, graph: TypedGraph, options: BuildOptions, tell: Tell) -> Built:
    engine = build_engine(package, graph.data, options, tell)
    made_with, embed = f"{package} {engine.version}", None
    with suppress(TargetUnavailable):  # built here, but it runs elsewhere
        embed = load_engine(package, engine.data, engine.settings, graph.encoder, PORTS).raw
    return Built({"encoder.engine": engine.data}, made_with, engine.settings, made_with if embed else ORT, embed)


@dataclass(frozen=True)
class Format:
    """One row of the table."""

    runtime: str
    precisions: tuple[str, ...]
    form: Form
    build: Callable[[TypedGraph, str, BuildOptions, Tell], Built]


TARGETS: dict[str, Format] = {
    "onnx": Format("onnxruntime", ("fp32", "fp16", "int8"), Form("u8s8", decompose_prelu, split_prelu), _onnx),
    "openvino": Format("openvino", ("fp32", "bf16", "int8"), Form("s8s8", decompose_prelu, decompose_prelu), _openvino),
    "ncnn": Format("ncnn", ("fp32",), Form("u8s8"), _ncnn),
    "executorch": Format("executorch", ("fp32", "int8"), Form("u8s8"), _executorch),
    "trt": Format("tensorrt", ("fp32", "fp16", "int8"), Form("s8s8"), _tensorrt),
    "trt-rtx": Format("tensorrt_rtx", ("fp32", "fp16", "int8"), Form("s8s8"), _tensorrt_rtx),
}
PRECISIONS = tuple(dict.fromkeys(precision for row in TARGETS.values() for precision in row.precisions))


@dataclass
class Made:
    """The targets, their files, the parity rows, and what could not be built and why."""

    targets: list[Target] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    rows: list[ParityRow] = field(default_factory=list)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)
    """Name → format, precision, reason."""
    encoders: dict[str, Encoder] = field(default_factory=dict)
    """Name → the target as an encoder; of one that cannot run here, its graph in onnxruntime."""

    def replaced(self, newer: Made) -> Made:
        """With the targets of ``newer`` in the place of those of the same name."""
        named = {target.name: target for target in newer.targets}
        prefixes = tuple(f"targets/{name}/" for name in named)
        return Made(
            [named.get(target.name, target) for target in self.targets],
            {name: data for name, data in self.files.items() if not name.startswith(prefixes)} | newer.files,
            [row for row in self.rows if row.graph not in named] + newer.rows,
            {name: entry for name, entry in self.missing.items() if name not in named} | newer.missing,
            self.encoders | newer.encoders,
        )


@dataclass(frozen=True)
class TargetEncoder:
    """A target that runs here."""

    info: EncoderInfo
    raw: Embed

    def embed(self, crops: Rgb) -> Embeddings:
        """uint8 N×S×S×3 → float32 N×D unit rows."""
        return unit_rows(self.raw(crops), self.info.name)


def wanted(formats: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair of the two that exists. Raises InputError for a format or a precision that would be left with none."""
    pairs = [(name, p) for name in dict.fromkeys(formats) for p in dict.fromkeys(precisions)]
    pairs = [(name, p) for name, p in pairs if p in TARGETS[name].precisions]
    for name in formats:
        if all(name != other for other, _ in pairs):
            raise InputError(
                f"--format {name} has no {' or '.join(precisions)}; it has {', '.join(TARGETS[name].precisions)}."
            )
    for precision in precisions:
        if all(precision != other for _, other in pairs):
            able = ", ".join(name for name, row in TARGETS.items() if precision in row.precisions)
            raise InputError(f"--precision {precision}: no chosen format has it. Add --format {able}.")
    return pairs


def make(
    pairs: Sequence[tuple[str, str]],
    graphs: TypedGraphs,
    options: BuildOptions,
    crops: Rgb,
    expected: Embeddings,
    tell: Tell,
) -> Made:
    """Build and check each pair of a format and a precision.

    One whose runtime is not here keeps its graph, checked in onnxruntime, and stays unbuilt. ``crops``: uint8
    N×S×S×3, the first of them the golden ones; ``expected``: the source's rows for them.
    """
    made = Made()
    plain = graphs.get("fp32", Form("")).data
    for chosen, precision in pairs:
        format = TARGETS[chosen]
        name = f"{format.runtime}-{precision}"
        tell(name)
        graph = graphs.get(precision, format.form)
        try:
            built = format.build(graph, precision, options, tell)
        except TargetUnavailable as reason:
            made.missing[name] = {"format": chosen, "precision": precision, "reason": str(reason)}
            built = Built({}, tool_version(), {}, ORT, None)
        embed = built.embed or onnx_runner(graph.data, lambda crops: crops, name)
        rows = measure(name, expected, crops, embed, precision)
        made.encoders[name] = TargetEncoder(graph.encoder, embed)
        files = {f"targets/{name}/{file}": data for file, data in built.files.items() if data != plain}
        stored = "encoder.onnx" if graph.data == plain else f"targets/{name}/encoder.onnx"
        if stored != "encoder.onnx":
            files[stored] = graph.data
        opened = next(iter(built.files), None)
        made.files |= files
        made.rows += rows
        made.targets.append(
            Target(
                runtime=format.runtime,
                precision=precision,
                encoder=graph.encoder,
                graph=stored,
                file=opened and (stored if built.files[opened] == graph.data else f"targets/{name}/{opened}"),
                golden_tolerance=_tolerance(embed, crops[:COUNT], expected[:COUNT]),
                checked_with=built.checked_with,
                made_with=built.made_with,
                settings={**graph.settings, **built.settings},
            )
        )
    return made


def _tolerance(embed: Embed, crops: Rgb, expected: Embeddings) -> float:
    """Twice what was measured here, so that another processor's rounding passes and another network does not."""
    rows = embed(crops).astype(np.float64)
    cosines = np.sum(rows * expected, axis=1) / np.linalg.norm(rows, axis=1)
    return float(min(1.0, max(TOLERANCE, 2 * (1 - cosines.min()))))
