"""Heads: class means, a centre per image, files, merged classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pkd.toolkit.core.errors import BadHead
from pkd.toolkit.distill.heads import rows
from pkd.toolkit.distill.heads.head import Head, class_means, image_centres, merge_classes, read_head, save_head
from pkd.toolkit.distill.heads.rows import class_sums
from tests.support.head_data import clusters, unit

CLASSES, DIM, EACH = 40, 32, 5
NAMES = tuple(f"person-{i:02}" for i in range(CLASSES))
PLAIN, MIRRORED, LABELS = clusters(CLASSES, EACH, DIM)


def test_means_are_unit_and_ignore_unlabelled_images() -> None:
    labels = LABELS.copy()
    labels[0] = -1
    head = class_means(PLAIN, MIRRORED, labels, NAMES)
    expected = sum(e[1:EACH].sum(axis=0, dtype=np.float64) for e in (PLAIN, MIRRORED))
    np.testing.assert_allclose(head.centres[0], expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_allclose(head.centres.norm(dim=1), 1, atol=1e-6)


def test_walking_class_by_class_sees_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(-1, CLASSES, len(PLAIN))
    labels[labels == 7] = -1  # a class without images
    whole = np.zeros((CLASSES, DIM))
    for i, label in enumerate(labels):
        if label >= 0:
            whole[label] += PLAIN[i] + MIRRORED[i]
    for size in (1, 3, 50, 1000):
        monkeypatch.setattr(rows, "CHUNK", size)
        runs = list(class_sums(PLAIN, MIRRORED, labels, CLASSES))
        np.testing.assert_allclose(np.concatenate([r[3] for r in runs]), whole, atol=1e-5)
        seen = np.concatenate([r[0] for r in runs])
        assert sorted(seen) == np.flatnonzero(labels >= 0).tolist()
        assert max(len(r[0]) for r in runs) <= max(size, np.bincount(labels[labels >= 0]).max())


def test_a_large_head_goes_to_disk_as_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = class_means(PLAIN, MIRRORED, LABELS, NAMES, tmp_path)
    assert small.centres.dtype == torch.float32 and not list(tmp_path.iterdir())
    monkeypatch.setattr(rows, "MEMORY_BYTES", 100)
    large = class_means(PLAIN, MIRRORED, LABELS, NAMES, tmp_path)
    assert large.centres.dtype == torch.bfloat16
    assert not list(tmp_path.iterdir()), "the file has no name any more: nothing stays behind, even of a killed run"
    assert str(tmp_path / "head.") in Path("/proc/self/maps").read_text()
    np.testing.assert_allclose(large.centres.float(), small.centres, atol=2**-8)
    again = class_means(MIRRORED, PLAIN, LABELS[::-1].copy(), NAMES, tmp_path)  # a new file; the old mapping stays
    np.testing.assert_allclose(large.centres.float(), small.centres, atol=2**-8)
    assert not torch.equal(again.centres, large.centres)


def test_a_centre_per_image_against_a_plain_loop() -> None:
    labels = np.random.default_rng(3).permutation(LABELS)
    labels[[4, 90]] = -1
    means = class_means(PLAIN, MIRRORED, labels, NAMES).centres.numpy()
    for share in (1.0, 0.3):
        head, rows = image_centres(PLAIN, MIRRORED, labels, NAMES, share)
        assert head.owners is not None and np.all(np.diff(head.owners) >= 0)
        assert sorted(rows) == list(range(len(labels)))
        exclude = head.exclude
        assert exclude is not None
        for i, label in enumerate(labels):
            own = unit((PLAIN[i] + MIRRORED[i])[None])[0]
            expected = own if label < 0 else unit((share * own + (1 - share) * means[label])[None])[0]
            np.testing.assert_allclose(head.centres[rows[i]], expected, atol=1e-6)
            same = [i] if label < 0 else np.flatnonzero(labels == label)
            assert set(range(*exclude[rows[i]])) == set(rows[same])


def test_only_unlabelled_images_make_a_head_too() -> None:
    head, rows = image_centres(PLAIN, MIRRORED, np.full(len(PLAIN), -1), ())
    assert len(head.centres) == len(PLAIN) and rows.tolist() == list(range(len(PLAIN)))
    exclude = head.exclude
    assert exclude is not None and np.array_equal(exclude[:, 1] - exclude[:, 0], np.ones(len(PLAIN)))


def test_merged_classes_are_the_mean_direction() -> None:
    head = class_means(PLAIN, MIRRORED, LABELS, NAMES)
    classes = np.concatenate([[0, 1, 0], np.arange(2, CLASSES - 1)])
    merged = merge_classes(head, classes, (*NAMES[:2], *NAMES[3:]))
    np.testing.assert_allclose(merged.centres[0], unit((head.centres[0] + head.centres[2])[None].numpy())[0], atol=1e-6)
    np.testing.assert_allclose(merged.centres[2:], head.centres[3:], atol=1e-6)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_head_survives_the_disk_and_may_hold_more_classes(tmp_path: Path, compressed: bool) -> None:
    head = class_means(PLAIN, MIRRORED, LABELS, NAMES)
    path = tmp_path / "head.npz"
    save_head(head, path)
    if compressed:
        np.savez_compressed(path, centres=head.centres.numpy(), identities=np.array(NAMES))
    read = read_head(path, NAMES[3:7], DIM)
    assert read.identities == NAMES
    np.testing.assert_allclose(read.centres, head.centres, atol=1e-6)


def test_column_major_and_half_precision_files(tmp_path: Path) -> None:
    centres = class_means(PLAIN, MIRRORED, LABELS, NAMES).centres.numpy()
    for stored in (np.asfortranarray(centres), centres.astype(np.float16), centres.astype(np.float64) * 7):
        np.savez(tmp_path / "h.npz", centres=stored)
        np.testing.assert_allclose(read_head(tmp_path / "h.npz", NAMES, DIM).centres, centres, atol=1e-3)


def test_rows_without_a_name_and_shapes_are_refused() -> None:
    with pytest.raises(BadHead, match="3 centres for 2 identities"):
        Head(torch.eye(3), ("a", "b"), "x")
    with pytest.raises(BadHead, match="names two classes"):
        Head(torch.eye(2), ("a", "a"), "x")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"centres": np.ones((CLASSES, DIM + 1))}, f"has {DIM} dimensions"),
        ({"centres": np.ones((DIM, CLASSES))}, "transposed"),
        ({"centres": np.ones((CLASSES + 1, DIM))}, "41 centres, but the images show 40.*--head-labels"),
        ({"centres": np.ones((CLASSES - 1, DIM))}, "39 centres, but the images show 40.*all shards"),
        ({"centres": np.vstack([np.ones((CLASSES - 1, DIM)), np.zeros((1, DIM))])}, r"first: row 39, person-39"),
        ({"centres": np.full((CLASSES, DIM), np.nan)}, "40 of 40 centres are zero or not finite"),
        ({"weights": np.ones((CLASSES, DIM))}, "needs an array 'centres'"),
        ({"centres": np.ones((2, DIM)), "identities": np.array(["a", "b"])}, "no centre for 40 of 40"),
        ({"centres": np.ones((2, DIM)), "identities": np.array(["a"])}, "names 1 identities"),
        ({"centres": np.empty((0, DIM))}, "0 centres"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, arrays: dict[str, NDArray[np.float64]], message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(BadHead, match=message) as caught:
        read_head(path, NAMES, DIM)
    assert "bad.npz" in str(caught.value)


def test_files_that_are_no_head(tmp_path: Path) -> None:
    (tmp_path / "noise.npz").write_bytes(b"\x00" * 100)
    np.savez(tmp_path / "pickled.npz", centres=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "text.npz", centres=np.array([["a"] * DIM] * CLASSES))
    for name in ("missing.npz", "noise.npz", "pickled.npz", "text.npz"):
        with pytest.raises(BadHead, match=name):
            read_head(tmp_path / name, NAMES, DIM)
