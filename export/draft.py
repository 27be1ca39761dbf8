"""Read what is exported, a run, a teacher or an older bundle, into a draft: the bundle before its targets are built."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import onnx

from pkd.export.checks.bench import BENCH
from pkd.export.checks.parity import (
    BATCHES,
    GOLDEN_COUNT,
    GOLDEN_TOLERANCE,
    insightface_blob,
    onnx_runner,
    synthetic_crops,
)
from pkd.export.formats.base import Embed
from pkd.export.formats.registry import FORMATS
from pkd.export.graph.build import (
    OPSET,
    UNIT,
    WEB_OPSET,
    float_graph,
    onnx_network,
    opset_of,
    serialise,
    torch_network,
    uint8_graph,
)
from pkd.export.graph.precision_variants import INT8_SETTINGS, GraphForm, Variant
from pkd.export.options import ExportOptions
from pkd.toolkit.bundle.bundle import Bundle, GraphSpec, Manifest
from pkd.toolkit.bundle.golden import Golden, pack_golden
from pkd.toolkit.core.cli_support import tool_version
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.base import Encoder, OnnxEncoder, open_bundle

Training = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Source:
    """Hold what is exported: an encoder, its network as ONNX, and where it came from."""

    name: str
    encoder: Encoder
    network: onnx.ModelProto
    """float N×3×S×S (preprocessed) → N×D (not normalised): what ``encoder`` computes."""
    training: Training

    @property
    def info(self) -> EncoderInfo:
        """The source's identity, which the bundle keeps."""
        return self.encoder.info


@dataclass(frozen=True)
class Draft:
    """Hold a bundle before its targets are built: a new one, or an older one that gets more."""

    reference: Encoder
    """Encoder that every graph and target is compared with."""
    standard: Golden
    """Synthetic crops for the largest batch of the parity check, and the reference's embeddings of them."""
    graph: onnx.ModelProto
    """``encoder.onnx``: uint8 crops in, unit rows out."""
    manifest: Manifest
    files: Mapping[str, bytes]
    """File name in the bundle → content."""
    unchecked: Mapping[str, Embed] = field(default_factory=dict)
    """Name → graph that was just made and must compute the reference."""
    extra_files: Mapping[Path, bytes] = field(default_factory=dict)
    """Path outside the bundle → content that is written together with it."""
    known: Mapping[tuple[str, GraphForm], Variant] = field(default_factory=dict)
    """Precision and form → graph of the older bundle, which is taken as it is."""
    signed: bool = False
    """Whether the older bundle's manifest is signed."""


def read_source(options: ExportOptions) -> Source:
    """Open the run or the teacher that the options name. Raises InputError."""
    return open_run(options.run) if options.run else open_teacher(str(options.teacher), options.teacher_preprocess)


def open_run(run: str) -> Source:
    """Open the student (or teacher) that pkd-distill left in the folder ``run``. Raises InputError for other things."""
    path = Path(run)
    if run.startswith("insightface:") or (path.is_file() and path.name != "student.pt"):
        raise InputError(f"{run}: not the folder of a pkd-distill run. Pass a teacher as --teacher {run}.")
    return _source(run, open_encoder(run))


def open_teacher(spec: str, preprocess: str | None) -> Source:
    """Open any encoder by its spelling: FILE.onnx, FILE.pt, ``insightface:PACK``, or a run folder."""
    return _source(spec, open_encoder(spec, preprocess))


def _source(spec: str, encoder: Encoder) -> Source:
    if isinstance(encoder, OnnxEncoder):
        if encoder.path is None:
            raise InputError(f"{spec}: is a bundle already. Export the run or the file it was made from.")
        digest = hashlib.sha256(encoder.path.read_bytes()).hexdigest()
        training: Training = {"source": encoder.path.name, "source_sha256": digest}
        return Source(spec, encoder, onnx_network(encoder.path, encoder.ports), training)

    from pkd.toolkit.distill.models.student import TorchEncoder  # torch is there: it opened the encoder

    if not isinstance(encoder, TorchEncoder):
        raise InputError(f"{spec}: a {type(encoder).__name__} cannot be exported.")
    network = torch_network(encoder.module, encoder.info.preprocess.size)
    return Source(spec, encoder, network, dict(encoder.training))


def draft_new(source: Source, licence: str, float_nchw: Path | None) -> Draft:
    """Begin a new bundle, and make the float graph for ``float_nchw``. Raises InputError where it has none."""
    info, preprocess = source.info, source.info.preprocess
    graph = uint8_graph(source.network, preprocess, info.space.dim)
    data, standard = serialise(graph), _standard(source.encoder)
    unchecked, extra_files = {"uint8 NHWC": onnx_runner(data, lambda crops: crops, source.name)}, {}
    if float_nchw:
        floats = extra_files[float_nchw] = serialise(float_graph(source.network, preprocess, info.space.dim))
        unchecked["float NCHW"] = onnx_runner(floats, insightface_blob, source.name)
    manifest = Manifest(
        encoder=info,
        graph=GraphSpec(opset=opset_of(graph)),
        golden_tolerance=GOLDEN_TOLERANCE,
        licence=licence,
        training=source.training,
        tool=tool_version(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files={},
    )
    golden = pack_golden(Golden(standard.crops[:GOLDEN_COUNT], standard.embeddings[:GOLDEN_COUNT]))
    files = {"encoder.onnx": data, "golden.npz": golden}
    return Draft(source.encoder, standard, graph, manifest, files, unchecked, extra_files)


def draft_from_bundle(path: Path, *, recalibrated: bool) -> Draft:
    """Open the bundle at ``path`` as a draft, with its graphs. Raises InputError for one that pkd-export did not make.

    ``recalibrated``: its targets' graphs are made again, because there is another calibration.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    graph = onnx.load_model_from_string(bundle.read("encoder.onnx"))
    if not any(node.name == UNIT for node in graph.graph.node):
        raise InputError(f"{path}/encoder.onnx was not made by pkd-export. Export the source again.")
    forms = {format.runtime: format.form for format in FORMATS.values()}
    known: dict[tuple[str, GraphForm], Variant] = {}
    for target in manifest.targets:
        if target.runtime in forms and not recalibrated:
            settings = {name: value for name, value in target.settings.items() if name in INT8_SETTINGS}
            variant = Variant(bundle.read(target.graph), target.encoder, settings)
            known.setdefault((target.precision, forms[target.runtime]), variant)
    reference = open_bundle(bundle)
    files = {name: bundle.read(name) for name in manifest.files if name != BENCH}
    signed = bundle.signature is not None
    return Draft(reference, _standard(reference), graph, manifest, files, known=known, signed=signed)


def opset_notes(opset: int) -> list[str]:
    """Say what an opset other than ours means for the people who run the graph."""
    notes = []
    if opset != OPSET:
        notes.append(f"note: the graph stays at its own opset {opset}; torch students get {OPSET}.")
    if opset > WEB_OPSET:
        notes.append(
            f"note: browsers will refuse encoder.onnx: onnxruntime-web loads graphs up to opset {WEB_OPSET}. "
            "Export the teacher to an older one if it is for them."
        )
    return notes


def _standard(reference: Encoder) -> Golden:
    crops = synthetic_crops(max(BATCHES), reference.info.preprocess.size)
    return Golden(crops, reference.embed(crops))
