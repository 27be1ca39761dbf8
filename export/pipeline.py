"""Produce a bundle, or more targets for one: everything is made and checked in memory, then written at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import onnx
from rich.console import Console

from pkd.export.checks.bench import BENCH, ROUNDS, bench, bench_table, size_on_disk
from pkd.export.checks.certificates import collect
from pkd.export.checks.gate import Gate, Gated, GateOrder, gate_table, require_passed
from pkd.export.checks.golden import COUNT, TOLERANCE, synthetic_crops
from pkd.export.checks.parity import BATCHES, ParityRow, insightface_blob, measure, onnx_runner, parity_table, require
from pkd.export.formats.registry import TARGETS, Made, make, wanted
from pkd.export.formats.tensorrt import BuildOptions
from pkd.export.graph.build import OPSET, WEB_OPSET, float_graph, opset_of, serialise, uint8_graph
from pkd.export.graph.precision_variants import TypedGraph, TypedGraphs
from pkd.export.int8_recovery import Pairs, Tries
from pkd.export.qat import SETTINGS as QAT_SETTINGS
from pkd.export.qat import Qat, QatOrder
from pkd.export.quantization.calibration import read_calibration
from pkd.export.quantization.ranges import Method
from pkd.export.source import open_run, open_teacher
from pkd.toolkit.bundle.archive import zip_path
from pkd.toolkit.bundle.bundle import NOT_GATED, Bundle, Golden, GraphSpec, Manifest, pack_golden, write_bundle
from pkd.toolkit.certificates.signing import SUFFIX, SigningKey
from pkd.toolkit.core.cli_support import Result, tool_version
from pkd.toolkit.core.encoder_info import EncoderInfo, in_mode
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.encoders.base import Embeddings, Encoder, open_bundle
from pkd.toolkit.images.codec import Rgb

Begin = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Order:
    """What pkd-export was asked for. One of ``run``, ``teacher`` and ``from_bundle`` is given."""

    run: str | None
    teacher: str | None
    teacher_preprocess: str | None
    from_bundle: Path | None
    out: Path
    formats: Sequence[str]
    precisions: Sequence[str]
    calib: Path | None
    calib_method: Method
    keep_float: int
    build: BuildOptions
    certificates: Sequence[Path]
    gate: GateOrder | None
    qat: QatOrder | None
    float_nchw: Path | None
    licence: str
    key: SigningKey | None
    zip: bool
    bench: bool
    force: bool


def produce(order: Order, console: Console, begin: Begin) -> Result:
    """Open, convert, check, write a bundle. Raises before anything is written."""
    pairs = wanted(order.formats, order.precisions)
    if order.run:
        source = open_run(order.run)
    else:
        source = open_teacher(str(order.teacher), order.teacher_preprocess)
    info, preprocess = source.info, source.info.preprocess
    if "int8" not in order.precisions:  # its id is known only once it is made; else refuse before anything slow
        collect(order.certificates, info, *(in_mode(info, precision) for precision in order.precisions))
    graph = uint8_graph(source.network, preprocess, info.space.dim)
    model, opset = serialise(graph), opset_of(graph)
    floats = serialise(float_graph(source.network, preprocess, info.space.dim)) if order.float_nchw else b""

    graphs = _graphs(order, graph, info, begin)
    begin("checking encoder.onnx", 0)
    crops = synthetic_crops(max(BATCHES), preprocess.size)
    expected = source.encoder.embed(crops)
    rows = measure("uint8 NHWC", expected, crops, onnx_runner(model, lambda crops: crops, source.name))
    if floats:
        rows += measure("float NCHW", expected, crops, onnx_runner(floats, insightface_blob, source.name))
    _judge(rows, console)
    made, gated = _targets(order, pairs, graphs, source.encoder, crops, expected, console, begin)
    manifest = Manifest(
        encoder=info,
        graph=GraphSpec(opset=opset),
        golden_tolerance=TOLERANCE,
        licence=order.licence,
        training=source.training,
        targets=tuple(made.targets),
        gate=gated.said,
        tool=tool_version(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files={},
    )
    evidence = _certificates(gated) | collect(order.certificates, *manifest.encoders.values())
    golden = pack_golden(Golden(crops[:COUNT], expected[:COUNT]))
    with _written_with(order.float_nchw, floats):
        files = {"encoder.onnx": model, "golden.npz": golden, **evidence, **made.files}
        files |= _bench(order, files, manifest, console, begin)
        bundle = write_bundle(order.out, files, manifest, replace=order.force, key=order.key)
    if opset != OPSET:
        console.print(f"note: the graph stays at its own opset {opset}; torch students get {OPSET}.")
    if opset > WEB_OPSET:
        console.print(
            f"note: browsers will refuse encoder.onnx: onnxruntime-web loads graphs up to opset {WEB_OPSET}. "
            "Export the teacher to an older one if it is for them."
        )
    return _result(order, bundle, rows, made, graphs, gated)


def add_targets(order: Order, console: Console, begin: Begin) -> Result:
    """Build targets from a bundle's own graphs and put them into it, in the place of older ones of the same name."""
    pairs = wanted(order.formats, order.precisions)
    bundle = Bundle.open(order.out)
    manifest = bundle.manifest
    graph = onnx.load_model_from_string(bundle.read("encoder.onnx"))
    if not any(node.name == "pkd/unit" for node in graph.graph.node):
        raise InputError(f"{order.out}/encoder.onnx was not made by pkd-export. Export the source again.")
    graphs = _graphs(order, graph, manifest.encoder, begin)
    forms = {row.runtime: row.form for row in TARGETS.values()}
    for target in manifest.targets:
        if target.runtime in forms and not order.calib:
            settings = {k: v for k, v in target.settings.items() if k in INT8_SETTINGS}
            known = TypedGraph(bundle.read(target.graph), target.encoder, settings)
            graphs.give(target.precision, forms[target.runtime], known)

    crops = synthetic_crops(max(BATCHES), manifest.encoder.preprocess.size)
    reference = open_bundle(bundle)
    expected = reference.embed(crops)
    made, gated = _targets(order, pairs, graphs, reference, crops, expected, console, begin)
    added = {target.name for target in made.targets}
    kept = [target for target in manifest.targets if target.name not in added]
    needed = {name for target in kept for name in (target.graph, target.file) if name}
    files = {
        name: bundle.read(name)
        for name in manifest.files
        if name != BENCH and (not any(name.startswith(f"targets/{old}/") for old in added) or name in needed)
    }
    said = (
        gated.said if manifest.gate == NOT_GATED else f"{manifest.gate}. {', '.join(sorted(added))} later: {gated.said}"
    )
    manifest = manifest.model_copy(update={"targets": (*kept, *made.targets), "gate": said})
    evidence = _certificates(gated) | collect(order.certificates, *manifest.encoders.values())
    # A newer certificate comes with its own signature or with none; the older one's would say that it was changed.
    stale = {name + SUFFIX for name, data in evidence.items() if files.get(name, data) != data}
    files = {name: data for name, data in files.items() if name not in stale}
    if bundle.signature and not order.key:
        console.print(
            "note: the manifest changes, so its old signature is dropped. Sign the new one with --sign KEY.pem."
        )
    files = {**files, **made.files, **evidence}
    files |= _bench(order, files, manifest, console, begin)
    bundle = write_bundle(order.out, files, manifest, replace=True, key=order.key)
    return _result(order, bundle, [], made, graphs, gated)


INT8_SETTINGS = ("int8", "calibration", "layers_in_fp32", "similarity_rms", *QAT_SETTINGS)


def _graphs(order: Order, graph: onnx.ModelProto, info: EncoderInfo, begin: Begin) -> TypedGraphs:
    calibration = None
    if order.calib and "int8" in order.precisions:
        begin(f"reading {order.calib}", 0)
        calibration = read_calibration(order.calib, info.preprocess.size, order.calib_method)
    return TypedGraphs(graph, info, calibration, order.keep_float, begin)


def _targets(
    order: Order,
    pairs: Pairs,
    graphs: TypedGraphs,
    reference: Encoder,
    crops: Rgb,
    expected: Embeddings,
    console: Console,
    begin: Begin,
) -> tuple[Made, Gated]:
    """Make every target, and make those in INT8 again until they pass the gate, where one was ordered."""

    def build(some: Pairs) -> Made:
        return make(some, graphs, order.build, crops, expected, _teller(begin))

    @contextmanager
    def bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
        yield begin(label, total)

    qat = _qat(order, graphs, begin)
    made = build(pairs)
    if order.gate is None:
        _judge(made.rows, console)
        return made, Gated((), NOT_GATED, ())
    _judge([row for row in made.rows if row.precision != "int8"], console)
    gate = Gate(order.gate, reference, bar)
    made, judged = Tries(gate, graphs, build, qat).run(made, pairs)
    gated = gate.conclude(judged)
    if gated.rows:
        console.print(gate_table(gated.rows))
    require_passed(gated)
    _judge([row for row in made.rows if row.precision == "int8"], console)
    return made, gated


def _qat(order: Order, graphs: TypedGraphs, begin: Begin) -> Qat | None:
    if order.qat is None or order.run is None:
        return None
    if graphs.calibration is None:
        raise InputError("--qat trains for INT8: pass --precision int8 and --calib DIR or LIST, too.")
    return Qat(order.qat, Path(order.run), graphs.info, graphs.calibration, begin)


def _bench(
    order: Order, files: Mapping[str, bytes], manifest: Manifest, console: Console, begin: Begin
) -> dict[str, bytes]:
    if not order.bench:
        return {}
    found = bench(files, manifest, ROUNDS, begin("benchmark, round", ROUNDS))
    console.print(bench_table(found))
    for name, reason in found.skipped.items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    return {BENCH: (found.model_dump_json(indent=2) + "\n").encode()}


def _certificates(gated: Gated) -> dict[str, bytes]:
    return {
        f"certificates/{certificate.file_name}": (certificate.model_dump_json(indent=2) + "\n").encode()
        for certificate in gated.certificates
        if certificate.points
    }


def _judge(rows: Sequence[ParityRow], console: Console) -> None:
    if rows:
        console.print(parity_table(rows))
    require(rows)


def _result(
    order: Order, bundle: Bundle, rows: Sequence[ParityRow], made: Made, graphs: TypedGraphs, gated: Gated
) -> Mapping[str, object]:
    manifest = bundle.manifest
    info = manifest.encoder
    packed = bundle.pack(zip_path(order.out)) if order.zip else None
    return {
        "bundle": str(order.out),
        "zip": str(packed) if packed else None,
        "signed_by": bundle.signature.key if bundle.signature else None,
        "float_nchw": str(order.float_nchw) if order.float_nchw else None,
        "encoder": info.id,
        "space": info.space.id,
        "role": info.role,
        "dim": info.space.dim,
        "opset": manifest.graph.opset,
        "bytes": len(bundle.read("encoder.onnx")),
        "parity": [row.model_dump() for row in [*rows, *made.rows]],
        "targets": [
            {
                "name": target.name,
                "encoder": target.encoder.id,
                "graph": target.graph,
                "file": target.file,
                "bytes": size_on_disk(bundle, target.file),
                "golden_tolerance": target.golden_tolerance,
                "settings": target.settings,
            }
            for target in made.targets
        ],
        "sensitivity": {form: [cost.model_dump() for cost in costs] for form, costs in graphs.costs.items()},
        "missing": made.missing,
        "certificates": [f"{c.query} against {c.gallery}" for c in bundle.certificates()],
        "gate": manifest.gate,
        "bench": json.loads(bundle.read(BENCH)) if BENCH in manifest.files else None,
        "gated": [row.model_dump() for row in gated.rows],
    }


def _teller(begin: Begin) -> Callable[[str], None]:
    def tell(label: str) -> None:
        begin(label, 0)

    return tell


@contextmanager
def _written_with(path: Path | None, data: bytes) -> Iterator[None]:
    """Write ``data`` to ``path`` only if the block succeeds."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        yield
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
