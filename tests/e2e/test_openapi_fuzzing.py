"""Schemathesis against a running server: nothing that its OpenAPI document allows or forbids leads to an undocumented answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gallery_fixtures as made
import pytest
from pkd.serving.client import Client
from server_process import pkd_serve

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.soak
def test_every_operation(tmp_path: Path, soak: bool) -> None:
    fleet = made.fleet(tmp_path)
    with pkd_serve(tmp_path, *fleet.folders, "--threads", "2") as server:
        Client(server.url).create_gallery("staff")
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", f"{server.url}/openapi.json", "--phases", "examples,coverage,fuzzing", "--checks", CHECKS),
            *("--max-examples", "200" if soak else "3", "--seed", "1", "--workers", "2", "--no-color", "--no-shrink"),
            *("--generation-database", "none", "--warnings", "off"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
