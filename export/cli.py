"""Run pkd-export: a trained student, or a teacher, becomes a bundle that was checked before it was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from pkd.export.options import ExportOptions, check_outputs
from pkd.toolkit.bundle.archive import zip_path
from pkd.toolkit.core.cli_options import run_command
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import MissingExtra, TargetUnavailable
from pkd.toolkit.core.progress import ConsoleProgress

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
  pkd-export runs/student -o bundles/student --device-kit --kit-detector yunet.onnx   # for whoever writes a client
  pkd-export runs/student -o bundles/student --float-nchw student.onnx   # loads in insightface's model_zoo, too
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-export`` and return its exit code."""
    description = "Make a bundle of a student or a teacher, and check it before."
    return run_command("pkd-export", description, EXAMPLES, ExportOptions, _export, argv)


def _export(options: ExportOptions, console: Console) -> Result:
    check_outputs(options)
    try:
        from pkd.export.pipeline import export
    except ImportError:
        raise MissingExtra("onnx", "export") from None

    result = export(options, console, ConsoleProgress(console))
    _tell(console, result)
    if result["missing"]:
        raise TargetUnavailable(_later(result["bundle"], result["missing"]), result)
    return result


def _later(bundle: str, missing: Mapping[str, Mapping[str, str]]) -> str:
    """Say what is missing, why, and the command that builds it elsewhere."""
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


def _tell(console: Console, result: Result) -> None:
    """Print the result in a few lines, for people."""
    size = f"{result['bytes'] / 1e6:.1f} MB"
    console.print(f"{short(result['encoder'])} ({result['role']}, {result['dim']}-d, {size}, opset {result['opset']})")
    for target in result["targets"]:
        state = f"{target['bytes'] / 1e6:.2f} MB" if target["file"] else "not built"
        own = "" if target["encoder"] == result["encoder"] else f", encoder {short(target['encoder'])}"
        error = target["settings"].get("similarity_rms")
        moved = "" if error is None else f", similarities of held-out crops moved by {error:.3f} (RMS)"
        console.print(f"target {target['name']}: {state}{moved}{own}")
    for pair, one in zip(result["certificates"], result["accuracy"], strict=True):
        names = " against ".join(map(short, pair.split(" against ")))
        verdict = f": {one['verdict']}" if one["verdict"] else ""
        console.print(
            f"certificate {names}: TAR {100 * one['tar']:.1f} % at FMR {100 * one['fmr']:g} %{verdict}", soft_wrap=True
        )
    if not result["certificates"]:
        console.print("certificates: none; add them with --certificates EVAL")
    console.print(f"gate: {result['gate']}")
    console.print(f"signed by: {result['signed_by'] or 'nobody; sign with --sign KEY.pem'}", soft_wrap=True)
    stale = zip_path(Path(result["bundle"]))
    if not result["zip"] and stale.exists():
        console.print(f"note: {stale} is still what it was; write it again with --zip.")
    written = (result[name] for name in ("bundle", "zip", "float_nchw"))
    console.print("wrote " + " and ".join(path for path in written if path))
