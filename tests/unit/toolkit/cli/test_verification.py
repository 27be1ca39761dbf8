"""pkd-verify tells each check of an evaluation or a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkd.toolkit.bundle.bundle import Bundle, Golden, pack_golden, write_bundle
from pkd.toolkit.cli.verification import verify
from pkd.toolkit.core.errors import InputError
from tests.support.bundle_factory import bundle, certificate, content

MADE = certificate("s@sha256:" + "1" * 64, "t@sha256:" + "2" * 64, "t@sha256:" + "3" * 64)


def written(folder: Path, change: Callable[[dict[str, Any]], object] = lambda fields: None) -> Path:
    fields = json.loads(MADE.model_dump_json())
    change(fields)
    path = folder / MADE.file_name
    path.write_text(json.dumps(fields))
    return path


def test_a_certificate_without_contradictions_is_fine(tmp_path: Path) -> None:
    verdict = verify(written(tmp_path), None)
    assert verdict.kind == "certificate" and not verdict.failures
    assert [check.result for check in verdict.checks] == ["ok", "not checked"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(min_fmr=0.001), "min_fmr is 0.001, but its pairs of different identities resolve 0.01"),
        (lambda c: c.update(identities=40), "40 identities cannot have 1,000 pairs"),
        (lambda c: c.update(genuine_identities=51), "51 identities with genuine"),
        (lambda c: c.update(images=49), "and 49 images"),
        (lambda c: c["points"][0].update(tar=1.5), "points.0.tar: must be"),
        (lambda c: c["points"][0].update(tar_balanced=-0.1), "points.0.tar_balanced: must be"),
        (
            lambda c: c["points"][0].update(fmr_ci95=[0.02, 0.01]),
            "fmr_ci95: an interval runs from 0.02 to 0.01",
        ),
        (lambda c: c["points"][0].update(prediction95=[0.0, 1.5]), "points.0.prediction95.1: must be"),
        (lambda c: c["points"][0].update(threshold=0.1), "not on the calibration"),
        (lambda c: c["calibration"].update(fmr=[0.5, 0.02]), "the calibration says 0.02"),
    ],
)
def test_a_contradiction_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    (failure,) = verify(written(tmp_path, change), None).failures
    assert failure.question == "schema and consistency" and said in failure.detail


def test_a_certificate_under_another_name_in_a_bundle_is_found(tmp_path: Path) -> None:
    files, manifest = content()
    own = certificate(manifest.encoder.id, manifest.encoder.id, manifest.encoder.space.id)
    added = {"certificates/a.json": own.model_dump_json().encode()}
    path = write_bundle(tmp_path / "made", {**files, **added}, manifest).path
    (failure,) = verify(path, None).failures
    assert (failure.file, failure.question) == ("certificates/a.json", "file name") and own.file_name in failure.detail


def test_a_bundle_that_does_not_reproduce_its_golden_crops_is_found(tmp_path: Path) -> None:
    files, manifest = content()
    golden = Bundle.open(bundle(tmp_path).path).golden()
    turned = pack_golden(Golden(golden.crops, golden.embeddings[:, ::-1].copy()))
    path = write_bundle(tmp_path / "turned", {**files, "golden.npz": turned}, manifest).path
    (failure,) = verify(path, None).failures
    assert (failure.file, failure.question) == ("encoder.onnx", "reproduces its golden embeddings")
    assert "golden crops come out" in failure.detail


def test_a_changed_file_of_a_bundle_is_named(tmp_path: Path) -> None:
    path = bundle(tmp_path).path
    (path / "encoder.onnx").write_bytes(b"x")
    (failure,) = verify(path, None).failures
    assert (failure.file, failure.question) == ("manifest.json", "every file's SHA-256")
    assert "encoder.onnx: its SHA-256 is not the manifest's" in failure.detail


@pytest.mark.parametrize("name", ["report.json", "c.json.sig"])
def test_a_part_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="is a part of something"):
        verify(tmp_path / name, None)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"schema_version": 9}'])
def test_a_report_that_is_none_is_not_trusted(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "report.json").write_bytes(data)
    (failure,) = verify(tmp_path, None).failures
    assert (failure.file, failure.question) == ("report.json", "schema and consistency")
