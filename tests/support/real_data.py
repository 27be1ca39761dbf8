"""Find the real faces and teachers, if there are any."""

from __future__ import annotations

import os
from pathlib import Path

SHARED = Path(os.environ.get("PKD_SHARED") or Path(__file__).resolve().parents[3] / "shared")
HAS_SHARED = (SHARED / "faces").is_dir() and (SHARED / "models").is_dir()
NO_SHARED = f"no real faces and teachers in {SHARED}; set PKD_SHARED to the folder that holds faces/ and models/"
