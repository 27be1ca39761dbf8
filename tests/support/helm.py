"""Helm's own library in a process of its own: its Go runtime ended pytest workers that had other native libraries.

Run as a program it answers a line of JSON, {"chart", "values" or null to lint}, with a line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class HelmError(Exception):
    """Say what Helm found wrong."""


class Helm:
    """Lint and render one chart in a process that lives until ``close``."""

    def __init__(self, chart: Path) -> None:
        self._chart = str(chart)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @staticmethod
    def is_there() -> bool:
        """Tell whether helm-python-sdk is installed."""
        return importlib.util.find_spec("helm_python") is not None

    def lint(self) -> Any:
        """Return Helm's findings."""
        return self._ask(None)

    def render(self, values: dict[str, Any]) -> dict[str, str]:
        """Render the chart: text by file. Raises HelmError for wrong values."""
        files: dict[str, str] = self._ask(values)
        return files

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, values: dict[str, Any] | None) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"chart": self._chart, "values": values}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "Helm\'s process ended"}')
        if "error" in answer:
            raise HelmError(answer["error"])
        return answer["found"]


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Lint or render."""
    import helm_python as helm

    try:
        if asked["values"] is None:
            return {"found": helm.lint(asked["chart"])}
        with helm.Chart.load(asked["chart"]) as chart:
            return {"found": dict(chart.render(asked["values"], name="faces", namespace="pkd"))}
    except helm.HelmError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
