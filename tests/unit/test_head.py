"""Heads: means, files, and the audit that refuses what is not the teacher's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pkd.toolkit.distill.head import Head, audit, class_means, read_head, require_sound, save_head
from pkd.toolkit.errors import BadHead

CLASSES, DIM, EACH = 40, 32, 5
NAMES = tuple(f"person-{i:02}" for i in range(CLASSES))
LABELS = np.repeat(np.arange(CLASSES), EACH)


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def embeddings() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A plausible teacher: clusters around random directions."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(CLASSES, DIM)).astype(np.float32)
    return tuple(unit(centres[LABELS] + random.normal(size=(len(LABELS), DIM)) * 0.5) for _ in range(2))  # type: ignore[return-value]


def test_means_are_unit_and_ignore_unlabelled_images(embeddings) -> None:  # type: ignore[no-untyped-def]
    labels = LABELS.copy()
    labels[0] = -1
    head = class_means(*embeddings, labels, NAMES)
    expected = sum(e[1:EACH].sum(axis=0, dtype=np.float64) for e in embeddings)
    np.testing.assert_allclose(head.centres[0], expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(head.centres, axis=1), 1, atol=1e-6)


def test_a_good_head_passes(embeddings) -> None:  # type: ignore[no-untyped-def]
    found = audit(class_means(*embeddings, LABELS, NAMES), *embeddings, LABELS)
    require_sound(found, DIM)
    assert found.top1 is not None and found.top1 > 0.95
    assert found.audited_images == len(LABELS)


def test_leave_one_out_equals_a_plain_loop(embeddings) -> None:  # type: ignore[no-untyped-def]
    plain, mirrored = embeddings
    found = audit(class_means(plain, mirrored, LABELS, NAMES), plain, mirrored, LABELS)
    own = []
    for i, label in enumerate(LABELS):
        others = [j for j in np.flatnonzero(label == LABELS) if j != i]
        mean = (plain[others] + mirrored[others]).sum(axis=0)
        own.append(float(plain[i] @ mean / np.linalg.norm(mean)))
    assert found.mean_cosine == pytest.approx(np.mean(own), abs=1e-5)


def test_worst_classes_come_first(embeddings) -> None:  # type: ignore[no-untyped-def]
    labels = LABELS.copy()
    labels[:EACH] = [0, 1, 2, 3, 4]  # class 0 is scattered over others
    labels[EACH] = 0
    found = audit(class_means(*embeddings, labels, NAMES), *embeddings, labels)
    assert found.worst[0].identity == NAMES[0]


def test_permuted_labels_are_refused_as_permuted(embeddings) -> None:  # type: ignore[no-untyped-def]
    head = class_means(*embeddings, LABELS, NAMES)
    rolled = Head(np.roll(head.centres, 1, axis=0), NAMES, "rolled.npz")
    with pytest.raises(BadHead, match=r"rolled\.npz.*permuted"):
        require_sound(audit(rolled, *embeddings, LABELS), DIM)


def test_means_of_shuffled_labels_are_refused_although_each_mean_contains_its_image(embeddings) -> None:  # type: ignore[no-untyped-def]
    labels = np.random.default_rng(1).permutation(LABELS)
    with pytest.raises(BadHead):
        require_sound(audit(class_means(*embeddings, labels, NAMES), *embeddings, labels), DIM)


def test_a_random_head_is_refused_as_random() -> None:
    random = np.random.default_rng(2)
    dim = 512
    rows = unit(random.normal(size=(len(LABELS), dim)).astype(np.float32))
    head = Head(unit(random.normal(size=(CLASSES, dim)).astype(np.float32)), NAMES, "random.npz")
    with pytest.raises(BadHead, match="not this teacher's"):
        require_sound(audit(head, rows, rows, LABELS), dim)


def test_singletons_cannot_be_judged_and_are_not_refused() -> None:
    rows = unit(np.random.default_rng(0).normal(size=(CLASSES, DIM)).astype(np.float32))
    labels = np.arange(CLASSES)
    found = audit(class_means(rows, rows, labels, NAMES), rows, rows, labels)
    assert found.top1 is None and found.audited_images == 0
    require_sound(found, DIM)


def test_a_head_survives_the_disk_and_may_hold_more_classes(tmp_path: Path, embeddings) -> None:  # type: ignore[no-untyped-def]
    head = class_means(*embeddings, LABELS, NAMES)
    save_head(head, tmp_path / "head.npz")
    read = read_head(tmp_path / "head.npz", NAMES[3:7], DIM)
    assert read.identities == NAMES
    np.testing.assert_allclose(read.centres, head.centres, atol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"centres": np.ones((CLASSES, DIM + 1))}, f"has {DIM} dimensions"),
        ({"centres": np.ones((DIM, CLASSES))}, "transposed"),
        ({"centres": np.ones((CLASSES + 1, DIM))}, "41 centres, but the images show 40"),
        ({"centres": np.vstack([np.ones((CLASSES - 1, DIM)), np.zeros((1, DIM))])}, r"first: row 39, person-39"),
        ({"centres": np.full((CLASSES, DIM), np.nan)}, "not finite"),
        ({"weights": np.ones((CLASSES, DIM))}, "needs an array 'centres'"),
        ({"centres": np.ones((2, DIM)), "identities": np.array(["a", "b"])}, "no centre for 40 of 40"),
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
    for name in ("missing.npz", "noise.npz"):
        with pytest.raises(BadHead, match=name):
            read_head(tmp_path / name, NAMES, DIM)
