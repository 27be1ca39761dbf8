"""A newcomer's test: an export format that lives outside pkd, in one file, named on the command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from pkd.export.cli import main
from pkd.export.formats.registry import find_format
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.core.errors import InputError
from tests.support.bundle_factory import teacher_file

OWN = '''
"""Build files for a runtime that loads a gzipped ONNX graph."""

import gzip

import onnxruntime

from pkd.export.formats.base import Built, Format
from pkd.export.graph.precision_variants import GraphForm


def build(graph, precision, options, tell):
    tell("packing")
    session = onnxruntime.InferenceSession(gzip.decompress(gzip.compress(graph.data)))

    def embed(crops):
        return session.run(None, {"crops": crops})[0] * SCALE

    return Built({"encoder.onnx.gz": gzip.compress(graph.data, mtime=0)}, "own 1.0", {"level": 9}, "own 1.0", embed)


SCALE = 1
FORMAT = Format("zipped", ("fp32", "fp16"), GraphForm("u8s8"), build)
'''
STATED = ["--teacher", "t.onnx", "--teacher-preprocess", "mean=127.5,std=127.5", "-o", "made"]


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the format as somebody's module on the path, and a teacher in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    teacher_file(tmp_path / "t.onnx")
    (tmp_path / "theirs.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    return tmp_path / "theirs.py"


def test_a_format_of_ones_own_is_built_checked_and_listed_as_pkds_are(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--format", "onnx", "theirs:FORMAT", "--precision", "fp32", "fp16", "--json"]
    assert main([*STATED, *chosen]) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in told["targets"]] == [
        "onnxruntime-fp32",
        "onnxruntime-fp16",
        "zipped-fp32",
        "zipped-fp16",
    ]
    bundle = Bundle.open("made")
    target = bundle.manifest.target("zipped-fp16")
    assert target is not None and target.file == "targets/zipped-fp16/encoder.onnx.gz"
    assert (target.made_with, target.checked_with, target.settings) == ("own 1.0", "own 1.0", {"level": 9})
    assert target.encoder.id == bundle.manifest.target("onnxruntime-fp16").encoder.id  # type: ignore[union-attr]
    assert {row["graph"] for row in told["parity"]} >= {"zipped-fp32", "zipped-fp16"}
    assert main(["--from-bundle", "made", "--format", "theirs:FORMAT", "--json"]) == 0, "added again, in its place"


def test_its_targets_are_held_to_parity(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module.write_text(OWN.replace("SCALE = 1", "SCALE = 1.1"))
    assert main([*STATED, "--format", "theirs:FORMAT"]) == 4
    assert "parity: zipped-fp32" in capsys.readouterr().err
    assert not Path("made").exists()


def test_what_it_throws_is_one_line_with_a_remedy(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module.write_text(
        OWN.replace("    tell(", "    raise RuntimeError('src/x.cpp:12: ns::f()\\nno such layer')\n    tell(")
    )
    assert main([*STATED, "--format", "theirs:FORMAT"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "zipped-fp32: zipped cannot run this network in fp32: no such layer." in said
    assert "Leave --format theirs:FORMAT out" in said and ".cpp" not in said


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("theirs", ("", ""), "unknown. Choose of onnx, openvino"),
        ("theirs:", ("", ""), "unknown"),
        ("nowhere:FORMAT", ("", ""), "nowhere cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ("theirs:OTHER", ("", ""), "has no OTHER"),
        ("theirs:build", ("", ""), "is a function. It must be a pkd.export.formats.base.Format"),
        ("theirs:FORMAT", ('"zipped"', '"onnxruntime"'), "its runtime onnxruntime is that of --format onnx"),
        ("theirs:FORMAT", ('"zipped"', '"zip ped"'), "must be letters, digits and underscores"),
        ("theirs:FORMAT", ('"fp16")', '"fp8")'), "must be some of fp32, fp16, int8, w8a16, bf16"),
        (
            "theirs:FORMAT",
            ("SCALE = 1", "SCALE = 1 / 0"),
            "theirs cannot be imported (ZeroDivisionError: division by zero)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, change: tuple[str, str], said: str, module: Path) -> None:
    module.write_text(OWN.replace(*change) if change[0] else OWN)
    with pytest.raises(InputError, match=f"^--format {name}: ") as caught:
        find_format(name)
    assert said in str(caught.value)


def test_a_missing_package_is_said_before_the_work_and_the_graph_is_not_called_ok(
    module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = OWN.replace('u8s8"), build)', "u8s8\"), build, need_packages('own', 'nowhere'))")
    absent = absent.replace("import Built, Format", "import Built, Format, need_packages")
    module.write_text(absent)
    assert main([*STATED, "--format", "theirs:FORMAT"]) == 3
    lines = capsys.readouterr().err.splitlines()
    first = next(
        i for i, line in enumerate(lines) if "note: zipped-fp32: only the graph is written, nothing is built" in line
    )
    assert first < next(i for i, line in enumerate(lines) if "parity with the source" in line)
    (row,) = (i for i, line in enumerate(lines) if line.lstrip("│ ").startswith("zipped-fp32"))
    assert "not built" in " ".join(line.strip("│ ").split()[-1] for line in lines[row : row + 2])
    assert "pkd-export --from-bundle made --format theirs:FORMAT --precision fp32" in lines[-1]
    assert np.all([target.file is None for target in Bundle.open("made").manifest.targets])


def test_the_format_in_the_documentation_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[4] / "docs/export.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "own_format.py").write_text(program)
    assert main([*STATED, "--format", "onnx", "own_format:FORMAT"]) == 0, capsys.readouterr().err
    assert Bundle.open("made").manifest.target("gzipped-fp32") is not None
