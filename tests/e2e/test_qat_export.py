"""From a run whose INT8 fails to a bundle whose INT8 passes: --gate --qat on a student trained within the test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from rich.console import Console

from pkd.export.checks.parity import synthetic_crops
from pkd.export.cli import main
from pkd.toolkit.bundle.bundle import Bundle, self_test
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.distill.models.student import load_student, save_student, weights_digest
from pkd.toolkit.distill.training.loop import distill
from pkd.toolkit.distill.training.setup import prepare
from pkd.toolkit.images.codec import write_rgb
from tests.support.training_data import SIZE, write_patterns, write_teacher

STUDENT = "mobilefacenet-relu:0.125"
STATED = f"mean=127.5,std=127.5,size={SIZE},template=none"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """people/, list files of them, drawn/ (procedural faces, for the golden crops are such), teacher.onnx, run/."""
    root = tmp_path_factory.mktemp("qat")
    people = write_patterns(root / "people", 40, 8)
    for name, images in (("train", range(5)), ("test", range(5, 8))):
        listed = [f"{people}/id-{i:02}/{k}.png\n" for i in range(40) for k in images]
        (root / f"{name}.txt").write_text("".join(listed))
    (root / "drawn").mkdir()
    for i, crop in enumerate(synthetic_crops(232, SIZE)[32:]):
        write_rgb(root / "drawn" / f"{i}.png", crop)
    drawn = "".join(f"{path}\n" for path in sorted((root / "drawn").iterdir()))
    (root / "calibration.txt").write_text((root / "train.txt").read_text() + drawn)
    write_teacher(root / "teacher.onnx")
    config = DistillConfig(
        out=str(root / "even"), faces=(str(root / "train.txt"),), unlabelled=(str(root / "drawn"),), student=STUDENT,
        teacher=str(root / "teacher.onnx"), teacher_preprocess=STATED, method="l2kd", steps=150, batch=24, lr=1e-2,
        augment=0.0, precision="fp32", threads=1, cache=str(root / "cache"),
    )  # fmt: skip
    quiet, teacher = Console(quiet=True), open_encoder(config.teacher or "", STATED)
    distill(config, prepare(config, teacher, quiet), teacher, quiet)
    make_uneven(root / "even", root / "run", 70.0)
    return root


def make_uneven(even: Path, run: Path, factor: float) -> None:
    """Keep the function, with a channel of every block so large in one layer that INT8 sees little of the others."""
    trained = load_student(even)
    with torch.no_grad():
        for block in trained.module.blocks:  # type: ignore[union-attr]
            norm, projection = block.body[4], block.body[6]  # type: ignore[union-attr,index]
            norm.weight[0] /= factor
            norm.bias[0] /= factor
            projection.weight[:, 0] *= factor
    info = trained.info
    digest = weights_digest(trained.module.state_dict())
    uneven = describe("uneven", "student", digest, info.preprocess, info.space.dim, space=info.space)
    run.mkdir()
    save_student(run, trained.module, STUDENT, uneven, trained.training)
    shutil.copy(even / "config.json", run)


def test_training_on_rescues_what_int8_ruined(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("PKD_CACHE", str(world / "cache"))
    made = tmp_path / "made"
    command = ["run", "-o", str(made), "--precision", "fp32", "int8", "--calib", "calibration.txt", "--json"]
    command += ["--gate", "test.txt", "--gate-teacher", "teacher.onnx", "--gate-teacher-preprocess", STATED]
    command += ["--gate-fmr", "0.02", "--max-tar-drop", "0.2", "--qat", "--qat-steps", "120"]
    assert main([*command, "--qat-faces", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(command) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    first, last = told["gated"][0], told["gated"][-1]
    assert not first["passed"] and first["drop"]["difference"] > 0.2, "plain INT8 really fails"
    assert last["passed"] and last["tried"] == "trained on for 120 steps" and last["level"] > 0.95
    bundle = Bundle.open(made)
    target = bundle.manifest.target("onnxruntime-int8")
    assert target is not None and target.settings["qat_steps"] == 120
    assert target.settings["qat_from"] == bundle.manifest.encoder.id != target.settings["qat_encoder"]
    assert target.encoder.space == bundle.manifest.encoder.space and target.encoder.id == last["encoder"]
    assert bundle.manifest.encoder == load_student("run").info, "encoder.onnx stays the run's"
    opened = open_encoder(str(made / "targets" / "onnxruntime-int8"))
    assert self_test(bundle, opened.embed, target) <= target.golden_tolerance
