"""Hold the options of pkd-export: one typed model that the command line is made from, and its parts for the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from pkd.toolkit.bundle.archive import zip_path
from pkd.toolkit.bundle.bundle import require_free
from pkd.toolkit.core.cli_options import Argument, Options
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import Record

Precision = Literal["fp32", "fp16", "int8", "w8a16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CALIBRATED: tuple[Precision, ...] = ("int8", "w8a16")
"""Precisions whose value ranges are chosen on real crops."""
RangeMethod = Literal["minmax", "percentile", "entropy"]
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)


class GateOptions(Record):
    """Say which faces, which gallery and which limits the accuracy gate judges by."""

    faces: Path
    teacher: str | None = None
    """Encoder of the gallery; None where the exported encoder is the teacher itself."""
    teacher_preprocess: str | None = None
    fmr: float = 1e-3
    max_drop: float = 0.01
    """Largest loss of TAR that passes, as a fraction, by the upper end of the loss's interval."""


class BuildOptions(Record):
    """Say how an engine is built; formats other than TensorRT's ignore it."""

    batches: tuple[int, int, int] = (1, 8, 32)
    """Smallest, most frequent and largest batch: the optimisation profile. The engine refuses others."""
    workspace: int = 1024
    """MiB of GPU memory that one layer may use as scratch space."""
    timing_cache: Path | None = None
    """File that remembers measured kernels, so that the next build on the same GPU takes seconds. tensorrt only."""


INT8, GATE, TENSORRT = "INT8", "gate: targets in another precision must keep the TAR of fp32", "TensorRT"
"""Headings of --help."""


class ExportOptions(Options):
    """Keep every option of pkd-export."""

    run: Annotated[str | None, Argument("RUN", positional=True)] = None
    """Folder that pkd-distill wrote (its --out): the student to export."""
    teacher: Annotated[str | None, Argument("SPEC")] = None
    """Teacher to export instead of RUN: FILE.onnx, FILE.pt or insightface:PACK."""
    teacher_preprocess: Annotated[str | None, Argument("P")] = None
    """Scaling of the teacher's pixels: channels=rgb,mean=127.5,std=127.5, or a JSON file."""
    from_bundle: Annotated[Path | None, Argument("BUNDLE")] = None
    """Bundle folder to add targets and certificates to, in its place, instead of exporting RUN."""
    out: Annotated[Path | None, Argument("BUNDLE", flags=("-o",))] = None
    """Bundle folder to write."""
    format: Annotated[tuple[str, ...], Argument("F")] = ()
    """Runtimes of the targets: onnx (default), openvino, ncnn, executorch, litert, coreml, npu, trt, trt-rtx, or
    MODULE:NAME."""
    trt: bool = False
    """Build TensorRT targets: short for --format trt."""
    precision: Annotated[tuple[Precision, ...], Argument("P")] = ("fp32",)
    """Precisions of the targets, of fp32, fp16, int8, w8a16 and bf16; each format makes those that it has."""
    certificates: Annotated[tuple[Path, ...], Argument("EVAL", repeatable=True)] = ()
    """Folder that pkd-evaluate wrote (its --out), whose certificates and report go into the bundle; repeatable."""
    licence: Annotated[str, Argument("TEXT")] = "not stated"
    """Licence of the weights, for the manifest."""
    device_kit: bool = False
    """Put the conformance kit for devices into the bundle: photographs, expected results and tolerances, 4 MB."""
    kit_detector: Annotated[str | None, Argument("YUNET.onnx")] = None
    """Face detector whose landmarks the kit of --device-kit holds, too, for devices that run the same one."""
    bench: bool = False
    """Measure the CPU time, size and memory of every target on this machine, into bench.json in the bundle."""
    float_nchw: Annotated[Path | None, Argument("FILE.onnx")] = None
    """File to write the graph with float N×3×H×W input to, as insightface loads it."""
    sign: Annotated[Path | None, Argument("KEY.pem")] = None
    """File with the ed25519 key that signs the manifest; pkd-verify --new-key makes one."""
    zip: bool = False
    """Write BUNDLE.zip, too: the same bundle as one file."""
    force: bool = False
    """Replace an older bundle, its zip, and the file of --float-nchw."""
    calib: Annotated[Path | None, Argument("DIR|LIST", group=INT8)] = None
    """Folder or list of aligned real crops, of which 320 are taken to choose value ranges."""
    calib_method: Annotated[RangeMethod, Argument(group=INT8)] = "percentile"
    """Choice of a value range from the crops: all values, 99.99 % of them, or the least loss of information."""
    keep_float: Annotated[int, Argument(group=INT8)] = Field(0, ge=0)
    """Number of the costliest layers that stay in float32; with --gate the number needed is found."""
    gate: Annotated[Path | None, Argument("DIR|LIST", group=GATE)] = None
    """Folder or list of aligned crops with identities that TAR is measured on; not those of --calib."""
    gate_teacher: Annotated[str | None, Argument("SPEC", group=GATE)] = None
    """Encoder of the gallery, as --teacher spells it; needed for a student."""
    gate_teacher_preprocess: Annotated[str | None, Argument("P", group=GATE)] = None
    """Scaling of the pixels of --gate-teacher, where that is FILE.onnx or FILE.pt."""
    gate_fmr: Annotated[float, Argument("F", group=GATE)] = Field(1e-3, gt=0, lt=1)
    """False match rate, a fraction, at which TAR is compared."""
    max_tar_drop: Annotated[float, Argument(group=GATE)] = Field(0.01, ge=0, lt=1)
    """Largest loss of TAR, a fraction (0.01 is one point), that the upper end of the loss's interval may reach."""
    qat: Annotated[bool, Argument(group=GATE)] = False
    """Train RUN on for INT8, as it was trained, where layers in float32 were not enough to pass."""
    qat_steps: Annotated[int, Argument(group=GATE)] = Field(300, ge=1)
    """Number of optimiser steps of --qat."""
    qat_faces: Annotated[Path | None, Argument("DIR|LIST", group=GATE)] = None
    """Folder or list of the training faces of --qat instead of those that RUN was trained on."""
    batch: Annotated[str, Argument("MIN:USUAL:MAX", group=TENSORRT)] = "1:8:32"
    """Smallest, most frequent and largest batch, in crops."""
    workspace: Annotated[int, Argument("MIB", group=TENSORRT)] = Field(1024, ge=1)
    """Scratch memory of one layer, in MiB."""
    timing_cache: Annotated[Path | None, Argument("FILE", group=TENSORRT)] = None
    """File that remembers measured kernels for the next build."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats to build, each once."""
        return tuple(dict.fromkeys([*self.format, *(["trt"] if self.trt else [])])) or ("onnx",)

    @property
    def bundle(self) -> Path:
        """Name the bundle folder that is written: a new one, or the one that gets more."""
        path = self.out or self.from_bundle
        assert path is not None  # ``check_outputs``
        return path

    @property
    def gate_options(self) -> GateOptions | None:
        """Give the gate's own options; None without a gate."""
        if self.gate is None:
            return None
        return GateOptions(
            faces=self.gate,
            teacher=self.gate_teacher,
            teacher_preprocess=self.gate_teacher_preprocess,
            fmr=self.gate_fmr,
            max_drop=self.max_tar_drop,
        )

    @property
    def build_options(self) -> BuildOptions:
        """Give the options of engines."""
        return BuildOptions(batches=parse_batches(self.batch), workspace=self.workspace, timing_cache=self.timing_cache)

    @model_validator(mode="after")
    def _fits(self) -> ExportOptions:
        given = self.model_fields_set
        if len([each for each in (self.run, self.teacher, self.from_bundle) if each]) != 1:
            raise InputError("what to export? Give one of RUN, --teacher SPEC and --from-bundle BUNDLE.")
        if self.teacher_preprocess and not self.teacher:
            raise InputError("--teacher-preprocess goes with --teacher; a run knows its preprocessing. Leave it out.")
        parse_batches(self.batch)
        if self.kit_detector and not self.device_kit:
            raise InputError("--kit-detector belongs to the kit of --device-kit. Pass that, too.")
        if self.gate is None and given & {"gate_teacher", "gate_teacher_preprocess", "gate_fmr", "max_tar_drop"}:
            raise InputError("--gate DIR|LIST is missing: the faces that the gate is measured on.")
        if self.gate and self.run and not self.gate_teacher:
            raise InputError("--gate measures a student against its teacher's gallery. Pass --gate-teacher SPEC, too.")
        if not self.qat and given & {"qat_faces", "qat_steps"}:
            raise InputError("--qat-steps and --qat-faces go with --qat. Pass it, too.")
        if self.qat and not self.run:
            raise InputError("--qat trains the student of a run on, and a bundle or a teacher has no run. Pass RUN.")
        if self.qat and self.gate is None:
            raise InputError("--qat is what is tried where INT8 fails its gate. Pass --gate DIR|LIST, too.")
        if self.qat and (self.calib is None or "int8" not in self.precision):
            raise InputError("--qat trains for INT8: pass --precision int8 and --calib DIR or LIST, too.")
        return self


def parse_batches(text: str) -> tuple[int, int, int]:
    """Read ``1:8:32`` as smallest, most frequent and largest batch. Raises InputError."""
    parts = text.split(":")
    if len(parts) == 3 and all(part.isdecimal() for part in parts):
        low, usual, high = map(int, parts)
        if 1 <= low <= usual <= high <= 4096:
            return low, usual, high
    raise InputError(f"--batch {text!r}: give smallest:usual:largest between 1 and 4096, for example 1:8:32.")


def check_outputs(options: ExportOptions) -> None:
    """Raise InputError, before anything slow, unless every output may be written."""
    if options.from_bundle:
        given = {
            "--float-nchw": options.float_nchw,
            "-o": options.out,
            "--licence": "licence" in options.model_fields_set,
        }
        wrong = next((name for name, value in given.items() if value), None)
        if wrong:
            raise InputError(f"--from-bundle adds to a bundle and changes nothing that is in it. Leave {wrong} out.")
        if options.from_bundle.is_file():
            raise InputError(f"--from-bundle {options.from_bundle}: is a file. Unpack it, and give the folder.")
    elif options.out is None:
        raise InputError("-o BUNDLE is missing: where should the bundle be written?")
    else:
        require_free(options.out.resolve(), replace=options.force)
        if options.out.suffix == ".zip":
            raise InputError(f"-o {options.out}: names the folder; --zip writes the zip beside it. Leave .zip out.")
        if options.zip and zip_path(options.out).exists() and not options.force:
            raise InputError(f"{zip_path(options.out)} exists already. Choose another path or pass --force.")
    path = options.float_nchw
    if path is None:
        return
    if path.suffix != ".onnx":
        raise InputError(f"--float-nchw {path}: the name must end in .onnx.")
    if path.resolve().is_relative_to(options.bundle.resolve()):
        raise InputError(f"--float-nchw {path}: lies inside the bundle, which holds its own files only. Move it out.")
    if path.is_dir() or (path.exists() and not options.force):
        raise InputError(f"--float-nchw {path} exists already. Choose another path or pass --force.")
    if options.teacher and path.resolve() == Path(options.teacher).resolve():
        raise InputError(f"--float-nchw {path}: is the teacher itself. Choose another path.")
