"""Verify (pkd-verify) that certificates, evaluations and bundles are whole, consistent and signed by a trusted key."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pkd.toolkit.certificates.signing import TrustedKeys, new_key
from pkd.toolkit.cli.device_kit import grade_device, write_device_kit
from pkd.toolkit.cli.verification import Check, Verdict, verify
from pkd.toolkit.core.cli_options import Argument, Options, run_command
from pkd.toolkit.core.cli_support import Result
from pkd.toolkit.core.errors import InputError, NotTrusted
from pkd.toolkit.core.tables import show_table

EXAMPLES = """
  pkd-verify --new-key evidence.pem                              # writes evidence.pem and evidence.pub.pem
  pkd-evaluate --sign evidence.pem …
  pkd-export runs/student --certificates evaluation -o bundles/student --sign evidence.pem --zip
  pkd-verify evaluation bundles/student bundles/student.zip --trust-key evidence.pub.pem
  pkd-verify bundles/student --device-kit kit                    # photographs and expected results for a device
  pkd-verify bundles/student --device-kit kit --device-report phone.json
  pkd-verify bundles/student --device-report phone.json          # the kit is in the bundle: pkd-export --device-kit
  pkd-verify evaluation/certificates/student@…__teacher@….json --trust-key evidence.pub.pem
"""
COLOUR = {"ok": "green", "failed": "bold red", "not checked": "yellow"}


class VerifyOptions(Options):
    """Hold what pkd-verify was asked for."""

    targets: Annotated[tuple[Path, ...], Argument("PATH", positional=True)] = ()
    """Certificate file, pkd-evaluate folder, or bundle (folder or zip)."""
    trust_key: Annotated[tuple[Path, ...], Argument("PUB.pem", repeatable=True)] = ()
    """ed25519 public key that must have signed; repeatable. Without it, authenticity is not checked."""
    new_key: Annotated[Path | None, Argument("FILE")] = None
    """Write a new private key to FILE and, beside it, its public half."""
    device_kit: Annotated[Path | None, Argument("DIR")] = None
    """Write the conformance kit of the one given BUNDLE, or BUNDLE/targets/NAME, into DIR; with --device-report, read
    it from there."""
    device_report: Annotated[Path | None, Argument("REPORT.json")] = None
    """Grade what a device computed for the kit of --device-kit; without that, for the kit within the bundle."""
    detector: Annotated[str | None, Argument("YUNET.onnx")] = None
    """Face detector whose landmarks a new kit holds, too, for devices that run the same one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-verify``; returns the exit code, 4 where something is not to be trusted."""
    failed: list[Check] = []
    code = run_command(
        "pkd-verify",
        "Check certificates, pkd-evaluate folders and bundles: schema and consistency, that report.json and the "
        "certificates agree, hashes and golden embeddings, and signatures.",
        EXAMPLES,
        VerifyOptions,
        lambda options, console: _run(options, console, failed),
        argv,
    )
    if code == 0 and failed:
        many = "1 check failed:" if len(failed) == 1 else f"{len(failed)} checks failed, first"
        print(f"pkd-verify: {many} {failed[0].file}: {failed[0].detail}", file=sys.stderr)
        return NotTrusted.exit_code
    return code


def _run(options: VerifyOptions, console: Console, failed: list[Check]) -> Result:
    if options.device_kit or options.device_report or options.detector:
        return _device(options, console, failed)
    if bool(options.targets) == bool(options.new_key) or (options.new_key and options.trust_key):
        raise InputError("what to check? Give certificates, evaluations or bundles; or --new-key FILE alone.")
    if options.new_key:
        public, fingerprint = new_key(options.new_key)
        console.print(
            f"wrote {options.new_key} (private: keep it) and {public} (public: hand it out)\n{fingerprint}",
            markup=False,
            soft_wrap=True,
        )
        return {"private": str(options.new_key), "public": str(public), "fingerprint": fingerprint}
    keys = TrustedKeys.read(options.trust_key) if options.trust_key else None
    verdicts = [verify(path, keys) for path in options.targets]
    for verdict in verdicts:
        _show(console, verdict)
        failed += verdict.failures
    if keys is None:
        console.print(
            "Integrity was checked, authenticity was not: anyone may have made this. Pass --trust-key PUB.pem."
        )
    return {
        "trusted": not failed,
        "authenticity": "checked" if keys else "not checked",
        "trusted_keys": list(keys.fingerprints) if keys else [],
        "targets": [verdict.model_dump() for verdict in verdicts],
    }


def _device(options: VerifyOptions, console: Console, failed: list[Check]) -> Result:
    wanted = options.device_kit or options.device_report
    if wanted is None or len(options.targets) != 1 or options.new_key or options.trust_key:
        raise InputError(
            "a device kit is of one bundle: pkd-verify BUNDLE --device-kit DIR, or BUNDLE --device-report FILE."
        )
    (bundle,) = options.targets
    if options.device_report is None:
        assert options.device_kit
        return write_device_kit(bundle, options.device_kit, options.detector, console)
    if options.detector:
        raise InputError("--detector belongs to writing a kit. Leave it out where a report is graded.")
    return grade_device(bundle, options.device_kit, options.device_report, console, failed)


def _show(console: Console, verdict: Verdict) -> None:
    """Print file by file, for encoder ids make names too long for a column."""
    console.print(Text(f"{verdict.kind} {verdict.path}", "bold"))
    for file, checks in groupby(verdict.checks, lambda check: check.file):
        console.print(Text(file), soft_wrap=True)
        table = Table(box=None, show_header=False)
        for width in (len("not checked"), len("reproduces its golden embeddings"), None):
            table.add_column(min_width=width, overflow="fold")
        for check in checks:
            table.add_row(Text(check.result, COLOUR[check.result]), Text(check.question), Text(check.detail))
        show_table(console, table)


if __name__ == "__main__":
    sys.exit(main())
