"""The client that openapi-python-client makes of the OpenAPI document works against the live server, with a key."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pkd.serving.api.api_keys import ApiKeys, new_key
from tests.support import gallery_fixtures as made

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "tests" / "clients" / "python"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openapi_python_client") is None,
    reason="openapi-python-client is not installed (extra dev)",
)


def run(*arguments: str, **environment: str) -> str:
    """Run Python; what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_generated_client_works(tmp_path: Path) -> None:
    document, settings = ROOT / "docs" / "openapi.json", PROJECT / "client.yaml"
    command = (
        "-m",
        "openapi_python_client",
        "generate",
        "--meta",
        "none",
        "--output-path",
        f"{tmp_path / 'pkd_client'}",
    )
    run(*command, "--path", str(document), "--config", str(settings))
    fleet, key = made.fleet(tmp_path / "bundles"), new_key("generated", "embed,verify,enrol,delete,admin")
    (tmp_path / "keys.txt").write_text(f"{key['line']}\n")
    (tmp_path / "crop.png").write_bytes(made.made.png(made.CROPS[0]))
    encoder = fleet.teacher.info.id
    with made.serving(fleet, tmp_path / "store", ApiKeys.read(tmp_path / "keys.txt")) as client:
        base, crop = str(client.base_url).rstrip("/"), str(tmp_path / "crop.png")
        said = json.loads(run(f"{PROJECT / 'use.py'}", base, key["key"], crop, encoder, PYTHONPATH=str(tmp_path)))
    assert said == {
        "gallery": "python",
        "numbers": [made.made.DIM, "b64_f16"],
        "sequences": [2, 3],
        "bulk": "eve",
        "identified": ["ambiguous", "ambiguous", ["ann", "bob", "eve"]],  # one face under three names
        "verified": True,
        "exported": 5,
        "deleted": 1,
        "refused": "unknown-gallery",
    }
