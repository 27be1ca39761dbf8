"""A bill of materials names what is installed and what the wheel vendors, and holds to CycloneDX's schema."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


PACKAGES = ("numpy", "onnxruntime", "fastapi", "cryptography")


def _environment(folder: Path) -> Path:
    """Make an environment that has the metadata of a few installed packages; its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in PACKAGES:
        distribution = importlib.metadata.distribution(name)
        (site / f"{name}-{distribution.version}.dist-info").mkdir()
        for part in ("METADATA", "WHEEL"):
            text = distribution.read_text(part)
            (site / f"{name}-{distribution.version}.dist-info" / part).write_text(text or "")
    return folder / "bin" / "python"


@pytest.mark.slow
def test_the_bill_of_an_environment_is_complete_and_valid(tmp_path: Path) -> None:
    schema = pytest.importorskip("cyclonedx.schema", reason="cyclonedx-bom is not installed (extra dev)")
    from cyclonedx.validation.json import JsonStrictValidator

    out = tmp_path / "sbom.cdx.json"
    python = _environment(tmp_path / "environment")
    command = [sys.executable, str(ROOT / "tools" / "sbom.py"), str(python), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    bill = json.loads(out.read_text())
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "pkd")
    assert JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(out.read_text()) is None
    found = {one["name"].lower(): one for one in bill["components"]}
    for name in PACKAGES:
        assert found[name]["version"] == importlib.metadata.version(name)
        assert found[name]["purl"].startswith(f"pkg:pypi/{name}@")
    vendored = found["onnxruntime-web"]
    lock = json.loads((ROOT / "tools" / "vendor" / "package-lock.json").read_text())
    assert vendored["version"] == lock["packages"]["node_modules/onnxruntime-web"]["version"]
    sums = (ROOT / "serving" / "web" / "vendor" / "SHA256SUMS").read_text()
    assert vendored["components"] and all(one["hashes"][0]["content"] in sums for one in vendored["components"])
    assert str(ROOT) not in out.read_text()  # no path of the machine that made it
