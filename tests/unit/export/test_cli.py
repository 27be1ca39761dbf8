"""What pkd-export is asked for, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import rmtree
from typing import cast

import numpy as np
import pytest
from onnx import helper

from pkd.export.cli import main
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.certificates.certificate import usefulness
from pkd.toolkit.certificates.signing import TrustedKeys, new_key
from pkd.toolkit.cli.verify import main as verify
from pkd.toolkit.core.errors import BadVector
from pkd.toolkit.device.kit import kit_of, read_kit
from tests.support.bundle_factory import bundle, certificate, network, teacher_file

STATED = "channels=rgb,mean=127.5,std=127.5"


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    teacher_file(tmp_path / "t.onnx")
    return ["--teacher", "t.onnx", "--teacher-preprocess", STATED, "--json"]


def made_by(capsys: pytest.CaptureFixture[str], command: list[str]) -> dict[str, object]:
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert printed.err == ""
    result: dict[str, object] = json.loads(printed.out)
    return result


def refusal(capsys: pytest.CaptureFixture[str], command: list[str], code: int = 2) -> str:
    before = sorted(Path().rglob("*"))
    assert main(command) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert sorted(Path().rglob("*")) == before, "a refused command must leave nothing behind"
    return printed.err


def test_a_teacher_keeps_its_identity_and_says_where_it_came_from(
    teacher: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = made_by(capsys, [*teacher, "-o", "made", "--licence", "CC BY 4.0"])
    manifest = Bundle.open("made").manifest
    assert result["encoder"] == manifest.encoder.id
    assert manifest.encoder.role == "teacher"
    assert (manifest.licence, manifest.gate) == ("CC BY 4.0", "not gated")
    assert manifest.training["source"] == "t.onnx"
    checked = [(row["graph"], row["batch"]) for row in result["parity"]]  # type: ignore[index, attr-defined]
    assert checked == [(graph, b) for graph in ("uint8 NHWC", "onnxruntime-fp32") for b in (1, 2, 7, 32)]


def test_certificates_and_report_go_into_the_bundle(teacher: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    info = made_by(capsys, [*teacher, "-o", "first"])
    measured = certificate(str(info["encoder"]), str(info["encoder"]), str(info["space"]))
    Path("eval/certificates").mkdir(parents=True)
    Path("eval/certificates", measured.file_name).write_text(measured.model_dump_json())
    Path("eval/report.html").write_text("<p>")
    result = made_by(capsys, [*teacher, "-o", "made", "--certificates", "eval"])
    written = Bundle.open("made")
    assert written.certificates() == [measured]
    assert written.read("report.html") == b"<p>"
    assert result["certificates"] == [f"{measured.query} against {measured.gallery}"]
    (shown,) = cast("list[dict[str, object]]", result["accuracy"])
    assert (shown["fmr"], shown["tar"]) in {(point.fmr, point.tar_balanced) for point in measured.points}
    assert shown["verdict"] == usefulness(measured.points[0])


def test_force_replaces_the_bundle_and_the_float_graph(teacher: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [*teacher, "-o", "made", "--float-nchw", "sub/float.onnx"]
    made_by(capsys, command)
    Path("sub/float.onnx").write_bytes(b"old")
    assert "made exists already" in refusal(capsys, command)
    assert "sub/float.onnx exists already" in refusal(capsys, [*command[:-3], "other", *command[-2:]])
    made_by(capsys, [*command, "--force", "--licence", "new"])
    assert Bundle.open("made").manifest.licence == "new"
    assert Path("sub/float.onnx").stat().st_size > 1000
    assert sorted(p.name for p in Path().iterdir()) == ["made", "sub", "t.onnx"]


def test_bad_options_are_refused_in_one_line(
    teacher: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bundle(tmp_path, "is-bundle")
    Path("project").mkdir()
    Path("project/manifest.json").write_text("{}")
    Path("empty").mkdir()
    out = ["-o", "made"]
    for command, said in [
        (["--teacher", "t.onnx", *out], "--teacher-preprocess"),
        (["--teacher", "t.onnx", "--teacher-preprocess", "mean=x", *out], "mean"),
        (["--teacher", "none.onnx", "--teacher-preprocess", STATED, *out], "none.onnx"),
        (["--teacher", "is-bundle", *out], "is a bundle already"),
        (["is-bundle", *out], "is a bundle already"),
        (["t.onnx", *out], "--teacher t.onnx"),
        (["insightface:buffalo_l", *out], "--teacher insightface:buffalo_l"),
        (["empty", *out], "student.pt"),
        (["nowhere", *out], "nowhere"),
        (["nowhere"], "-o BUNDLE is missing"),
        (out, "Give one of RUN, --teacher SPEC and --from-bundle BUNDLE"),
        (["nowhere", "--teacher", "t.onnx", *out], "Give one of RUN"),
        (["empty", "--teacher-preprocess", STATED, *out], "goes with --teacher"),
        ([*teacher, "-o", "project", "--force"], "not a bundle"),
        ([*teacher, "-o", "t.onnx", "--force"], "not a bundle"),
        ([*teacher, "-o", "t.onnx/made"], "t.onnx is a file"),
        ([*teacher, *out, "--float-nchw", "float.pb"], r".onnx"),
        ([*teacher, *out, "--float-nchw", "made/float.onnx"], "inside the bundle"),
        ([*teacher, *out, "--float-nchw", "empty"], ".onnx"),
        ([*teacher, *out, "--float-nchw", "t.onnx"], "exists already"),
        ([*teacher, *out, "--float-nchw", "t.onnx", "--force"], "the teacher itself"),
        ([*teacher, *out, "--certificates", "empty"], "no certificates there"),
        ([*teacher, *out, "--format", "x"], "--format x: unknown. Choose of onnx, openvino"),
    ]:
        assert said in refusal(capsys, command)


@pytest.mark.parametrize(
    "command", [["run", "--precision", "x"], ["run", "--calib-method", "x"], ["run", "other"], ["run", "--nothing"]]
)
def test_usage_is_checked(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2


def test_a_network_that_mixes_the_batch_fails_the_gate(teacher: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    model.graph.node[-1].output[0] = "own"
    model.graph.node.append(helper.make_node("ReduceMean", ["own"], ["mean"], keepdims=1))
    model.graph.node.append(helper.make_node("Add", ["own", "mean"], ["embedding"]))
    Path("t.onnx").write_bytes(model.SerializeToString())
    said = refusal(capsys, [*teacher, "-o", "made", "--float-nchw", "float.onnx"], code=4)
    assert "batch invariance" in said


def test_a_network_of_nan_is_refused(teacher: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    model.graph.node[-1].output[0] = "own"
    model.graph.node.append(helper.make_node("Sqrt", ["own"], ["embedding"]))
    Path("t.onnx").write_bytes(model.SerializeToString())
    assert "NaN" in refusal(capsys, [*teacher, "-o", "made"], code=BadVector.exit_code)


def test_a_float_graph_of_a_size_insightface_takes_for_something_else_is_refused(
    teacher: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher_file(Path("t.onnx"), size=192)
    sized = [*teacher[:3], STATED + ",size=192", "--json", "-o", "made"]
    assert "192" in refusal(capsys, [*sized, "--float-nchw", "float.onnx"])
    made_by(capsys, sized)


def test_signing_and_packing(teacher: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, fingerprint = new_key(Path("key.pem"))
    sign = ["--sign", "key.pem", "--zip"]
    result = made_by(capsys, [*teacher, "-o", "made", *sign])
    assert (result["signed_by"], result["zip"]) == (fingerprint, "made.zip")
    keys = TrustedKeys.read([Path("key.pub.pem")])
    assert Bundle.open("made", keys).data == Bundle.open("made.zip", keys).data
    refused = {
        "made.zip exists already": [*teacher, "-o", "made", *sign],
        "names the folder": [*teacher, "-o", "new.zip"],
        "is a public key": [*teacher, "-o", "new", "--sign", "key.pub.pem"],
        "none.pem: No such file": [*teacher, "-o", "new", "--sign", "none.pem"],
        "Unpack it": ["--from-bundle", "made.zip"],
    }
    rmtree("made")
    for said, command in refused.items():
        assert said in refusal(capsys, command)
    plain = made_by(capsys, [*teacher, "-o", "made", "--force"])
    assert (plain["signed_by"], plain["zip"]) == (None, None)
    assert Bundle.open("made").signature is None
    again = made_by(capsys, [*teacher, "-o", "made", "--force", *sign])
    assert Bundle.open("made.zip", keys).data == Bundle.open("made", keys).data
    assert again["encoder"] == result["encoder"]


def test_the_device_kit_lies_in_the_bundle_and_stays(teacher: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device-kit" in refusal(capsys, [*teacher, "-o", "made", "--kit-detector", "yunet.onnx"])
    made_by(capsys, [*teacher, "-o", "made", "--device-kit", "--zip"])
    made_by(capsys, ["--from-bundle", "made", "--precision", "fp16", "--json"])
    kit = kit_of(Bundle.open("made"))
    assert kit.kit.encoder == Bundle.open("made").manifest.encoder.id
    embeddings = {case.name: np.frombuffer(kit.read(case.embedding), "<f4").tolist() for case in kit.kit.cases}
    report = {"device": "x", "encoder": kit.kit.encoder, "cases": {n: {"embedding": e} for n, e in embeddings.items()}}
    Path("report.json").write_text(json.dumps(report))
    for source in ("made", "made.zip"):
        assert verify([source, "--device-report", "report.json", "--json"]) == 0
        grades = json.loads(capsys.readouterr().out)["grades"]
        assert [one["result"] for one in grades if one["step"] == "embedding"] == ["ok"] * len(embeddings) != []
    made_by(capsys, [*teacher, "-o", "bare"])
    assert verify(["bare", "--device-report", "report.json"]) == 2
    assert "holds no device kit" in capsys.readouterr().err


def test_a_target_in_another_precision_has_a_kit_of_its_own(
    teacher: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made_by(capsys, [*teacher, "-o", "made", "--precision", "fp16"])
    assert verify(["made/targets/onnxruntime-fp16", "--device-kit", "kit"]) == 0
    kit, target = read_kit(Path("kit")), Bundle.open("made").manifest.targets[0]
    assert kit.kit.encoder == target.encoder.id
    assert kit.kit.tolerances.embedding == target.golden_tolerance
    Path("report.json").write_text(json.dumps({"device": "x", "encoder": target.encoder.id, "cases": {}}))
    capsys.readouterr()
    assert verify(["made", "--device-kit", "kit", "--device-report", "report.json"]) == 2
    assert "Give the kit's own bundle" in capsys.readouterr().err
