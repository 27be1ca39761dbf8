"""Write a bundle's device kit and grade a device's report, for ``pkd-verify --device-kit``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.cli.verification import Check
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.device.kit import STEPS, Grade, grade, read_kit, read_report, write_kit
from pkd.toolkit.encoders.base import open_bundle
from pkd.toolkit.encoders.detector import open_detector


def write_device_kit(bundle: Path, folder: Path, detector: str | None, console: Console) -> Result:
    """Write the conformance kit of ``bundle`` into ``folder``. Raises InputError or BundleError."""
    kit = write_kit(Bundle.open(bundle), folder, open_detector(detector) if detector else None)
    console.print(
        f"wrote {folder}: {len(kit.cases)} photographs for {kit.encoder}. Let the device compute them "
        f"(docs/device.md), then: pkd-verify {bundle} --device-kit {folder} --device-report REPORT.json",
        markup=False,
        soft_wrap=True,
    )
    return {"kit": str(folder), "encoder": kit.encoder, "cases": [case.name for case in kit.cases]}


def grade_device(bundle: Path, folder: Path, report: Path, console: Console, failed: list[Check]) -> Result:
    """Show where a device first deviates from the kit, and by how much; what deviates is added to ``failed``."""
    kit, made = read_kit(folder), read_report(report)
    grades = grade(folder, kit, made, open_bundle(Bundle.open(bundle)))
    table = Table(title=f"{made.device}, {made.encoder}", title_justify="left")
    for heading in ("step", "ok", "deviates", "not reported", "worst", "allowed"):
        table.add_column(heading)
    for step in STEPS:
        table.add_row(step, *_row([one for one in grades if one.step == step]))
    console.print(table)
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


def _row(grades: list[Grade]) -> tuple[str, ...]:
    counts = [str(sum(one.result == result for one in grades)) for result in ("ok", "deviates", "not reported")]
    measured = [one for one in grades if one.deviation is not None]
    worst = max(measured, key=lambda one: one.deviation or 0.0, default=None)
    return (*counts, f"{worst.deviation:.2g}" if worst else "", f"{worst.allowed:g}" if worst else "")


def _amount(one: Grade) -> str:
    size = f"{one.deviation:.3g}, allowed {one.allowed:g}." if one.deviation is not None else ""
    return f"{size} {one.detail}".strip()
