"""List the export formats, and build and check the targets that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pkd.export.checks.parity import GOLDEN_COUNT, GOLDEN_TOLERANCE, ParityRow, measure, onnx_runner
from pkd.export.formats import coreml, executorch, litert, ncnn, npu, openvino, tensorrt
from pkd.export.formats.base import ORT, Built, Embed, Format, Tell
from pkd.export.graph.precision_variants import GraphForm, PrecisionVariants, Variant
from pkd.export.graph.rewrite import decompose_prelu, split_prelu
from pkd.export.options import PRECISIONS, BuildOptions
from pkd.toolkit.bundle.golden import Golden
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.cli_support import tool_version
from pkd.toolkit.core.encoder_info import in_mode
from pkd.toolkit.core.errors import InputError, PkdError, TargetUnavailable, plain_reason
from pkd.toolkit.core.extensions import load_object
from pkd.toolkit.core.progress import Progress
from pkd.toolkit.encoders.base import Embeddings, Encoder, NetEncoder
from pkd.toolkit.images.codec import Rgb


def _onnx(graph: Variant, precision: str, options: BuildOptions, tell: Tell) -> Built:
    embed = onnx_runner(graph.data, lambda crops: crops, "the graph for onnxruntime")
    return Built({"encoder.onnx": graph.data}, tool_version(), {}, ORT, embed)


FORMATS: dict[str, Format] = {
    "onnx": Format(
        "onnxruntime", ("fp32", "fp16", "int8", "w8a16"), GraphForm("u8s8", decompose_prelu, split_prelu), _onnx
    ),
    "openvino": openvino.FORMAT,
    "ncnn": ncnn.FORMAT,
    "executorch": executorch.FORMAT,
    "litert": litert.FORMAT,
    "coreml": coreml.FORMAT,
    "npu": npu.FORMAT,
    "trt": tensorrt.FORMAT,
    "trt-rtx": tensorrt.FORMAT_RTX,
}
"""Name for ``--format`` → format. A new one is a module like openvino.py and a line here."""


def find_format(name: str) -> Format:
    """Return the format of a name in ``FORMATS``, or the object that ``MODULE:NAME`` names. Raises InputError."""
    if name in FORMATS:
        return FORMATS[name]
    found = load_object(name, "--format", ", ".join(FORMATS))
    if not isinstance(found, Format):
        raise InputError(f"--format {name}: is a {type(found).__name__}. It must be a pkd.export.formats.base.Format.")
    taken = next((other for other, format in FORMATS.items() if format.runtime == found.runtime), None)
    if taken:
        raise InputError(f"--format {name}: its runtime {found.runtime} is that of --format {taken}. Choose another.")
    if not found.runtime.isascii() or not found.runtime.replace("_", "").isalnum():
        raise InputError(f"--format {name}: its runtime {found.runtime!r} must be letters, digits and underscores.")
    if not found.precisions or not set(found.precisions) <= set(PRECISIONS):
        raise InputError(f"--format {name}: its precisions {found.precisions} must be some of {', '.join(PRECISIONS)}.")
    return found


@dataclass(frozen=True)
class TargetRequest:
    """Ask for one target: a format, by the name that the command line gives it, in one precision."""

    format_name: str
    format: Format
    precision: str

    @property
    def name(self) -> str:
        """Name the target: ``<runtime>-<precision>``."""
        return f"{self.format.runtime}-{self.precision}"


def target_requests(names: Sequence[str], precisions: Sequence[str]) -> list[TargetRequest]:
    """Pair every format with every precision that it has.

    Raises InputError for a format or a precision that would be left with none.
    """
    formats = {name: find_format(name) for name in names}
    for name, format in formats.items():
        if not set(precisions) & set(format.precisions):
            raise InputError(
                f"--format {name} has no {' or '.join(precisions)}; it has {', '.join(format.precisions)}."
            )
    for precision in precisions:
        if not any(precision in format.precisions for format in formats.values()):
            able = ", ".join(name for name, row in FORMATS.items() if precision in row.precisions)
            raise InputError(f"--precision {precision}: no chosen format has it. Add --format {able}.")
    return [
        TargetRequest(name, format, precision)
        for name, format in formats.items()
        for precision in dict.fromkeys(precisions)
        if precision in format.precisions
    ]


@dataclass(frozen=True)
class MissingTarget:
    """Say what could not be built here, and why; its graph is in the bundle all the same."""

    format: str
    precision: str
    reason: str


@dataclass
class BuildResults:
    """Hold what was built: targets, their files, how they compare with the source, and what could not be built."""

    targets: list[Target] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    parity: list[ParityRow] = field(default_factory=list)
    missing: dict[str, MissingTarget] = field(default_factory=dict)
    """Target name → why it was not built."""
    encoders: dict[str, Encoder] = field(default_factory=dict)
    """Target name → the target as an encoder, or its graph in onnxruntime where the target cannot run here. Formats
    that are computed ``elsewhere`` have none."""

    def replaced(self, newer: BuildResults) -> BuildResults:
        """Return these results with the targets of ``newer`` in the place of those of the same name."""
        named = {target.name: target for target in newer.targets}
        prefixes = tuple(f"targets/{name}/" for name in named)
        return BuildResults(
            [named.get(target.name, target) for target in self.targets],
            {name: data for name, data in self.files.items() if not name.startswith(prefixes)} | newer.files,
            [row for row in self.parity if row.graph not in named] + newer.parity,
            {name: entry for name, entry in self.missing.items() if name not in named} | newer.missing,
            self.encoders | newer.encoders,
        )


@dataclass(frozen=True)
class TargetBuilder:
    """Build targets from the variants of one graph, and compare each with the source's own embeddings."""

    variants: PrecisionVariants
    options: BuildOptions
    standard: Golden
    """Crops, of which the first are the golden ones, and the source's embeddings of them."""
    progress: Progress
    source_precision: str = "fp32"
    """Precision that the source itself computes in, whose limits fp32 is judged by."""

    def build(self, requests: Sequence[TargetRequest]) -> BuildResults:
        """Build and check every request.

        A target that this machine cannot build keeps its graph, checked in onnxruntime, and stays unbuilt. Raises
        InputError where a runtime cannot compute the graph, BadVector where it gives no finite rows.
        """
        results = BuildResults()
        for request in requests:
            try:
                with self.progress(request.name) as advance:
                    self._build(request, results, partial(advance, 0))
            except PkdError:
                raise
            except Exception as error:  # the runtimes' own errors share no public base class
                raise InputError(
                    f"{request.name}: {request.format.runtime} cannot run this network in {request.precision}: "
                    f"{plain_reason(error)} Nothing was written. Leave --format {request.format_name} out, or choose "
                    "another --precision for it."
                ) from None
        return results

    def _build(self, request: TargetRequest, results: BuildResults, tell: Tell) -> None:
        name, precision = request.name, request.precision
        graph = self.variants.get(precision, request.format.form)
        reason, built = request.format.unavailable(), Built({}, tool_version(), {}, ORT, None)
        if reason is None:
            try:
                built = request.format.build(graph, precision, self.options, tell)
            except TargetUnavailable as error:
                reason = str(error)
        if reason is not None:
            results.missing[name] = MissingTarget(request.format_name, precision, reason)
        embed = built.embed or onnx_runner(graph.data, lambda crops: crops, name)
        crops, expected = self.standard.crops, self.standard.embeddings
        limits = self.source_precision if precision == "fp32" else precision
        results.parity += measure(name, expected, crops, embed, limits, built=bool(built.files))
        encoder = graph.encoder
        if request.format.elsewhere:
            encoder = in_mode(self.variants.encoder, f"{precision}-{request.format.runtime}")
        else:
            results.encoders[name] = NetEncoder(encoder, embed)

        plain = self.variants.get("fp32", GraphForm("")).data
        stored = "encoder.onnx" if graph.data == plain else f"targets/{name}/encoder.onnx"
        results.files |= {f"targets/{name}/{file}": data for file, data in built.files.items() if data != plain}
        if stored != "encoder.onnx":
            results.files[stored] = graph.data
        opened = next(iter(built.files), None)
        results.targets.append(
            Target(
                runtime=request.format.runtime,
                precision=precision,
                encoder=encoder,
                graph=stored,
                file=opened and (stored if built.files[opened] == graph.data else f"targets/{name}/{opened}"),
                golden_tolerance=_tolerance(embed, crops[:GOLDEN_COUNT], expected[:GOLDEN_COUNT]),
                checked_with=built.checked_with,
                made_with=built.made_with,
                settings={**graph.settings, **built.settings},
            )
        )


def _tolerance(embed: Embed, crops: Rgb, expected: Embeddings) -> float:
    """Return twice the error measured here: another processor's rounding passes, and another network does not."""
    rows = embed(crops).astype(np.float64)
    cosines = np.sum(rows * expected, axis=1) / np.linalg.norm(rows, axis=1)
    return float(min(1.0, max(GOLDEN_TOLERANCE, 2 * (1 - cosines.min()))))
