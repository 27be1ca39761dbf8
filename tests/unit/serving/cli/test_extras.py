"""Commands without their extra say what to install."""

from __future__ import annotations

import importlib.metadata
import re

from pkd.serving.cli.extras import MODULES

IMPORTED_AS = {"python-multipart": "python_multipart", "prometheus-client": "prometheus_client"}
ASKED_FOR_WHERE_USED = {"pyjwt"}


def test_every_package_of_the_extra_is_named_where_it_is_missing() -> None:
    """Without the name in MODULES a missing package was a traceback: httptools was."""
    required = [line for line in importlib.metadata.requires("pkd") or [] if re.search(r"extra == .serve\b", line)]
    packages = {re.split(r"[<>=;\[ ]", line)[0].lower() for line in required} - ASKED_FOR_WHERE_USED
    assert len(packages) > 5
    assert {IMPORTED_AS.get(name, name) for name in packages} <= set(MODULES)
