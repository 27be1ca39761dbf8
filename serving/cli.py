"""pkd-serve: bundles → HTTP. Run as: pkd-serve bundles/teacher bundles/student --detector yunet.onnx"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pkd.toolkit.bundle import NOT_GATED
from pkd.toolkit.command import Result, make_parser, run
from pkd.toolkit.errors import InputError, MissingExtra, UnsupportedFmr
from pkd.toolkit.signing import TrustedKeys
from pkd.toolkit.space import short

if TYPE_CHECKING:
    from pkd.serving.encoders import Encoders
    from pkd.serving.security import ApiKeys

EXAMPLES = """
  pkd-serve bundles/teacher bundles/student --detector yunet.onnx
  pkd-serve bundles/teacher bundles/student/targets/openvino-int8 bundles/student/targets/openvino-bf16
  curl -F image=@photo.jpg 'localhost:8000/embed?encoding=b64_f16'
  key=$(openssl rand -hex 32); printf %s "$key" | sha256sum > keys.txt
  pkd-serve bundles/teacher --host 0.0.0.0 --api-keys keys.txt --trust-key evidence.pub.pem
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = make_parser(
        "pkd-serve", "Serve encoders over HTTP: embed faces, and verify pairs under measured error rates.", EXAMPLES
    )
    parser.add_argument(
        "bundles", nargs="+", metavar="BUNDLE", help="folder, zip or BUNDLE/targets/NAME; first teacher: the default"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: only this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 picks a free one (default: 8000)")
    parser.add_argument(
        "--detector",
        metavar="SPEC",
        help="YuNet .onnx file, insightface:PACK or insightface:FOLDER; without it only aligned crops are taken",
    )
    parser.add_argument("--target-fmr", type=float, metavar="F", help="default of /verify, a fraction (default: 1e-3)")
    parser.add_argument("--threads", type=int, metavar="N", help="worker threads (default: one per core)")
    parser.add_argument(
        "--api-keys", metavar="FILE", help="SHA-256 hashes of accepted bearer keys, one a line; needed beyond loopback"
    )
    parser.add_argument(
        "--insecure-no-keys", action="store_true", help="listen beyond loopback without keys, for anyone to use"
    )
    parser.add_argument(
        "--trust-key",
        action="append",
        default=[],
        type=Path,
        metavar="PUB.pem",
        help="ed25519 public key; refuse bundles and certificates that no such key has signed; repeatable",
    )
    return run(parser, _serve, argv)


def _serve(args: argparse.Namespace, console: Console) -> Result:
    # Pillow reads the header that the limit is checked on, OpenCV decodes; where a hostile file makes them disagree,
    # OpenCV's own limit holds. It reads this once, when it is imported.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "40000000")
    try:
        import cv2

        from pkd.serving.encoders import Encoders
        from pkd.serving.security import ApiKeys, is_loopback
        from pkd.serving.server import listen, serve, url_of
        from pkd.serving.service import Service
        from pkd.serving.settings import Settings
        from pkd.toolkit.detect import open_detector
    except ModuleNotFoundError as missing:
        if missing.name in ("fastapi", "starlette", "uvicorn", "orjson"):
            raise MissingExtra(missing.name, "serve") from None
        raise
    cv2.setNumThreads(1)  # every worker thread has a core of its own
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)  # a stranger's broken image is no news
    given = {"target_fmr": args.target_fmr, "threads": args.threads}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    if not is_loopback(args.host) and not args.api_keys and not args.insecure_no_keys:
        raise InputError(
            f"--host {args.host} can be reached by others. "
            "Pass --api-keys FILE, or --insecure-no-keys to let anyone in."
        )
    keys = ApiKeys.read(args.api_keys) if args.api_keys else None
    trusted = TrustedKeys.read(args.trust_key) if args.trust_key else None
    encoders = Encoders.open(args.bundles, trusted)
    detector = open_detector(args.detector, settings.detector_score) if args.detector else None
    _introduce(console, encoders, settings.target_fmr, bool(detector), keys)
    listener = listen(args.host, args.port)
    url = url_of(listener)
    service = Service(encoders, settings, detector)
    serve(service, listener, keys, ready=lambda: print(f"listening on {url}", file=sys.stderr, flush=True))
    console.print("drained and stopped")
    return {"url": url, "encoders": list(encoders.loaded)}


def _introduce(console: Console, encoders: Encoders, fmr: float, detector: bool, keys: ApiKeys | None) -> None:
    for loaded in encoders.loaded.values():
        info = loaded.encoder.info
        state = f"{info.space.dim}-d, {info.preprocess.name}{', default' if loaded is encoders.default else ''}"
        gated = f", {NOT_GATED}" if loaded.bundle.manifest.gate == NOT_GATED else ""
        console.print(f"{info.role} {short(info.id)}: {state}{gated}", markup=False, soft_wrap=True)
    for file in encoders.files.values():
        certificate = file.certificate
        pair = f"{short(certificate.query)} → {short(certificate.gallery)}"
        try:
            state = f"threshold {certificate.threshold(fmr):.4f} at FMR {fmr:g}"
        except UnsupportedFmr:
            smallest, largest = certificate.points[-1].fmr, certificate.points[0].fmr
            state = f"FMR {fmr:g} not covered, requests must state one of {smallest:g} to {largest:g}"
        signature = file.signature or file.bundle
        signed = f", signed by {signature.key[:17]}…" if signature and encoders.keys else ""
        console.print(
            f"certified {pair}: {state}{' (synthetic faces)' if certificate.synthetic else ''}{signed}",
            markup=False,
            soft_wrap=True,
        )
    if not encoders.keys:
        console.print("no --trust-key: bundles and certificates may come from anyone")
    if not encoders.files:
        console.print("no certificate in these bundles: /verify will refuse every pair")
    if not detector:
        console.print("no --detector: only aligned crops are taken (aligned=true)")
    if keys is None:
        console.print("no --api-keys: requests need no key")


if __name__ == "__main__":
    sys.exit(main())
