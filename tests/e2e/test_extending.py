"""A newcomer extends pkd from outside, as CONTRIBUTING.md says: one file of theirs, named on a command line."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.evaluation.results.schema import Evaluation
from tests.support import training_data
from tests.support.evaluation_faces import PREPROCESS, teacher_info, write_people, write_student, write_teacher

PROTOCOL = '''
"""Measure how alike student and teacher see the same image."""

from pkd.toolkit.evaluation.protocols.common import ProtocolResult, measure_agreement, common, describe_data, embed
from pkd.toolkit.evaluation.metrics.resamples import ResampleValues, resampled_from
from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.evaluation.results.schema import Evaluation


def same_image(faces, name, encoder_set, options, progress):
    vectors = {letter: embed(encoder, faces, options, progress) for letter, encoder in encoder_set.encoders.items()}
    evaluation = Evaluation(
        **common(encoder_set, options),
        protocol="the same image twice",
        data=describe_data(name, "0" * 64, faces.labels),
        agreement=measure_agreement(vectors["T"], vectors["S"]),
    )
    return ProtocolResult(evaluation, ResampleValues(resampled_from(evaluation), {}))
'''


LOSS = '''
"""Pull the worse half of the batch towards the teacher."""

import torch


def worse_half(inputs):
    distances = 1 - (torch.nn.functional.normalize(inputs.embeddings) * inputs.teacher).sum(dim=1)
    return distances.topk(len(distances) // 2).values.mean()
'''


FORMAT = '''
"""Hand devices the graph gzipped."""

import gzip

from pkd.export.checks.parity import onnx_runner
from pkd.export.formats.base import Built, Format
from pkd.export.graph.precision_variants import GraphForm


def build(graph, precision, options, tell):
    packed = gzip.compress(graph.data, mtime=0)
    embed = onnx_runner(gzip.decompress(packed), lambda crops: crops, "the gzipped graph")
    return Built({"encoder.onnx.gz": packed}, "gzip 1", {}, "onnxruntime", embed)


FORMAT = Format("gzipped", ("fp32",), GraphForm(""), build)
'''


def run(program: str, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run an installed command in a folder that holds the newcomer's module."""
    command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_an_evaluation_protocol(tmp_path: Path) -> None:
    (tmp_path / "own_protocol.py").write_text(PROTOCOL)
    write_people(tmp_path / "faces", [2] * 6)
    write_teacher(tmp_path)
    write_student(tmp_path, teacher_info(tmp_path / "teacher.onnx").space)
    arguments = [
        "--teacher", "teacher.onnx", "--teacher-preprocess", PREPROCESS, "--student", "student", "--faces", "faces",
        "--cache", "cache", "--out", "out", "--bootstrap", "100",
    ]  # fmt: skip
    done = run("pkd-evaluate", tmp_path, *arguments, "--protocol", "own_protocol:same_image")
    assert done.returncode == 0, done.stderr
    evaluation = Evaluation.model_validate_json((tmp_path / "out/report.json").read_bytes())
    assert evaluation.protocol == "the same image twice"
    assert evaluation.agreement and 0 < evaluation.agreement.mean < 1
    assert "the same image twice" in (tmp_path / "out/report.html").read_text()

    done = run("pkd-evaluate", tmp_path, *arguments, "--protocol", "own_protocol:absent")
    assert done.returncode == 2 and "has no absent" in done.stderr


def test_a_distillation_loss(tmp_path: Path) -> None:
    (tmp_path / "own_loss.py").write_text(LOSS)
    training_data.write_patterns(tmp_path / "crops")
    training_data.write_teacher(tmp_path / "teacher.onnx")
    done = run(
        "pkd-distill", tmp_path, "--teacher", "teacher.onnx", "--teacher-preprocess",
        f"mean=127.5,std=127.5,size={training_data.SIZE},template=none", "--faces", "crops",
        "--student", "mobilefacenet-relu:0.125", "--steps", "3", "--batch", "8", "--precision", "fp32",
        "--threads", "1", "--cache", "cache", "--out", "run", "--method", "none+own_loss:worse_half:5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/student.pt").is_file()
    assert "own_loss:worse_half:5" in (tmp_path / "run/config.json").read_text()


def test_an_export_format(tmp_path: Path) -> None:
    (tmp_path / "own_format.py").write_text(FORMAT)
    write_teacher(tmp_path)
    done = run(
        "pkd-export", tmp_path, "--teacher", "teacher.onnx", "--teacher-preprocess", PREPROCESS, "-o", "bundle",
        "--format", "onnx", "own_format:FORMAT",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(tmp_path / "bundle")
    (target,) = (one for one in bundle.manifest.targets if one.runtime == "gzipped")
    assert target.name == "gzipped-fp32"
    packed = (tmp_path / "bundle/targets/gzipped-fp32/encoder.onnx.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "bundle" / target.graph).read_bytes()
