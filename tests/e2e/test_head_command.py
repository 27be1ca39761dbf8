"""pkd-distill with the head of another trainer, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.cli.distill import main
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.heads.head import class_means
from pkd.toolkit.distill.models.open_encoder import open_encoder
from pkd.toolkit.encoders.embed import embed_faces
from tests.support.head_data import write_shards
from tests.support.training_data import SIZE, write_patterns, write_teacher

STATED = f"mean=127.5,std=127.5,size={SIZE},template=none"


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = str(Path(sys.executable).with_name("pkd-distill"))
    done = subprocess.run([command, *argv], capture_output=True, text=True, timeout=300, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_shards_a_label_map_and_an_audit_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crops = write_patterns(tmp_path / "crops")
    (crops / "id-01").rename(crops / "zoe")  # the images' order is no longer that of the training
    write_teacher(tmp_path / "teacher.onnx")
    faces = FaceSet.read(crops)
    teacher = open_encoder(str(tmp_path / "teacher.onnx"), STATED)
    plain, mirrored = (embed_faces(teacher, faces, flip=flip) for flip in (False, True))
    order = np.array([faces.identities.index(n) for n in ("id-00", "zoe", "id-02", "id-03", "id-04", "id-05")])
    centres = class_means(plain, mirrored, faces.labels, faces.identities).centres.numpy()
    paths = write_shards(tmp_path / "pfc", centres[order], 3)
    (tmp_path / "map.txt").write_text("\n".join(faces.identities[i] for i in order) + "\n")
    common = [
        "--teacher", str(tmp_path / "teacher.onnx"), "--teacher-preprocess", STATED, "--faces", str(crops),
        "--student", "mobilefacenet-relu:0.125", "--steps", "2", "--batch", "8", "--precision", "fp32",
        "--threads", "1", "--cache", str(tmp_path / "cache"), "--head", *map(str, reversed(paths)),
    ]  # fmt: skip
    done = run(*common, "--head-labels", str(tmp_path / "map.txt"), "--out", str(tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    assert "3 shards" in json.loads(done.stdout)["head"]
    audit = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert audit["top1"] == 1 and audit["images"] == 30 and audit["fault"] is None
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["head"] == [str(p) for p in reversed(paths)] and stored["head_labels"] == str(tmp_path / "map.txt")
    paths[1].unlink()
    assert main([*common[:-3], str(tmp_path / "pfc"), "--out", str(tmp_path / "missing")]) == 2
    assert "rank 1 is missing" in capsys.readouterr().err and not (tmp_path / "missing").exists()
