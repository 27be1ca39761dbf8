"""Write a bundle's device kit and grade a device's report, for ``pkd-verify --device-kit``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.cli.verification import Check
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import MissingExtra, TargetUnavailable
from pkd.toolkit.core.tables import show_table
from pkd.toolkit.device.grading import Grade, grade
from pkd.toolkit.device.kit import STEPS, Tolerances, kit_of, read_kit, read_report, write_kit
from pkd.toolkit.encoders.base import Encoder, open_bundle, open_graph
from pkd.toolkit.encoders.detector import open_detector
from pkd.toolkit.encoders.registry import open_target, target_of


def write_device_kit(bundle: Path, folder: Path, detector: str | None, console: Console) -> Result:
    """Write the conformance kit of ``bundle``, or of BUNDLE/targets/NAME, into ``folder``.

    Raises InputError or BundleError.
    """
    encoder, tolerance = _open(bundle)
    kit = write_kit(encoder, folder, open_detector(detector) if detector else None, tolerance=tolerance)
    console.print(
        f"wrote {folder}: {len(kit.cases)} photographs for {kit.encoder}. Let the device compute them "
        f"(docs/device.md), then: pkd-verify {bundle} --device-kit {folder} --device-report REPORT.json",
        markup=False,
        soft_wrap=True,
    )
    return {"kit": str(folder), "encoder": kit.encoder, "cases": [case.name for case in kit.cases]}


def grade_device(bundle: Path, folder: Path | None, report: Path, console: Console, failed: list[Check]) -> Result:
    """Show where a device first deviates from the kit, and by how much; what deviates is added to ``failed``.

    ``folder``: the kit's; None: it lies within the bundle.
    """
    encoder, _ = _open(bundle)
    named = target_of(bundle)
    kit = read_kit(folder) if folder else kit_of(Bundle.open(named[0] if named else bundle))
    made = read_report(report)
    grades = grade(kit, made, encoder)
    table = Table(title=f"{made.device}, {short(made.encoder)}", title_justify="left")
    for heading in ("step", "ok", "deviates", "not reported", "worst", "allowed"):
        table.add_column(heading)
    for step in STEPS:
        table.add_row(step, *_row([one for one in grades if one.step == step]))
    show_table(console, table)
    first: dict[str, Grade] = {}
    for one in grades:
        if one.result == "deviates":
            first.setdefault(one.case, one)
    for one in first.values():
        console.print(f"{one.case}: first deviates at {one.step}. {_amount(one)}", markup=False, soft_wrap=True)
        failed.append(Check(file=one.case, question=one.step, result="failed", detail=f"{one.step}: {_amount(one)}"))
    passed = not first and any(one.result == "ok" for one in grades)
    if not first and not passed:
        failed.append(Check(file=str(report), question="reported", result="failed", detail="reports nothing to check."))
    return {
        "device": made.device,
        "encoder": made.encoder,
        "passed": passed,
        "first_deviation": {name: one.step for name, one in first.items()},
        "grades": [one.model_dump() for one in grades],
    }


def _open(path: Path) -> tuple[Encoder, float]:
    """Open a bundle's encoder or target, and say how far a device's embedding may be away, 1 − cosine.

    A target in another numeric mode rounds otherwise on another processor: what its golden embeddings allow counts.
    One whose runtime is not here is computed from its graph.
    """
    named = target_of(path)
    if named is None:
        return open_bundle(Bundle.open(path)), Tolerances().embedding
    bundle = Bundle.open(named[0])
    target = bundle.manifest.target(named[1])
    own = bundle.manifest.encoder.id
    tolerance = target.golden_tolerance if target and target.encoder.id != own else Tolerances().embedding
    try:
        return open_target(bundle, named[1]), tolerance
    except (TargetUnavailable, MissingExtra):
        if target is None:
            raise
        return open_graph(bundle, target.encoder, target.graph), tolerance


def _row(grades: list[Grade]) -> tuple[str, ...]:
    counts = [str(sum(one.result == result for one in grades)) for result in ("ok", "deviates", "not reported")]
    measured = [one for one in grades if one.deviation is not None]
    worst = max(measured, key=lambda one: one.deviation or 0.0, default=None)
    return (*counts, f"{worst.deviation:.2g}" if worst else "", f"{worst.allowed:g}" if worst else "")


def _amount(one: Grade) -> str:
    size = f"{one.deviation:.3g}, allowed {one.allowed:g}." if one.deviation is not None else ""
    return f"{size} {one.detail}".strip()
