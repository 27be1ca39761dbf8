"""docs/api.md is true: its program runs against a real server, and its routes and problems exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pkd.serving.api.problems import TYPES
from pkd.toolkit.images.codec import write_rgb
from tests.support import gallery_fixtures as made

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENT = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))


def blocks(language: Any) -> Any:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = made.fleet(tmp_path / "bundles")
    for index, name in enumerate(("ann", "bob")):
        (tmp_path / "faces/test" / name).mkdir(parents=True)
        write_rgb(tmp_path / "faces/test" / name / "1.webp", made.CROPS[index])
    monkeypatch.chdir(tmp_path)
    (program,) = blocks("python")
    with made.serving(fleet, tmp_path / "store") as client:
        program = program.replace("http://127.0.0.1:8000", str(client.base_url)).replace('"student"', '"first"')
        names: dict[str, Any] = {}
        exec(compile(program, "docs/api.md", "exec"), names)
        names["client"].close()
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"bob \['\d+'\]", said[0])
    assert said[1:4] == ["match ann True", "True", "unsupported-fmr 0.0001"]
    assert re.fullmatch(r"[0-9a-f]{64}", said[4])


def test_the_example_of_a_refusal() -> None:
    (example,) = (json.loads(block) for block in blocks("json"))
    _, status, title = TYPES[example["type"]]
    assert (example["status"], example["title"]) == (status, title)
    assert {"expected", "got", "works"} <= set(example)


@pytest.mark.parametrize("path", [path for path in DOCUMENT["paths"] if path.startswith("/v1")])
def test_every_route_is_on_the_page(path: str) -> None:
    short = path.replace("/v1/galleries/{gallery}", "…")
    bare = path.removeprefix("/v1") if path in ("/v1/embed", "/v1/verify") else path
    assert any(f"{form}`" in TEXT or f"{form}?" in TEXT for form in (path, short, bare))


def test_every_route_on_the_page_exists() -> None:
    for method, path in re.findall(r"`(GET|PUT|POST|DELETE) (/v1[^`?]*)`", TEXT):
        assert method.lower() in DOCUMENT["paths"][path], (method, path)
