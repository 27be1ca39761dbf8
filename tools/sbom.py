"""Write a software bill of materials (CycloneDX 1.6, JSON) of an environment that pkd is installed in.

Run as: python tools/sbom.py build/sbom/bin/python dist/sbom.cdx.json    # `make sbom` does, for pkd[serve] alone
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VENDOR = ROOT / "serving" / "web" / "vendor"


def main(python: str, out: Path) -> int:
    """List the packages of an environment by cyclonedx-py, and add what the wheel vendors; returns the exit code."""
    listing = [sys.executable, "-m", "cyclonedx_py", "environment", "--spec-version", "1.6", "--output-reproducible"]
    listing += ["--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "application", python]
    done = subprocess.run(listing, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{python}: no environment that can be listed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    bill: dict[str, Any] = json.loads(done.stdout)
    for one in bill["components"]:  # an editable install tells where it lies
        one["externalReferences"] = [
            each for each in one.get("externalReferences", []) if not each["url"].startswith("file:")
        ]
    bill["components"].append(_vendored())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(bill, indent=2) + "\n")
    print(f"wrote {out}: {len(bill['components'])} components")
    return 0


def _vendored() -> dict[str, Any]:
    """Describe onnxruntime-web, whose files lie in the wheel, with their hashes."""
    lock = json.loads((ROOT / "tools" / "vendor" / "package-lock.json").read_text())
    version = lock["packages"]["node_modules/onnxruntime-web"]["version"]
    purl = f"pkg:npm/onnxruntime-web@{version}"
    sums = [line.split(maxsplit=1) for line in (VENDOR / "SHA256SUMS").read_text().splitlines()]
    files = [
        {"type": "file", "name": name.lstrip("*"), "hashes": [{"alg": "SHA-256", "content": digest}]}
        for digest, name in sums
    ]
    licences = [{"license": {"id": "MIT"}}]
    return {
        "type": "library", "bom-ref": purl, "name": "onnxruntime-web", "version": version, "purl": purl,
        "licenses": licences, "components": files,
    }  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/sbom.py PYTHON FILE.json")
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
