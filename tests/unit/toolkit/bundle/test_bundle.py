"""Bundles are read as they were written, and refused where something was changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.bundle.bundle import (
    MAX_MANIFEST,
    Bundle,
    Golden,
    GraphSpec,
    Manifest,
    manifest_bytes,
    pack_golden,
    require_free,
    self_test,
    write_bundle,
)
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.encoder_info import EmbeddingSpace, EncoderInfo
from pkd.toolkit.core.errors import BundleError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import open_bundle
from tests.support.bundle_factory import DIM, bundle, content, replace_file, rewrite

GOLDEN_MANIFEST = """\
{
  "schema_version": 1,
  "encoder": {
    "id": "student@sha256:aa",
    "name": "student",
    "role": "student",
    "numeric_mode": "fp32",
    "space": {
      "id": "teacher@sha256:bb",
      "dim": 16,
      "metric": "cosine"
    },
    "preprocess": {
      "size": 112,
      "template": "arcface5pt",
      "channels": "rgb",
      "mean": 127.5,
      "std": 127.5
    }
  },
  "graph": {
    "input_name": "crops",
    "input": "uint8 N×H×W×3 RGB",
    "output_name": "embedding",
    "output": "float32 N×D, unit rows",
    "opset": 18
  },
  "golden_tolerance": 0.001,
  "gate": "not gated",
  "licence": "not stated",
  "training": {
    "method": "l2kd",
    "steps": 100
  },
  "tool": "pkd 0.1.0",
  "created": "2026-01-01T00:00:00+00:00",
  "files": {
    "certificates/a__b.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    "certificates/a__b.json.sig": "3f79bb7b435b05321651daefd374cdc681dc06faa65e374e38337b88ca046dea",
    "encoder.onnx": "7ac1c1fc09ff4df09d35d7b4f4a1a04e0b6d22dd56a1a91ed7df10e68d1d65fd"
  }
}
"""


GOLDEN_TARGET = """\
  "targets": [
    {
      "runtime": "openvino",
      "precision": "bf16",
      "encoder": {
        "id": "student@sha256:cc",
        "name": "student",
        "role": "student",
        "numeric_mode": "bf16",
        "space": {
          "id": "teacher@sha256:bb",
          "dim": 16,
          "metric": "cosine"
        },
        "preprocess": {
          "size": 112,
          "template": "arcface5pt",
          "channels": "rgb",
          "mean": 127.5,
          "std": 127.5
        }
      },
      "graph": "encoder.onnx",
      "file": null,
      "golden_tolerance": 0.01,
      "checked_with": "openvino 1",
      "made_with": "openvino 1",
      "settings": {
        "threads": 1
      }
    }
  ],
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return bundle(tmp_path).path


def test_the_layout_of_the_manifest_is_pinned_and_schema_1_still_read() -> None:
    info = EncoderInfo(
        id="student@sha256:aa",
        name="student",
        role="student",
        space=EmbeddingSpace(id="teacher@sha256:bb", dim=16),
        preprocess=Preprocess(),
    )
    manifest = Manifest(
        encoder=info,
        graph=GraphSpec(opset=18),
        golden_tolerance=0.001,
        training={"method": "l2kd", "steps": 100},
        tool="pkd 0.1.0",
        created="2026-01-01T00:00:00+00:00",
        files={
            "certificates/a__b.json": hashlib.sha256(b"{}").hexdigest(),
            "certificates/a__b.json.sig": hashlib.sha256(b"e").hexdigest(),
            "encoder.onnx": "7ac1c1fc09ff4df09d35d7b4f4a1a04e0b6d22dd56a1a91ed7df10e68d1d65fd",
        },
    )
    assert Manifest.model_validate_json(GOLDEN_MANIFEST) == manifest.model_copy(update={"schema_version": 1})
    target = Target(
        runtime="openvino",
        precision="bf16",
        encoder=info.model_copy(update={"id": "student@sha256:cc", "numeric_mode": "bf16"}),
        graph="encoder.onnx",
        file=None,
        golden_tolerance=0.01,
        checked_with="openvino 1",
        made_with="openvino 1",
        settings={"threads": 1},
    )
    current = GOLDEN_MANIFEST.replace('"schema_version": 1', '"schema_version": 3')
    current = current.replace('  "tool"', GOLDEN_TARGET + '  "tool"')
    assert manifest_bytes(manifest.model_copy(update={"targets": (target,)})) == current.encode()
    assert Manifest.model_validate_json(current).targets == (target,)


def with_target(good: Path, **changes: object) -> None:
    """Put a target into the manifest, as an attacker would."""
    manifest = json.loads((good / "manifest.json").read_text())
    target = {
        "runtime": "onnxruntime",
        "precision": "fp32",
        "encoder": manifest["encoder"],
        "graph": "encoder.onnx",
        "file": "encoder.onnx",
        "golden_tolerance": 1e-5,
        "checked_with": "x",
        "made_with": "x",
        "settings": {},
    }
    target["encoder"] = {**target["encoder"], **changes.pop("encoder", {})}  # type: ignore[dict-item]
    rewrite(good, targets=[{**target, **changes}])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"file": "../../passwd"}, "passwd, which is not listed"),
        ({"file": "targets/none"}, "targets/none, which is not listed"),
        ({"graph": "none.onnx"}, "none.onnx, which is not listed"),
        ({"runtime": "../x"}, "letters, digits"),
        ({"precision": ""}, "letters, digits"),
        ({"golden_tolerance": 0}, "golden_tolerance"),
        ({"encoder": {"numeric_mode": "int8"}}, "another encoder exactly if"),
        ({"encoder": {"id": "other@sha256:aa"}}, "another encoder exactly if"),
        ({"encoder": {"space": {"id": "x", "dim": 16, "metric": "cosine"}}}, "another space"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_target_that_contradicts_the_bundle_is_refused(good: Path, changes: dict[str, object], said: str) -> None:
    with_target(good)
    assert [target.name for target in Bundle.open(good).manifest.targets] == ["onnxruntime-fp32"]
    with_target(good, **changes)
    with pytest.raises(BundleError, match=said):
        Bundle.open(good)


def test_two_targets_of_one_name_and_targets_in_schema_1_are_refused(good: Path) -> None:
    with_target(good)
    targets = json.loads((good / "manifest.json").read_text())["targets"]
    rewrite(good, targets=targets * 2)
    with pytest.raises(BundleError, match="two targets are called onnxruntime-fp32"):
        Bundle.open(good)
    rewrite(good, targets=targets, schema_version=1)
    with pytest.raises(BundleError, match="schema 1 has no targets"):
        Bundle.open(good)


def test_a_bundle_of_schema_1_opens(good: Path) -> None:
    manifest = json.loads((good / "manifest.json").read_text())
    del manifest["targets"]
    (good / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 1}))
    opened = Bundle.open(good)
    assert opened.manifest.targets == ()
    assert self_test(opened, open_bundle(opened).embed) < 1e-6


def test_the_pinned_bytes_are_what_is_written(good: Path) -> None:
    assert (good / "manifest.json").read_bytes() == manifest_bytes(Bundle.open(good).manifest)


def test_a_bundle_opens_and_reproduces_its_golden_embeddings(good: Path) -> None:
    opened = Bundle.open(good)
    assert self_test(opened, open_bundle(opened).embed) < 1e-6
    assert opened.golden().crops.shape == (4, 112, 112, 3)
    assert opened.certificates() == []


def test_a_bundle_opens_through_a_link_to_it(good: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(good, target_is_directory=True)
    assert Bundle.open(link).manifest == Bundle.open(good).manifest


@pytest.mark.parametrize("name", ["encoder.onnx", "golden.npz"])
def test_a_changed_file_is_named(good: Path, name: str) -> None:
    data = bytearray((good / name).read_bytes())
    data[len(data) // 2] ^= 1
    (good / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name}: its SHA-256"):
        Bundle.open(good)


@pytest.mark.parametrize("name", ["encoder.onnx", "golden.npz", "manifest.json"])
def test_a_missing_file_is_named(good: Path, name: str) -> None:
    (good / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.open(good)


def test_a_change_after_opening_is_noticed_on_reading(good: Path) -> None:
    opened = Bundle.open(good)
    (good / "encoder.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="SHA-256"):
        opened.read("encoder.onnx")


def test_only_listed_files_can_be_read(good: Path) -> None:
    with pytest.raises(BundleError, match="lists no"):
        Bundle.open(good).read("../secret")


@pytest.mark.parametrize("name", ["notes.txt", "certificates/a.json", "targets/x/engine.plan"])
def test_a_file_that_the_manifest_does_not_list_is_refused(good: Path, name: str) -> None:
    (good / name).parent.mkdir(parents=True, exist_ok=True)
    (good / name).write_text("x")
    with pytest.raises(BundleError, match=r"not listed in the manifest"):
        Bundle.open(good)


def test_what_desktops_leave_behind_is_ignored(good: Path) -> None:
    (good / ".DS_Store").write_bytes(b"x")
    Bundle.open(good)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "a\\b", "C:x", "a//b", "./a", ""])
def test_a_listed_name_that_leads_out_is_refused_by_name(good: Path, name: str) -> None:
    (good.parent / "outside").write_text("secret")
    files = json.loads((good / "manifest.json").read_text())["files"]
    rewrite(good, files={**files, name: hashlib.sha256(b"secret").hexdigest()})
    with pytest.raises(BundleError, match="no plain file inside it"):
        Bundle.open(good)


def test_links_are_refused_even_to_the_right_bytes(good: Path) -> None:
    outside = good.parent / "encoder.onnx"
    (good / "encoder.onnx").rename(outside)
    (good / "encoder.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match=r"encoder\.onnx: is a link"):
        Bundle.open(good)


def test_a_linked_folder_is_refused(good: Path) -> None:
    elsewhere = good.parent / "elsewhere"
    elsewhere.mkdir()
    (good / "certificates").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(BundleError, match="is a link"):
        Bundle.open(good)


def test_a_pipe_is_refused_instead_of_waited_for(good: Path) -> None:
    (good / "golden.npz").unlink()
    os.mkfifo(good / "golden.npz")
    with pytest.raises(BundleError, match="special file"):
        Bundle.open(good)


@pytest.mark.parametrize("version", [0, 4, "1", None, True, [1]])
def test_another_schema_is_refused_before_anything_else(good: Path, version: object) -> None:
    (good / "manifest.json").write_text(json.dumps({"schema_version": version, "new_field": 1}))
    with pytest.raises(BundleError, match="schema"):
        Bundle.open(good)


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", "null", "\xff", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(good: Path, text: str) -> None:
    (good / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match="not the manifest of a bundle"):
        Bundle.open(good)


def test_an_oversized_manifest_is_refused(good: Path) -> None:
    rewrite(good, licence="x" * MAX_MANIFEST)
    with pytest.raises(BundleError, match=r"larger than 1,048,576 bytes"):
        Bundle.open(good)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"surprise": 1}, "surprise"),
        ({"golden_tolerance": 2.0}, "golden_tolerance"),
        ({"golden_tolerance": float("nan")}, "golden_tolerance"),
        ({"encoder": {}}, "encoder"),
        ({"files": {"encoder.onnx": "aa"}}, "golden.npz"),
    ],
)
def test_a_wrong_field_is_named(good: Path, change: dict[str, object], said: str) -> None:
    rewrite(good, **change)
    with pytest.raises(BundleError, match=said):
        Bundle.open(good)


def unit(rows: int, dim: int = DIM) -> np.ndarray:
    made = np.zeros((rows, dim), np.float32)
    made[:, 0] = 1
    return made


CROPS = np.zeros((2, 112, 112, 3), np.uint8)


@pytest.mark.parametrize(
    ("crops", "rows", "said"),
    [
        (CROPS, unit(2) * np.nan, "finite unit"),
        (CROPS, unit(2) * 2, "finite unit"),
        (CROPS, unit(3), "embeddings are float32"),
        (CROPS, unit(2, 5), "embeddings are float32"),
        (CROPS, unit(2).astype(np.float64), "embeddings are float64"),
        (CROPS[:0], unit(0), "crops are"),
        (CROPS[:, :50], unit(2), "crops are"),
        (CROPS.astype(np.float32), unit(2), "crops are float32"),
    ],
)
def test_golden_arrays_that_do_not_fit_the_encoder_are_refused(
    good: Path, crops: np.ndarray, rows: np.ndarray, said: str
) -> None:
    replace_file(good, "golden.npz", pack_golden(Golden(crops, rows)))
    with pytest.raises(BundleError, match=rf"golden\.npz: .*{said}"):
        Bundle.open(good)


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x03\x04 broken"])
def test_a_golden_file_that_is_no_archive_is_refused(good: Path, data: bytes) -> None:
    replace_file(good, "golden.npz", data)
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(good)


def test_pickles_in_golden_are_never_loaded(good: Path) -> None:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, crops=np.array([print], object), embeddings=unit(1))
    replace_file(good, "golden.npz", buffer.getvalue())
    with pytest.raises(BundleError, match="allow_pickle"):
        Bundle.open(good)


def test_a_golden_archive_that_swells_is_refused(good: Path) -> None:
    data = pack_golden(Golden(np.zeros((2000, 112, 112, 3), np.uint8), unit(2000)))
    assert len(data) < 1_000_000
    replace_file(good, "golden.npz", data)
    with pytest.raises(BundleError, match="over the limit"):
        Bundle.open(good)


def test_the_self_test_notices_another_scale_channel_order_or_network(tmp_path: Path) -> None:
    opened = bundle(tmp_path)
    embed = open_bundle(opened).embed
    assert self_test(opened, embed) < 1e-6
    wrong = [
        lambda crops: embed(np.ascontiguousarray(crops[..., ::-1])),
        lambda crops: embed((crops * (127.5 / 128)).astype(np.uint8)),
        lambda crops: embed(crops[::-1])[:],
        lambda crops: embed(crops) * np.nan,
        lambda crops: embed(crops)[:2],
        lambda crops: embed(crops)[:, :4],
    ]
    for other in wrong:
        with pytest.raises(BundleError):
            self_test(opened, other)


def test_writing_refuses_what_is_in_the_way(tmp_path: Path) -> None:
    files, manifest = content()
    project = tmp_path / "project"
    project.mkdir()
    (project / "manifest.json").write_text('{"manifest_version": 3, "name": "a browser extension"}')
    plain = tmp_path / "plain"
    plain.write_text("x")
    for path in (project, plain):
        for replace in (False, True):
            with pytest.raises(BundleError, match="not a bundle"):
                write_bundle(path, files, manifest, replace=replace)
    assert (project / "manifest.json").exists()
    assert plain.read_text() == "x"
    good = write_bundle(tmp_path / "good", files, manifest).path
    with pytest.raises(BundleError, match="--force"):
        write_bundle(good, files, manifest)
    (good / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"thesis\.txt"):
        write_bundle(good, files, manifest, replace=True)
    assert (good / "thesis.txt").read_text() == "mine"


def test_replace_accepts_damaged_bundles_and_other_schemas(good: Path, tmp_path: Path) -> None:
    files, manifest = content()
    (good / "encoder.onnx").write_bytes(b"damaged")
    rewrite(good, schema_version=99)
    write_bundle(good, files, manifest.model_copy(update={"licence": "new"}), replace=True)
    assert Bundle.open(good).manifest.licence == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    files, manifest = content()
    (tmp_path / "made").mkdir()
    require_free(tmp_path / "made")
    write_bundle(tmp_path / "made", files, manifest)
    Bundle.open(tmp_path / "made")


def test_nothing_remains_of_a_bundle_that_would_not_open(tmp_path: Path) -> None:
    files, manifest = content()
    before = sorted(tmp_path.iterdir())
    for wrong in ({"encoder.onnx": b""}, {**files, "../x": b""}, {**files, "a:b": b""}, {**files, "golden.npz": b""}):
        with pytest.raises(BundleError):
            write_bundle(tmp_path / "made", wrong, manifest)
        assert sorted(tmp_path.iterdir()) == before
