"""Run pkd-export stage by stage: everything is made and checked in memory, then written at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from pkd.export.assembly import assemble, collect_certificates, device_kit
from pkd.export.checks.bench import BENCH, ROUNDS, bench, bench_table, size_on_disk
from pkd.export.checks.gate import Gate, GateResults, gate_table, require_passed
from pkd.export.checks.parity import ParityRow, measure, parity_table, require_parity
from pkd.export.draft import Draft, draft_from_bundle, draft_new, opset_notes, read_source
from pkd.export.formats.registry import BuildResults, TargetBuilder, TargetRequest, target_requests
from pkd.export.graph.build import precision_of
from pkd.export.graph.precision_variants import PrecisionVariants
from pkd.export.int8_recovery import Retrainer, recover_int8
from pkd.export.options import CALIBRATED, ExportOptions, GateOptions
from pkd.export.quantization.ranges import Calibration, read_calibration
from pkd.toolkit.bundle.archive import zip_path
from pkd.toolkit.bundle.bundle import Bundle, Manifest, write_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.certificates.certificate import Certificate, usefulness
from pkd.toolkit.certificates.signing import SigningKey
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.encoder_info import EncoderInfo, in_mode
from pkd.toolkit.core.progress import Progress
from pkd.toolkit.core.tables import show_table
from pkd.toolkit.encoders.detector import open_detector

SHOWN_FMR = 1e-3
"""False match rate at which a certified pair's TAR is shown: pkd-serve's own."""


def export(options: ExportOptions, console: Console, progress: Progress, *, bench_rounds: int = ROUNDS) -> Result:
    """Make a bundle, or more targets for one, as ``options`` say. Raises PkdError before anything is written."""
    key = SigningKey.read(options.sign) if options.sign else None
    detector = open_detector(options.kit_detector) if options.kit_detector else None
    requests = target_requests(options.formats, options.precision)
    warn_of_missing_packages(requests, console)

    draft = read_draft(options)
    require_certificates_fit(options.certificates, draft.manifest, options.precision)
    with progress("checking encoder.onnx"):
        parity = check_graphs(draft, console)

    calibration = sample_crops(options, draft.reference.info, progress)
    variants = PrecisionVariants(
        draft.graph, draft.manifest.encoder, calibration, options.keep_float, progress, dict(draft.known)
    )
    builder = TargetBuilder(variants, options.build_options, draft.standard, progress, precision_of(draft.graph))
    retrainer = open_retrainer(options, variants, progress)
    built = builder.build(requests)
    built, gated = gate_targets(requests, built, builder, retrainer, options.gate_options, draft, console)

    manifest, files = assemble(draft, built, gated, options.certificates)
    if options.device_kit:
        with progress("computing the device kit"):
            files |= device_kit(manifest.encoder, files["encoder.onnx"], detector)
    if options.bench:
        files |= measure_cost(files, manifest, bench_rounds, console, progress)
    with written_with(draft.extra_files):
        replace = options.force or options.from_bundle is not None
        bundle = write_bundle(options.bundle, files, manifest, replace=replace, key=key)
    packed = bundle.pack(zip_path(options.bundle)) if options.zip else None
    for note in notes(draft, bundle):
        console.print(note)
    return result(options, bundle, packed, [*parity, *built.parity], built, variants, gated)


def warn_of_missing_packages(requests: Sequence[TargetRequest], console: Console) -> None:
    """Say before anything slow which targets this machine cannot build, and why."""
    reasons = {request.name: request.format.unavailable() for request in requests}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        names = ", ".join(name for name, own in reasons.items() if own == reason)
        console.print(f"note: {names}: only the graph is written, nothing is built here: {reason}.", markup=False)


def read_draft(options: ExportOptions) -> Draft:
    """Read the source into a new bundle's draft, or the older bundle that gets more."""
    if options.from_bundle:
        return draft_from_bundle(options.from_bundle, recalibrated=options.calib is not None)
    return draft_new(read_source(options), options.licence, options.float_nchw)


def require_certificates_fit(sources: Sequence[Path], manifest: Manifest, precisions: Sequence[str]) -> None:
    """Refuse foreign certificates before anything slow. A quantised encoder is known only once it is made."""
    if not set(CALIBRATED) & set(precisions):
        derived = [in_mode(manifest.encoder, precision) for precision in precisions]
        collect_certificates(sources, *manifest.encoders.values(), *derived)


def check_graphs(draft: Draft, console: Console) -> list[ParityRow]:
    """Compare the graphs that were just made with the source. Raises GateFailed where one computes something else."""
    crops, expected, precision = draft.standard.crops, draft.standard.embeddings, precision_of(draft.graph)
    rows = [row for name, embed in draft.unchecked.items() for row in measure(name, expected, crops, embed, precision)]
    show_parity(rows, console)
    return rows


def show_parity(rows: Sequence[ParityRow], console: Console) -> None:
    """Print the comparison, and raise GateFailed unless every row passed."""
    if rows:
        show_table(console, parity_table(rows))
    require_parity(rows)


def sample_crops(options: ExportOptions, encoder: EncoderInfo, progress: Progress) -> Calibration | None:
    """Read the real crops that value ranges are chosen on, where such a precision is wanted and crops were given."""
    if options.calib is None or not set(CALIBRATED) & set(options.precision):
        return None
    with progress(f"reading {options.calib}"):
        return read_calibration(options.calib, encoder.preprocess.size, options.calib_method)


def open_retrainer(options: ExportOptions, variants: PrecisionVariants, progress: Progress) -> Retrainer | None:
    """Check that a run can be trained on, where --qat asks for it. Raises InputError."""
    if not options.qat or variants.calibration is None:
        return None
    run, faces = Path(str(options.run)), options.qat_faces
    return Retrainer(run, variants.encoder, faces, options.qat_steps, variants.calibration, progress)


def gate_targets(
    requests: Sequence[TargetRequest],
    built: BuildResults,
    builder: TargetBuilder,
    retrainer: Retrainer | None,
    options: GateOptions | None,
    draft: Draft,
    console: Console,
) -> tuple[BuildResults, GateResults]:
    """Judge the targets by parity and, with ``options``, by the gate, and build INT8 again until it passes.

    Raises GateFailed.
    """
    if options is None:
        show_parity(built.parity, console)
        return built, GateResults()
    show_parity([row for row in built.parity if row.precision != "int8"], console)
    gate = Gate(options, draft.reference, builder.progress)
    built, judged = recover_int8(requests, built, gate, builder, retrainer)
    gated = gate.conclude(judged)
    if gated.rows:
        show_table(console, gate_table(gated.rows))
    require_passed(gated)
    show_parity([row for row in built.parity if row.precision == "int8"], console)
    return built, gated


def measure_cost(
    files: Mapping[str, bytes], manifest: Manifest, rounds: int, console: Console, progress: Progress
) -> dict[str, bytes]:
    """Measure every target on this machine; the figures go into the bundle as ``bench.json``."""
    with progress("benchmark, round", rounds) as advance:
        found = bench(files, manifest, rounds, advance)
    show_table(console, bench_table(found))
    for name, reason in found.skipped.items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    return {BENCH: (found.model_dump_json(indent=2) + "\n").encode()}


def notes(draft: Draft, bundle: Bundle) -> list[str]:
    """Say what the user might miss: encoders without a certificate, a dropped signature, an unusual opset."""
    said = opset_notes(bundle.manifest.graph.opset) if draft.unchecked else []
    if draft.signed and bundle.signature is None:
        said.append("note: the manifest has changed, so its old signature is dropped. Sign it with --sign KEY.pem.")
    uncertified = _uncertified(bundle)
    elsewhere = [target.name for target in uncertified if target.settings.get("not_measured")]
    if elsewhere:
        said.append(
            f"note: the gate leaves out {', '.join(elsewhere)}, and no certificate covers them: this machine cannot "
            "predict with them. Prove them on the device with --device-kit, and evaluate embeddings that it makes."
        )
    if here := [target.name for target in uncertified if target.name not in elsewhere]:
        said.append(
            f"note: no certificate covers {', '.join(here)}: in another precision a target is an encoder of its "
            f"own. Measure one with --gate here, or with pkd-evaluate --student BUNDLE/targets/{here[0]}."
        )
    return said


def _uncertified(bundle: Bundle) -> list[Target]:
    """List the targets that are encoders of their own and that no certificate has as query."""
    known = {bundle.manifest.encoder.id, *(certificate.query for certificate in bundle.certificates())}
    return [target for target in bundle.manifest.targets if target.encoder.id not in known]


def result(
    options: ExportOptions,
    bundle: Bundle,
    packed: Path | None,
    parity: Sequence[ParityRow],
    built: BuildResults,
    variants: PrecisionVariants,
    gated: GateResults,
) -> Result:
    """Gather the figures of --json."""
    manifest = bundle.manifest
    info = manifest.encoder
    return {
        "bundle": str(options.bundle),
        "zip": str(packed) if packed else None,
        "signed_by": bundle.signature.key if bundle.signature else None,
        "float_nchw": str(options.float_nchw) if options.float_nchw else None,
        "encoder": info.id,
        "space": info.space.id,
        "role": info.role,
        "dim": info.space.dim,
        "opset": manifest.graph.opset,
        "bytes": len(bundle.read("encoder.onnx")),
        "parity": [row.model_dump() for row in parity],
        "targets": [
            {
                "name": target.name,
                "encoder": target.encoder.id,
                "graph": target.graph,
                "file": target.file,
                "bytes": size_on_disk(bundle, target),
                "golden_tolerance": target.golden_tolerance,
                "settings": target.settings,
            }
            for target in built.targets
        ],
        "sensitivity": {form: [cost.model_dump() for cost in costs] for form, costs in variants.costs.items()},
        "missing": {name: asdict(entry) for name, entry in built.missing.items()},
        "uncertified": [target.name for target in _uncertified(bundle)],
        "certificates": [f"{c.query} against {c.gallery}" for c in bundle.certificates()],
        "accuracy": [_accuracy(certificate) for certificate in bundle.certificates()],
        "gate": manifest.gate,
        "bench": json.loads(bundle.read(BENCH)) if BENCH in manifest.files else None,
        "gated": [row.model_dump() for row in gated.rows],
    }


def _accuracy(certificate: Certificate) -> dict[str, float | str | None]:
    """Say how many of the right people a certified pair accepts at the server's own rate, or the next it has."""
    point = min(certificate.points, key=lambda one: abs(math.log(one.fmr / SHOWN_FMR)))
    return {"fmr": point.fmr, "tar": point.tar_balanced, "verdict": usefulness(point)}


@contextmanager
def written_with(files: Mapping[Path, bytes]) -> Iterator[None]:
    """Write ``files`` (path → content) if the block succeeds, else none of them."""
    parts = {path: path.with_name(path.name + ".part") for path in files}
    try:
        for path, part in parts.items():
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(files[path])
        yield
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
