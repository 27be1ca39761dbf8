"""The C++ client compiles, passes the conformance kit, and asks the same as the Python client from real photographs."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.bundle.golden import Golden, pack_golden
from pkd.toolkit.cli.verify import main as verify
from tests.support import bundle_factory

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
INCLUDES = "".join(
    f"#include <{name}>\n"
    for name in ("cstdio", "jpeglib.h", "png.h", "webp/decode.h", "zlib.h", "nlohmann/json.hpp", "string")
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the client. Skips with a reason where the compiler or a library is missing."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed, which compiles examples/cpp")
    tried = subprocess.run(
        ["g++", "-std=c++17", "-E", "-x", "c++", "-", "-o", "/dev/null"], input=INCLUDES, capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"a library of examples/cpp is missing: {tried.stderr.splitlines()[0]}")
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        pytest.skip("this onnxruntime package has no libonnxruntime.so to link with")
    build = tmp_path_factory.mktemp("cpp")
    options = ["-D", f"ONNXRUNTIME={found[0]}", "-D", "CMAKE_BUILD_TYPE=Debug", "-D", "CMAKE_CXX_FLAGS=-Werror"]
    for command in (["-S", str(EXAMPLES / "cpp"), "-B", str(build), *options], ["--build", str(build)]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "pkd_device"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_factory.bundle(tmp_path_factory.mktemp("device"))


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


def steps(bundle: Bundle, kit: Path, report: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, set[str]]:
    """Grade a report → step to the results of all cases."""
    capsys.readouterr()
    code = verify([str(bundle.path), "--device-kit", str(kit), "--device-report", str(report), "--json"])
    graded = json.loads(capsys.readouterr().out)
    assert (code == 0) == graded["passed"]
    found: dict[str, set[str]] = {}
    for one in graded["grades"]:
        found.setdefault(one["step"], set()).add(one["result"])
    return found


def test_the_kit_without_a_detector(
    program: Path, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit, report = tmp_path / "kit", tmp_path / "report.json"
    assert verify([str(bundle.path), "--device-kit", str(kit)]) == 0
    done = run(program, bundle.path, "-", "--kit", kit, report)
    assert done.returncode == 0, done.stderr
    found = steps(bundle, kit, report, capsys)
    assert {step for step, results in found.items() if results == {"ok"}} == set(found) - {"landmarks", "whole"}

    photograph, points = kit / "exif6.jpg", json.loads((kit / "kit.json").read_text())["cases"]
    given = next(one for one in points if one["name"] == "exif6.jpg")
    text = ",".join(str(number) for point in given["landmarks"] for number in point)
    body = run(program, bundle.path, "--landmarks", text, photograph, "GALLERY", "SUBJECT")
    assert cosine(json.loads(body.stdout), given["request"]) > 1 - 1e-4


def test_what_is_wrong_is_one_line(program: Path, bundle: Bundle, tmp_path: Path) -> None:
    photograph = tmp_path / "photo.jpg"
    photograph.write_bytes(b"\xff\xd8\xff\xe0 no JPEG")
    broken = tmp_path / "broken"
    shutil.copytree(bundle.path, broken)
    (broken / "golden.npz").write_bytes(bundle.read("golden.npz")[:-200])
    longer = tmp_path / "longer"
    shutil.copytree(bundle.path, longer)
    golden = bundle.golden()
    (longer / "golden.npz").write_bytes(pack_golden(Golden(golden.crops, 7 * golden.embeddings)))
    points = ",".join(["10"] * 10)
    for arguments, said in (
        ((bundle.path, "--landmarks", points, photograph), "cannot be decoded"),
        ((bundle.path, "--landmarks", "1,2,3", photograph), "give ten numbers"),
        ((tmp_path / "none", "-", photograph), "manifest.json: cannot be read"),
        ((broken, "--landmarks", points, photograph), "golden.npz"),
        ((longer, "--landmarks", points, photograph), "the student computes something else here"),
    ):
        done = run(program, *arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert run(program).returncode == 2


@pytest.mark.shared
def test_with_a_detector_on_the_kit_and_on_people(
    program: Path, bundle: Bundle, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yunet = shared / "models" / "yunet_n_dynamic.onnx"
    kit, report = tmp_path / "kit", tmp_path / "report.json"
    assert verify([str(bundle.path), "--device-kit", str(kit), "--detector", str(yunet)]) == 0
    assert run(program, bundle.path, yunet, "--kit", kit, report).returncode == 0
    assert all(results == {"ok"} for results in steps(bundle, kit, report, capsys).values())

    photographs = sorted((shared / "faces" / "lfw" / "raw-devtest").glob("*/*.jpg"))[:900:450]
    for photograph in photographs:
        cpp = run(program, bundle.path, yunet, photograph)
        python = subprocess.run(
            [sys.executable, EXAMPLES / "python" / "pkd_device.py", bundle.path, yunet, photograph],
            capture_output=True,
            text=True,
            check=True,
        )
        assert cosine(json.loads(cpp.stdout), json.loads(python.stdout)) > 1 - 1e-4


def cosine(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Compare the embeddings of two requests, whose other fields must be equal."""
    vectors = []
    for body in (one, other):
        data = base64.b64decode(body["a"].pop("embedding"))
        vectors.append(np.frombuffer(data, "<f2").astype(np.float64))
    assert one == other
    first, second = vectors
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
