"""Serve encoders over HTTP (pkd-serve).

Run as: pkd-serve bundles/teacher bundles/student --detector yunet.onnx
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from pkd.serving.cli.extras import serving_installed
from pkd.toolkit.core.cli_support import Result, make_parser, run
from pkd.toolkit.core.errors import MissingExtra, PkdError

EXAMPLES = """
  pkd-serve bundles/teacher bundles/student --detector yunet.onnx
  pkd-serve bundles/teacher bundles/student/targets/openvino-int8 bundles/student/targets/openvino-bf16
  curl -F image=@photo.jpg 'localhost:8000/embed?encoding=b64_f16'
  pkd-serve --new-api-key kiosk-1 --scopes embed,verify --rate 20    # prints the key and its line for keys.txt
  pkd-serve bundles/teacher --host 0.0.0.0 --api-keys keys.txt --trust-key evidence.pub.pem --workers 4
  pkd-serve bundles/teacher --api-keys keys.txt --check-config

  PKD_BUNDLES=bundles/teacher:bundles/student PKD_PORT=9000 pkd-serve    # each option has a variable; a flag wins
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pkd-serve``; returns the exit code."""
    # Pillow reads the header that the limit is checked on, OpenCV decodes; where a hostile file makes them disagree,
    # OpenCV's own limit holds. It reads this once, when it is imported.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "40000000")
    try:
        with serving_installed():
            parser = make_serve_parser()
    except MissingExtra as error:
        print(f"pkd-serve: {error}", file=sys.stderr)
        return error.exit_code
    return run(parser, _serve, argv)


def make_serve_parser() -> argparse.ArgumentParser:
    """Make the parser of the command."""
    from pkd.serving.server.config import add_options

    parser = make_parser(
        "pkd-serve", "Serve encoders over HTTP: embed faces, and verify pairs under measured error rates.", EXAMPLES
    )
    add_options(parser)
    parser.add_argument(
        "--check-config",
        action="store_true",
        help="open everything, say what would be served or what is wrong, and exit",
    )
    keys = parser.add_argument_group("make a key, and serve nothing")
    keys.add_argument("--new-api-key", metavar="NAME", help="print a new key, once, and the line that makes it valid")
    keys.add_argument("--scopes", default="embed,verify", help="scopes of the new key (default: embed,verify)")
    keys.add_argument("--rate", metavar="N", help="requests a second that the new key may send (default: any number)")
    return parser


def _serve(args: argparse.Namespace, console: Console) -> Result:
    with serving_installed():
        if args.new_api_key:
            return _new_key(args, console)
        if (vars(args).get("log") or os.environ.get("PKD_LOG")) != "json" or args.check_config:
            return _run(args, console)
        return _run_in_json(args, console)


def _new_key(args: argparse.Namespace, console: Console) -> Result:
    from pkd.serving.api.api_keys import new_key

    made = new_key(args.new_api_key, args.scopes, args.rate)
    if not args.json:
        console.print("the key, shown this once; give it to whoever is to use it:")
        print(made["key"])
        console.print("the line to append to the file of --api-keys; a running server reads it within a second:")
        print(made["line"])
    return made


def _run_in_json(args: argparse.Namespace, console: Console) -> Result:
    """Run, and say what ends the server in JSON, too: who collects these lines reads no others."""
    from pkd.serving.observability import logs

    logs.set_up("json", each_request=False)
    logger = logging.getLogger("pkd.serving")
    try:
        return _run(args, console)
    except PkdError as error:
        logger.error("%s", error)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        logger.error("stopped before it served")
        raise SystemExit(130) from None
    except OSError as error:
        logger.error("%s: %s", error.filename or "input/output", error.strerror or error)
        raise SystemExit(1) from None


def _run(args: argparse.Namespace, console: Console) -> Result:
    from pkd.serving.observability.logs import announcer
    from pkd.serving.server.config import configure
    from pkd.serving.server.server import listen, url_of

    configuration = configure(args, os.environ)
    if args.check_config:
        from pkd.serving.server.process import introduce, opened

        with opened(configuration) as it:
            introduce(announcer("text", console), it, configuration)
            for loaded in it.service.encoders.loaded.values():
                loaded.self_test()  # the runtime that will be used is asked, not the file alone
            if it.store:
                it.store.check()
            console.print("the configuration is good")
            certified = [list(pair) for pair in it.service.encoders.files]
            return {"encoders": list(it.service.encoders.loaded), "certified": certified, "keys": it.keys is not None}
    with listen(configuration.host, configuration.port) as listener:
        url = url_of(listener)

        say = announcer(configuration.log, console)

        def ready() -> None:
            if configuration.log == "json":
                say(f"listening on {url}")
            else:
                print(f"listening on {url}", file=sys.stderr, flush=True)

        if configuration.workers == 1:
            from pkd.serving.server.process import run_alone

            ids = run_alone(configuration, listener, console, ready)
        else:
            from pkd.serving.server.supervisor import supervise

            ids = supervise(configuration, listener, ready, quiet=args.json)
    say("drained and stopped")
    return {"url": url, "encoders": ids}


if __name__ == "__main__":
    sys.exit(main())
