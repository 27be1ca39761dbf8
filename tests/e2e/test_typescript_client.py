"""A TypeScript client made of the OpenAPI document by openapi-typescript compiles, and embeds, enrols and searches."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import gallery_fixtures as made

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "tests" / "clients" / "typescript"


def run(folder: Path, *arguments: str) -> str:
    """Run a program in the project; what it printed."""
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("no node and npm here")
    folder = tmp_path_factory.mktemp("client") / "typescript"
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("node_modules", "out"))
    installed = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if installed.returncode:
        pytest.skip(f"npm cannot install the generator: {installed.stderr.strip().splitlines()[-1:]}")
    return folder


def test_a_generated_client_compiles_and_works(project: Path, tmp_path: Path) -> None:
    # Its default takes what has a default for what must be sent; the document is that of requests and answers alike.
    document = ROOT / "docs" / "openapi.json"
    run(project, "npx", "openapi-typescript", str(document), "-o", "schema.d.ts", "--default-non-nullable", "false")
    run(project, "npx", "tsc", "-p", ".")
    fleet = made.fleet(tmp_path / "bundles")
    image = base64.b64encode(made.made.png(made.CROPS[0])).decode()
    with made.serving(fleet, tmp_path / "store") as client:
        base = str(client.base_url).rstrip("/")
        said = json.loads(run(project, "node", "out/use.js", base, "", image, fleet.teacher.info.id))
    assert (said["decision"], said["subject"], said["refused"]) == ("match", "ann", "unknown-gallery")
    assert said["sequence"] > 0


def test_the_lock_names_no_registry() -> None:
    lock = (PROJECT / "package-lock.json").read_text(encoding="utf-8")
    assert '"resolved"' not in lock and "registry" not in lock
