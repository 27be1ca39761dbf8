"""Formats are found, built, compared and refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from pkd.export.checks.parity import synthetic_crops
from pkd.export.cli import main
from pkd.export.formats import registry
from pkd.export.formats.registry import target_requests
from pkd.export.options import PRECISIONS, ExportOptions
from pkd.export.quantization.ranges import CALIBRATION_CROPS, read_calibration
from pkd.toolkit.bundle.bundle import Bundle, self_test
from pkd.toolkit.certificates.signing import Signature
from pkd.toolkit.cli.verification import verify
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.gpu import find_gpu
from pkd.toolkit.encoders.base import open_bundle
from pkd.toolkit.encoders.registry import open_target
from tests.support.bundle_factory import certificate, teacher_file

STATED = ["--teacher", "t.onnx", "--teacher-preprocess", "channels=rgb,mean=127.5,std=127.5"]
INT8 = ["--precision", "int8", "--calib", "faces"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a teacher with PReLU and 40 drawn crops."""
    folder = tmp_path_factory.mktemp("drawn")
    teacher_file(folder / "t.onnx")
    (folder / "faces").mkdir()
    for i, crop in enumerate(synthetic_crops(40, 112)):
        cv2.imwrite(str(folder / f"faces/{i:02}.png"), crop[..., ::-1])
    return folder


@pytest.fixture(autouse=True)
def here(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put teacher and crops into the current folder."""
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def export(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, object]:
    assert main([*options, "--json"]) == code, capsys.readouterr().err
    printed = capsys.readouterr()
    assert printed.err.count("\n") == (1 if code else 0), printed.err
    result: dict[str, object] = {**json.loads(printed.out), "said": printed.err}
    return result


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    before = sorted(Path().rglob("*"))
    assert main(list(options)) == 2
    assert sorted(Path().rglob("*")) == before
    return capsys.readouterr().err


def test_the_command_names_what_the_table_has() -> None:
    shown = str(ExportOptions.model_fields["format"].description)
    assert all(name in shown for name in registry.FORMATS)
    assert set(PRECISIONS) == {precision for row in registry.FORMATS.values() for precision in row.precisions}


def test_pairs_that_do_not_exist_are_left_out_but_nothing_asked_for_is_forgotten() -> None:
    requests = target_requests(["onnx", "openvino"], ["fp32", "bf16"])
    assert [(request.format_name, request.precision) for request in requests] == [
        ("onnx", "fp32"),
        ("openvino", "fp32"),
        ("openvino", "bf16"),
    ]
    with pytest.raises(InputError, match="--format onnx has no bf16; it has fp32, fp16, int8"):
        target_requests(["onnx", "openvino"], ["bf16"])
    with pytest.raises(InputError, match="--precision bf16: no chosen format has it"):
        target_requests(["onnx"], ["fp32", "bf16"])


def test_prelu_stays_in_the_bundles_graph_and_is_decomposed_for_onnxruntime(capsys: pytest.CaptureFixture[str]) -> None:
    export(capsys, *STATED, "-o", "made")
    bundle = Bundle.open("made")
    operators = {
        name: {node.op_type for node in onnx.load_model_from_string(bundle.read(name)).graph.node}
        for name in ("encoder.onnx", "targets/onnxruntime-fp32/encoder.onnx")
    }
    assert "PRelu" in operators["encoder.onnx"]
    assert "PRelu" not in operators["targets/onnxruntime-fp32/encoder.onnx"]
    assert bundle.manifest.target("onnxruntime-fp32").encoder == bundle.manifest.encoder  # type: ignore[union-attr]
    (bundle.path / "encoder.onnx").chmod(0o644)
    served = open_bundle(bundle)
    assert self_test(bundle, served.embed) < 1e-6


def test_every_precision_on_the_cpu_opens_passes_and_has_its_own_id(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    result = export(
        capsys, *STATED, "-o", "made", "--format", "onnx", "openvino", "--precision", "fp32", "fp16", "w8a16", *INT8[1:]
    )
    bundle = Bundle.open("made")
    runtimes = {"onnxruntime": ("fp32", "fp16", "w8a16", "int8"), "openvino": ("fp32", "int8")}
    names = [f"{runtime}-{precision}" for runtime, precisions in runtimes.items() for precision in precisions]
    assert [target["name"] for target in result["targets"]] == names  # type: ignore[attr-defined, index]
    for name in names:
        target = bundle.manifest.target(name)
        assert target is not None
        assert self_test(bundle, open_target(bundle, name).embed, target) <= target.golden_tolerance
        assert (target.encoder.id == bundle.manifest.encoder.id) == (target.precision == "fp32")
    assert len(bundle.manifest.encoders) == 5, "fp32, fp16, w8a16 and two forms of int8"
    assert {target.encoder.space for target in bundle.manifest.targets} == {bundle.manifest.encoder.space}
    settings = bundle.manifest.target("onnxruntime-int8").settings  # type: ignore[union-attr]
    assert settings["calibration"] == "percentile on 32 crops of faces"
    assert 0 < settings["similarity_rms"] < 0.05  # type: ignore[operator]
    wide = bundle.manifest.target("onnxruntime-w8a16").settings  # type: ignore[union-attr]
    assert 0 < wide["similarity_rms"] < settings["similarity_rms"]  # type: ignore[operator]
    checks = verify(bundle.path, None).checks
    assert {c.file for c in checks if "golden" in c.question} >= {f"targets/{name}" for name in names}
    assert not [check for check in checks if check.result == "failed"]


def test_the_same_calibration_gives_the_same_bytes_and_another_another_encoder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ids = []
    for i, method in enumerate(["minmax", "minmax", "entropy"]):
        result = export(capsys, *STATED, "-o", f"made{i}", *INT8, "--calib-method", method)
        ids.append(result["targets"][0]["encoder"])  # type: ignore[index]
    assert ids[0] == ids[1] != ids[2]


def test_costly_layers_can_stay_in_float(capsys: pytest.CaptureFixture[str]) -> None:
    result = export(capsys, *STATED, "-o", "made", *INT8, "--keep-float", "1")
    costs = result["sensitivity"]["u8s8"]  # type: ignore[index]
    assert [cost["saved"] for cost in costs] == sorted((cost["saved"] for cost in costs), reverse=True)
    assert result["targets"][0]["settings"]["layers_in_fp32"] == costs[0]["layer"]  # type: ignore[index]


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_without_a_gpu_the_graphs_are_written_and_built_later(capsys: pytest.CaptureFixture[str]) -> None:
    result = export(capsys, *STATED, "-o", "made", "--trt", *INT8, "--precision", "fp32", "int8", code=3)
    assert "pkd-export --from-bundle made --trt --precision fp32 int8" in str(result["said"])
    assert "no NVIDIA GPU" in str(result["said"])
    bundle = Bundle.open("made")
    files = {t.name: (t.graph, t.file) for t in bundle.manifest.targets}
    assert files == {
        "tensorrt-fp32": ("encoder.onnx", None),
        "tensorrt-int8": ("targets/tensorrt-int8/encoder.onnx", None),
    }
    result = export(capsys, "--from-bundle", "made", "--trt", "--precision", "fp32", "int8", code=3)
    again = Bundle.open("made").manifest
    assert [(t.encoder, t.graph, t.file, t.settings) for t in again.targets] == [
        (t.encoder, t.graph, t.file, t.settings) for t in bundle.manifest.targets
    ], "no calibration was needed again"
    assert again.files == bundle.manifest.files


def test_engines_are_added_to_a_bundle_from_its_own_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    if find_gpu() is None:
        export(capsys, *STATED, "-o", "made", "--trt", *INT8, code=3)
    else:
        export(capsys, *STATED, "-o", "made", "--trt", *INT8)
    before = Bundle.open("made").manifest
    export(
        capsys,
        "--from-bundle",
        "made",
        "--format",
        "trt-rtx",
        "--precision",
        "fp32",
        "fp16",
        "int8",
        "--batch",
        "1:2:4",
    )
    after = Bundle.open("made")
    assert after.manifest.targets[: len(before.targets)] == before.targets
    made = {t.precision: t for t in after.manifest.targets if t.runtime == "tensorrt_rtx"}
    assert made["int8"].encoder == before.target("tensorrt-int8").encoder  # type: ignore[union-attr]
    for precision, target in made.items():
        assert target.file == f"targets/tensorrt_rtx-{precision}/encoder.engine"
        assert len(after.read(target.file)) > 10_000
        assert (target.settings["batch"], target.settings["tf32"]) == ("1:2:4", False)
        assert target.checked_with.startswith("onnxruntime")
    assert after.manifest.created == before.created
    assert {**before.files, **after.manifest.files} == after.manifest.files


def test_certificates_about_any_encoder_of_the_bundle_are_taken_in(capsys: pytest.CaptureFixture[str]) -> None:
    result = export(capsys, *STATED, "-o", "made", *INT8)
    own, space = result["targets"][0]["encoder"], str(result["space"])  # type: ignore[index]
    measured = certificate(str(own), str(result["encoder"]), space)
    Path("eval/certificates").mkdir(parents=True)
    Path("eval/certificates", measured.file_name).write_text(measured.model_dump_json())
    export(capsys, "--from-bundle", "made", "--certificates", "eval")
    assert Bundle.open("made").certificates() == [measured]
    # Signed in the bundle, measured again without a signature: the old one goes with what it was of.
    name = f"certificates/{measured.file_name}"
    signature = Path("eval", f"{name}.sig")
    signature.write_bytes(Signature("sha256:" + "0" * 64, bytes(64)).text())
    export(capsys, "--from-bundle", "made", "--certificates", "eval")
    assert f"{name}.sig" in Bundle.open("made").manifest.files
    signature.unlink()
    export(capsys, "--from-bundle", "made", "--certificates", "eval")
    assert f"{name}.sig" in Bundle.open("made").manifest.files, "it is the same certificate"
    again = measured.model_copy(update={"created": "2027-01-01T00:00:00+00:00"})
    Path("eval", name).write_text(again.model_dump_json())
    export(capsys, "--from-bundle", "made", "--certificates", "eval")
    assert Bundle.open("made").certificates() == [again]
    assert f"{name}.sig" not in Bundle.open("made").manifest.files
    foreign = certificate(str(own).replace("t@", "x@"), str(own).replace("t@", "y@"), space)
    Path("eval/certificates", measured.file_name).unlink()
    Path("eval/certificates", foreign.file_name).write_text(foreign.model_dump_json())
    assert "is about" in refused(capsys, "--from-bundle", "made", "--certificates", "eval")


def test_bad_options_are_refused_and_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    export(capsys, *STATED, "-o", "made")
    Path("few").mkdir()
    for i in range(3):
        Path(f"few/{i}.png").write_bytes(Path(f"faces/{i:02}.png").read_bytes())
    for options, said in [
        (["--precision", "int8"], "pass --calib DIR or LIST"),
        (["--precision", "int8", "--calib", "nowhere"], "nowhere"),
        (["--precision", "int8", "--calib", "few"], "3 crops are too few"),
        (["--precision", "bf16"], "--format onnx has no bf16"),
        (["--trt", "--batch", "8"], "--batch '8'"),
        (["--keep-float", "-1"], "--keep-float"),
        (["--workspace", "0"], "--workspace"),
    ]:
        assert said in refused(capsys, *STATED, "-o", "other", *options)
    for options, said in [
        (["--from-bundle", "made", "-o", "x"], "Leave -o out"),
        (["--from-bundle", "made", "--licence", "x"], "Leave --licence out"),
        (["--from-bundle", "nowhere"], "not a bundle"),
    ]:
        assert said in refused(capsys, *options)


def test_calibration_and_judgement_share_no_crop(tmp_path: Path) -> None:
    sample = read_calibration(tmp_path / "faces", 112, "minmax")
    assert (len(sample.crops), len(sample.held_out)) == (32, 8)
    both = {crop.tobytes() for crop in sample.crops} & {crop.tobytes() for crop in sample.held_out}
    assert not both
    assert len(np.unique(np.concatenate([sample.crops, sample.held_out]).reshape(40, -1), axis=0)) == 40
    assert CALIBRATION_CROPS == 256


@pytest.mark.shared
@pytest.mark.slow
def test_real_crops_keep_a_real_teacher_in_int8(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    teacher = str(shared / "models/teacher_mobilefacenet_y1_128.onnx")
    options = ["--teacher", teacher, "--teacher-preprocess", "mean=0,std=1", "-o", "made"]
    listed = (shared / "faces/splits/val.txt").read_text().split()
    Path("some.txt").write_text("\n".join(str(shared / "faces" / line) for line in listed[:: len(listed) // 60][:60]))
    result = export(capsys, *options, "--precision", "int8", "--calib", "some.txt")
    (target,) = result["targets"]  # type: ignore[misc]
    assert target["bytes"] < 0.31 * int(str(result["bytes"]))  # type: ignore[has-type]
    assert target["settings"]["similarity_rms"] < 0.05  # type: ignore[has-type]
