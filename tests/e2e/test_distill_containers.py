"""pkd-distill on RecordIO, tar shards and a folder of the same images: the same student to the bit."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from pkd.toolkit.cli.distill import main
from tests.support.recordio_writer import insightface_records, write_records
from tests.support.training_data import write_patterns, write_teacher


def distill(folder: Path, faces: Path, out: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    arguments = [
        "--teacher", str(folder / "teacher.onnx"),
        "--teacher-preprocess", "size=32,template=none", "--faces", str(faces), "--student", "mobilefacenet-relu:0.25",
        "--steps", "2", "--batch", "8", "--precision", "fp32", "--threads", "1", "--scale", "16",
        "--cache", str(folder / out / "cache"), "--out", str(folder / out / "run"), "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_every_container_trains_the_same_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_teacher(tmp_path / "teacher.onnx")
    folder = write_patterns(tmp_path / "plain", identities=4, images=4)
    for path in sorted(folder.iterdir()):
        path.rename(folder / f"{int(path.name[3:]):08d}")
    files = sorted(folder.rglob("*.png"))
    (tmp_path / "record").mkdir()
    write_records(
        tmp_path / "record/train.rec", insightface_records([(int(f.parent.name), f.read_bytes()) for f in files])
    )
    (tmp_path / "shards").mkdir()
    for shard, part in enumerate((files[:7], files[7:])):
        with tarfile.open(tmp_path / f"shards/{shard:03}.tar", "w") as tar:
            for number, file in enumerate(part):
                for suffix, data in ((".png", file.read_bytes()), (".cls", file.parent.name.encode())):
                    member = tarfile.TarInfo(f"{number:05}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    runs = {name: distill(tmp_path, tmp_path / name, f"out-{name}", capsys) for name in ("plain", "record", "shards")}
    assert len({run["data_digest"] for run in runs.values()}) == 1
    assert len({run["encoder"] for run in runs.values()}) == 1
    assert runs["record"]["identities"] == 4
