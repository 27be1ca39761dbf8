"""Schemathesis against a running server: whatever is sent, the answer is one that the OpenAPI document shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pkd.serving.client import Client
from tests.support import gallery_fixtures as made
from tests.support.server_process import serving, with_gallery

HOOKS = Path(__file__).resolve().parents[1] / "support" / "schemathesis_hooks.py"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.soak
def test_every_operation(tmp_path: Path, soak: bool) -> None:
    fleet = made.fleet(tmp_path)
    with serving(*fleet.folders, *with_gallery(tmp_path), "--threads", "2") as server:
        with Client(server.url) as client:
            client.create_gallery("staff")
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", f"{server.url}/openapi.json", "--phases", "examples,coverage,fuzzing", "--checks", CHECKS),
            *("--max-examples", "200" if soak else "3", "--seed", "1", "--no-color", "--no-shrink"),
            *("--generation-database", "none", "--warnings", "off"),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=3600,
            cwd=tmp_path,
            check=False,
            env={**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS)},
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
