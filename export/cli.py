"""pkd-export: a trained student, or a teacher, becomes a bundle that was checked before it was written."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

from pkd.export.certificates import collect
from pkd.export.golden import COUNT, TOLERANCE, synthetic_crops
from pkd.export.parity import BATCHES, insightface_blob, measure, onnx_runner, parity_table, require
from pkd.toolkit.bundle import Golden, GraphSpec, Manifest, pack_golden, require_free, write_bundle
from pkd.toolkit.command import Result, make_parser, run, tool_version
from pkd.toolkit.errors import InputError, MissingExtra
from pkd.toolkit.space import short

EXAMPLES = """
  pkd-export runs/student -o bundles/student --certificates evaluation --licence "CC BY 4.0"
  pkd-export --teacher teacher.onnx --teacher-preprocess channels=rgb,mean=127.5,std=127.5 -o bundles/teacher
  pkd-export --teacher insightface:buffalo_l -o bundles/teacher
  pkd-export runs/student -o bundles/student --float-nchw student.onnx     # loads in insightface's model_zoo, too
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``pkd-export``."""
    parser = make_parser("pkd-export", "Make a bundle of a student or a teacher, and check it before.", EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("run", nargs="?", metavar="RUN", help="the --out folder of pkd-distill")
    what.add_argument("--teacher", metavar="SPEC", help="FILE.onnx, FILE.pt or insightface:PACK, instead of RUN")
    parser.add_argument("--teacher-preprocess", metavar="P", help="channels=rgb,mean=127.5,std=127.5, or a JSON file")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="BUNDLE", help="folder to write")
    parser.add_argument(
        "--certificates",
        action="append",
        default=[],
        type=Path,
        metavar="EVAL",
        help="--out folder of pkd-evaluate: its certificates about this encoder and its report; repeatable",
    )
    parser.add_argument(
        "--float-nchw", type=Path, metavar="FILE.onnx", help="also write the graph with float N×3×H×W input"
    )
    parser.add_argument("--licence", default="not stated", metavar="TEXT", help="licence of the weights")
    parser.add_argument("--force", action="store_true", help="replace an older bundle, and FILE.onnx")
    return run(parser, export, argv)


def export(args: argparse.Namespace, console: Console) -> Result:
    """Open, convert, check, write. Nothing is written unless every check passes."""
    _check_outputs(args)
    try:
        from pkd.export.source import open_run, open_teacher
        from pkd.export.to_onnx import OPSET, float_graph, opset_of, serialise, uint8_graph
    except ImportError:
        raise MissingExtra("onnx", "export") from None

    source = open_run(args.run) if args.run else open_teacher(args.teacher, args.teacher_preprocess)
    info, preprocess = source.info, source.info.preprocess
    evidence = collect(args.certificates, info)
    graph = uint8_graph(source.network, preprocess, info.space.dim)
    model, opset = serialise(graph), opset_of(graph)
    floats = serialise(float_graph(source.network, preprocess, info.space.dim)) if args.float_nchw else b""

    with console.status(f"checking {short(info.id)} at batch {', '.join(map(str, BATCHES))}"):
        crops = synthetic_crops(max(BATCHES), preprocess.size)
        expected = source.encoder.embed(crops)
        rows = measure("uint8 NHWC", expected, crops, onnx_runner(model, lambda crops: crops, source.name))
        if floats:
            rows += measure("float NCHW", expected, crops, onnx_runner(floats, insightface_blob, source.name))
    console.print(parity_table(rows))
    require(rows)

    golden = pack_golden(Golden(crops[:COUNT], expected[:COUNT]))
    manifest = Manifest(
        encoder=info,
        graph=GraphSpec(opset=opset),
        golden_tolerance=TOLERANCE,
        licence=args.licence,
        training=source.training,
        tool=tool_version(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files={},
    )
    with _written_with(args.float_nchw, floats):
        files = {"encoder.onnx": model, "golden.npz": golden, **evidence}
        bundle = write_bundle(args.out, files, manifest, replace=args.force)

    if opset != OPSET:
        console.print(f"note: the graph stays at its own opset {opset}; torch students get {OPSET}.")
    result = {
        "bundle": str(args.out),
        "float_nchw": str(args.float_nchw) if args.float_nchw else None,
        "encoder": info.id,
        "space": info.space.id,
        "role": info.role,
        "dim": info.space.dim,
        "opset": opset,
        "bytes": len(model),
        "parity": [row.model_dump() for row in rows],
        "certificates": [f"{c.query} against {c.gallery}" for c in bundle.certificates()],
        "gate": manifest.gate,
    }
    _tell(console, result)
    return result


def _tell(console: Console, result: Result) -> None:
    """The result in four lines, for people."""
    certificates = ", ".join(" against ".join(map(short, pair.split(" against "))) for pair in result["certificates"])
    size = f"{result['bytes'] / 1e6:.1f} MB"
    console.print(f"{short(result['encoder'])} ({result['role']}, {result['dim']}-d, {size}, opset {result['opset']})")
    console.print(f"certificates: {certificates or 'none; add them with --certificates EVAL'}")
    console.print(f"gate: {result['gate']}")
    console.print("wrote " + " and ".join(path for path in (result["bundle"], result["float_nchw"]) if path))


def _check_outputs(args: argparse.Namespace) -> None:
    """Before anything slow: the options fit together, and both outputs may be written."""
    if args.run and args.teacher_preprocess:
        raise InputError("--teacher-preprocess goes with --teacher; a run knows its preprocessing. Leave it out.")
    require_free(args.out.resolve(), replace=args.force)
    path = args.float_nchw
    if path is None:
        return
    if path.suffix != ".onnx":
        raise InputError(f"--float-nchw {path}: the name must end in .onnx.")
    if path.resolve().is_relative_to(args.out.resolve()):
        raise InputError(f"--float-nchw {path}: lies inside the bundle, which holds its own files only. Move it out.")
    if path.is_dir() or (path.exists() and not args.force):
        raise InputError(f"--float-nchw {path} exists already. Choose another path or pass --force.")
    if args.teacher and path.resolve() == Path(args.teacher).resolve():
        raise InputError(f"--float-nchw {path}: is the teacher itself. Choose another path.")


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
