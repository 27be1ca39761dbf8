"""pkd-export: a trained student, or a teacher, becomes a bundle that was checked before it was written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

from pkd.toolkit.bundle.archive import zip_path
from pkd.toolkit.bundle.bundle import require_free
from pkd.toolkit.certificates.signing import SigningKey
from pkd.toolkit.core.cli_support import Result, make_parser, run
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import InputError, MissingExtra, TargetUnavailable

if TYPE_CHECKING:
    from pkd.export.checks.gate import GateOrder
    from pkd.export.pipeline import Order
    from pkd.export.qat import QatOrder

FORMATS = ("onnx", "openvino", "ncnn", "executorch", "trt", "trt-rtx")
PRECISIONS = ("fp32", "fp16", "int8", "bf16")
METHODS = ("minmax", "percentile", "entropy")
EXAMPLES = """
  pkd-export runs/student -o bundles/student --certificates evaluation --licence "CC BY 4.0"
  pkd-export --teacher teacher.onnx --teacher-preprocess channels=rgb,mean=127.5,std=127.5 -o bundles/teacher
  pkd-export --teacher insightface:buffalo_l -o bundles/teacher
  pkd-export runs/student -o bundles/student --format onnx openvino --precision fp32 int8 --calib faces/val.txt
  pkd-export runs/student -o bundles/student --precision fp32 int8 --calib faces/val.txt --gate faces/dev \
      --gate-teacher teacher.onnx --gate-teacher-preprocess mean=127.5,std=127.5 --max-tar-drop 0.01 --qat
  pkd-export runs/student -o bundles/student --format onnx openvino ncnn --bench      # what each costs here
  pkd-export runs/student -o bundles/student --trt --precision fp16      # without a GPU: the graph, and exit code 3
  pkd-export --from-bundle bundles/student --trt --precision fp16        # later, on the machine with the GPU
  pkd-export runs/student -o bundles/student --sign release.pem --zip    # also bundles/student.zip, to hand out
  pkd-export runs/student -o bundles/student --float-nchw student.onnx   # loads in insightface's model_zoo, too
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``pkd-export``."""
    parser = make_parser("pkd-export", "Make a bundle of a student or a teacher, and check it before.", EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("run", nargs="?", metavar="RUN", help="the --out folder of pkd-distill")
    what.add_argument("--teacher", metavar="SPEC", help="FILE.onnx, FILE.pt or insightface:PACK, instead of RUN")
    what.add_argument("--from-bundle", type=Path, metavar="BUNDLE", help="add targets to this bundle, in its place")
    parser.add_argument("--teacher-preprocess", metavar="P", help="channels=rgb,mean=127.5,std=127.5, or a JSON file")
    parser.add_argument("-o", "--out", type=Path, metavar="BUNDLE", help="folder to write")
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, metavar="F", help=f"runtimes, of {', '.join(FORMATS)}; default: onnx"
    )
    parser.add_argument("--trt", action="store_true", help="short for --format trt")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=["fp32"],
        metavar="P",
        help=f"of {', '.join(PRECISIONS)}; each format makes those that it has; default: fp32",
    )
    int8 = parser.add_argument_group("int8")
    int8.add_argument("--calib", type=Path, metavar="DIR|LIST", help="aligned real crops, 320 are taken of them")
    int8.add_argument("--calib-method", choices=METHODS, default="percentile", help="default: percentile (99.99)")
    int8.add_argument(
        "--keep-float",
        type=int,
        default=0,
        metavar="N",
        help="leave the N costliest layers in float32; with --gate, what is needed is found, up to a quarter",
    )
    gate = parser.add_argument_group("gate", "targets in another precision must keep the TAR of fp32")
    gate.add_argument(
        "--gate", type=Path, metavar="DIR|LIST", help="aligned crops with identities; not those of --calib"
    )
    gate.add_argument("--gate-teacher", metavar="SPEC", help="of the gallery; needed for a student")
    gate.add_argument("--gate-teacher-preprocess", metavar="P", help="of a teacher that is FILE.onnx or FILE.pt")
    gate.add_argument("--gate-fmr", type=float, metavar="F", help="false match rate; default: 1e-3")
    gate.add_argument(
        "--max-tar-drop",
        type=float,
        metavar="X",
        help="the upper end of the interval of what a target loses may be no more; default: 0.01, one point",
    )
    gate.add_argument(
        "--qat",
        action="store_true",
        help="train RUN on for INT8, as it was trained, where layers in float32 were not enough to pass",
    )
    gate.add_argument("--qat-steps", type=int, metavar="N", help="optimiser steps; default: 300")
    gate.add_argument("--qat-faces", type=Path, metavar="DIR|LIST", help="default: those that RUN was trained on")
    parser.add_argument(
        "--bench",
        action="store_true",
        help="measure every target's CPU time, size and memory here, into bench.json in the bundle",
    )
    trt = parser.add_argument_group("tensorrt")
    trt.add_argument("--batch", default="1:8:32", metavar="MIN:USUAL:MAX", help="batch sizes; default: 1:8:32")
    trt.add_argument("--workspace", type=int, default=1024, metavar="MIB", help="scratch memory; default: 1024")
    trt.add_argument("--timing-cache", type=Path, metavar="FILE", help="remembers measured kernels for the next build")
    parser.add_argument(
        "--certificates",
        action="append",
        default=[],
        type=Path,
        metavar="EVAL",
        help="--out folder of pkd-evaluate: its certificates about these encoders and its report; repeatable",
    )
    parser.add_argument(
        "--float-nchw", type=Path, metavar="FILE.onnx", help="also write the graph with float N×3×H×W input"
    )
    parser.add_argument("--licence", default="not stated", metavar="TEXT", help="licence of the weights")
    parser.add_argument(
        "--sign", type=Path, metavar="KEY.pem", help="ed25519 key that signs the manifest; see pkd-verify --new-key"
    )
    parser.add_argument("--zip", action="store_true", help="also write BUNDLE.zip: the same bundle as one file")
    parser.add_argument("--force", action="store_true", help="replace an older bundle, its zip, and FILE.onnx")
    return run(parser, export, argv)


def export(args: argparse.Namespace, console: Console) -> Result:
    """Check the options, make everything in memory, write it at once. Nothing is written unless every check passes."""
    _check_outputs(args)
    try:
        from pkd.export.pipeline import add_targets, produce
    except ImportError:
        raise MissingExtra("onnx", "export") from None

    order = _order(args)
    with console.status("opening") as status:
        result = (add_targets if args.from_bundle else produce)(order, console, _counter(status))
    _tell(console, result)
    if result["missing"]:
        raise TargetUnavailable(_later(result["bundle"], result["missing"]), result)
    return result


def _later(bundle: str, missing: Mapping[str, Mapping[str, str]]) -> str:
    """What is missing, why, and the command that builds it elsewhere."""
    why: dict[str, list[str]] = {}
    for name, entry in missing.items():
        why.setdefault(entry["reason"], []).append(name)
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items())
    formats = list(dict.fromkeys(entry["format"] for entry in missing.values()))
    precisions = list(dict.fromkeys(entry["precision"] for entry in missing.values()))
    flag = "--trt" if formats == ["trt"] else f"--format {' '.join(formats)}"
    return (
        f"{reasons}. The bundle was written, with the checked graphs that these are built from. Where they can be "
        f"built, run: pkd-export --from-bundle {bundle} {flag} --precision {' '.join(precisions)}"
    )


def _order(args: argparse.Namespace) -> Order:
    from pkd.export.formats.tensorrt import BuildOptions, parse_batches
    from pkd.export.pipeline import Order

    formats = [*(args.format or []), *(["trt"] if args.trt else [])] or ["onnx"]
    return Order(
        run=args.run,
        teacher=args.teacher,
        teacher_preprocess=args.teacher_preprocess,
        from_bundle=args.from_bundle,
        out=args.out or args.from_bundle,
        formats=list(dict.fromkeys(formats)),
        precisions=list(dict.fromkeys(args.precision)),
        calib=args.calib,
        calib_method=args.calib_method,
        keep_float=args.keep_float,
        build=BuildOptions(parse_batches(args.batch), args.workspace, args.timing_cache),
        certificates=args.certificates,
        gate=_gate(args),
        qat=_qat(args),
        float_nchw=args.float_nchw,
        licence=args.licence,
        key=SigningKey.read(args.sign) if args.sign else None,
        zip=args.zip,
        bench=args.bench,
        force=args.force,
    )


def _gate(args: argparse.Namespace) -> GateOrder | None:
    from pkd.export.checks.gate import GateOrder

    given = {"fmr": args.gate_fmr, "max_drop": args.max_tar_drop}
    given = {name: value for name, value in given.items() if value is not None}
    if args.gate is None:
        if args.gate_teacher or given:
            raise InputError("--gate DIR|LIST is missing: the faces that the gate is measured on.")
        return None
    if args.run and not args.gate_teacher:
        raise InputError("--gate measures a student against its teacher's gallery. Pass --gate-teacher SPEC, too.")
    return GateOrder(args.gate, args.gate_teacher, args.gate_teacher_preprocess, **given)


def _qat(args: argparse.Namespace) -> QatOrder | None:
    from pkd.export.qat import QatOrder

    given = {"faces": args.qat_faces, "steps": args.qat_steps}
    given = {name: value for name, value in given.items() if value is not None}
    if not args.qat:
        if given:
            raise InputError("--qat-steps and --qat-faces go with --qat. Pass it, too.")
        return None
    if not args.run:
        raise InputError("--qat trains the student of a run on, and a bundle or a teacher has no run. Pass RUN.")
    if args.gate is None:
        raise InputError("--qat is what is tried where INT8 fails its gate. Pass --gate DIR|LIST, too.")
    return QatOrder(**given)


def _counter(status: Status) -> Callable[[str, int], Callable[[int], None]]:
    """Label and total → a function that counts up in the one live line of the console; total 0: only the label."""

    def begin(label: str, total: int) -> Callable[[int], None]:
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            status.update(f"{label} {done}/{total}")

        status.update(label)
        return advance

    return begin


def _tell(console: Console, result: Result) -> None:
    """The result in a few lines, for people."""
    certificates = ", ".join(" against ".join(map(short, pair.split(" against "))) for pair in result["certificates"])
    size = f"{result['bytes'] / 1e6:.1f} MB"
    console.print(f"{short(result['encoder'])} ({result['role']}, {result['dim']}-d, {size}, opset {result['opset']})")
    for target in result["targets"]:
        state = f"{target['bytes'] / 1e6:.2f} MB" if target["file"] else "not built"
        own = "" if target["encoder"] == result["encoder"] else f", encoder {short(target['encoder'])}"
        error = target["settings"].get("similarity_rms")
        moved = "" if error is None else f", similarities of held-out crops moved by {error:.3f} (RMS)"
        console.print(f"target {target['name']}: {state}{moved}{own}")
    console.print(f"certificates: {certificates or 'none; add them with --certificates EVAL'}")
    console.print(f"gate: {result['gate']}")
    console.print(f"signed by: {result['signed_by'] or 'nobody; sign with --sign KEY.pem'}", soft_wrap=True)
    stale = zip_path(Path(result["bundle"]))
    if not result["zip"] and stale.exists():
        console.print(f"note: {stale} is still what it was; write it again with --zip.")
    written = (result[name] for name in ("bundle", "zip", "float_nchw"))
    console.print("wrote " + " and ".join(path for path in written if path))


def _check_outputs(args: argparse.Namespace) -> None:
    """Before anything slow: the options fit together, and both outputs may be written."""
    if args.teacher_preprocess and not args.teacher:
        raise InputError("--teacher-preprocess goes with --teacher; a run knows its preprocessing. Leave it out.")
    if args.from_bundle:
        given = {"--float-nchw": args.float_nchw, "-o": args.out}
        given["--licence"] = args.licence != "not stated"
        wrong = next((name for name, value in given.items() if value), None)
        if wrong:
            raise InputError(f"--from-bundle adds to a bundle and changes nothing that is in it. Leave {wrong} out.")
        if args.from_bundle.is_file():
            raise InputError(f"--from-bundle {args.from_bundle}: is a file. Unpack it, and give the folder.")
    elif args.out is None:
        raise InputError("-o BUNDLE is missing: where should the bundle be written?")
    else:
        require_free(args.out.resolve(), replace=args.force)
        if args.out.suffix == ".zip":
            raise InputError(f"-o {args.out}: names the folder; --zip writes the zip beside it. Leave .zip out.")
        if args.zip and zip_path(args.out).exists() and not args.force:
            raise InputError(f"{zip_path(args.out)} exists already. Choose another path or pass --force.")
    if args.keep_float < 0 or args.workspace < 1:
        raise InputError("--keep-float must not be negative, and --workspace must be 1 MiB or more.")
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
