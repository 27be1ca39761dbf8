"""The audit: what it measures, and which heads it finds at fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pkd.toolkit.distill.heads import audit as module
from pkd.toolkit.distill.heads.audit import audit, nearest_other
from pkd.toolkit.distill.heads.head import Head, class_means, read_head
from tests.support.head_data import clusters, unit, write_shards

CLASSES, DIM, EACH = 40, 32, 5
NAMES = tuple(f"person-{i:02}" for i in range(CLASSES))
PLAIN, MIRRORED, LABELS = clusters(CLASSES, EACH, DIM)


def test_a_good_head_passes() -> None:
    found = audit(class_means(PLAIN, MIRRORED, LABELS, NAMES), PLAIN, MIRRORED, LABELS)
    assert found.fault is None
    assert found.top1 is not None and found.top1 > 0.95
    assert found.audited_images == found.top1_images == found.images == len(LABELS)
    assert found.empty_classes == found.unlabelled_images == 0


def test_leave_one_out_equals_a_plain_loop() -> None:
    labels = np.random.default_rng(5).permutation(LABELS)
    labels[3] = -1
    head = class_means(PLAIN, MIRRORED, labels, NAMES)
    found = audit(head, PLAIN, MIRRORED, labels)
    own, right = [], []
    for i, label in enumerate(labels):
        others = [j for j in np.flatnonzero(label == labels) if j != i]
        if label >= 0:
            mean = (PLAIN[others] + MIRRORED[others]).sum(axis=0)
            own.append(float(PLAIN[i] @ mean / np.linalg.norm(mean)))
            right.append(own[-1] > max(PLAIN[i] @ c for k, c in enumerate(head.centres.numpy()) if k != label))
    assert found.mean_cosine == pytest.approx(np.mean(own), abs=1e-5)
    assert found.top1 == pytest.approx(np.mean(right)) and found.unlabelled_images == 1


def test_an_inherited_head_is_judged_as_it_is() -> None:
    head = Head(class_means(PLAIN, MIRRORED, LABELS, NAMES).centres, NAMES, "file.npz")
    found = audit(head, PLAIN, MIRRORED, LABELS)
    own = np.sum(PLAIN * head.centres.numpy()[LABELS], axis=1)
    assert found.mean_cosine == pytest.approx(own.mean(), abs=1e-6)


def test_a_sample_is_looked_up_where_all_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, mirrored, labels = clusters(300, 5, 16, noise=0.4)
    head = class_means(plain, mirrored, labels, tuple(map(str, range(300))))
    whole = audit(head, plain, mirrored, labels)
    monkeypatch.setattr(module, "MAX_PRODUCTS", 1)
    sampled = audit(head, plain, mirrored, labels)
    assert (whole.top1_images, sampled.top1_images) == (1500, 1000)
    assert sampled.mean_cosine == whole.mean_cosine and whole.top1 is not None
    assert sampled.top1 == pytest.approx(whole.top1, abs=0.05) and sampled == audit(head, plain, mirrored, labels)


def test_nearest_centres_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    random = np.random.default_rng(0)
    head = Head(torch.from_numpy(unit(random.normal(size=(5000, 8)))), tuple(map(str, range(5000))), "h")
    rows, mine = unit(random.normal(size=(30, 8))), random.integers(0, 5000, 30)
    best, places = nearest_other(head, rows, np.arange(30), mine)
    cosines = rows @ head.centres.numpy().T
    cosines[np.arange(30), mine] = -2
    np.testing.assert_array_equal(places, cosines.argmax(axis=1))
    np.testing.assert_allclose(best, cosines.max(axis=1), atol=1e-6)


def test_worst_classes_come_first() -> None:
    labels = LABELS.copy()
    labels[:EACH] = [0, 1, 2, 3, 4]  # class 0 is scattered over others
    labels[EACH] = 0
    found = audit(class_means(PLAIN, MIRRORED, labels, NAMES), PLAIN, MIRRORED, labels)
    assert found.worst[0].identity == NAMES[0] and found.worst[0].images == 2


def test_permuted_labels_are_found_at_fault() -> None:
    head = class_means(PLAIN, MIRRORED, LABELS, NAMES)
    order = np.random.default_rng(1).permutation(CLASSES)
    found = audit(Head(head.centres[order], NAMES, "permuted.npz"), PLAIN, MIRRORED, LABELS)
    assert found.fault is not None and "permuted.npz" in found.fault and "labels are permuted" in found.fault


@pytest.mark.parametrize("shift", [1, -2])
def test_shifted_rows_are_told_apart_from_permuted_ones(shift: int) -> None:
    head = class_means(PLAIN, MIRRORED, LABELS, NAMES)
    found = audit(Head(torch.roll(head.centres, shift, 0), NAMES, "rolled.npz"), PLAIN, MIRRORED, LABELS)
    side = "after" if shift > 0 else "before"
    assert found.fault is not None and f"{abs(shift)} row" in found.fault and side in found.fault


def test_rows_that_are_partly_permuted_are_counted() -> None:
    centres = class_means(PLAIN, MIRRORED, LABELS, NAMES).centres.clone()
    assert audit(Head(centres, NAMES, "good.npz"), PLAIN, MIRRORED, LABELS).misplaced_classes == 0
    centres[[3, 8, 5, 30, 11]] = centres[[8, 3, 30, 11, 5]]
    found = audit(Head(centres, NAMES, "partly.npz"), PLAIN, MIRRORED, LABELS)
    assert found.misplaced_classes == 5 and found.fault is None
    assert {w.identity for w in found.worst[:5]} == {NAMES[i] for i in (3, 8, 5, 30, 11)}


def test_shards_in_the_wrong_order_are_named(tmp_path: Path) -> None:
    head = class_means(PLAIN, MIRRORED, LABELS, NAMES)
    paths = write_shards(tmp_path, head.centres.numpy(), 4)
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, (contents[i] for i in (0, 2, 1, 3)), strict=True):
        path.write_bytes(content)
    half = audit(read_head([str(tmp_path)], NAMES, DIM), PLAIN, MIRRORED, LABELS)
    assert half.top1 is not None and half.top1 < 0.6  # half of the head is right, so that it would not be refused
    assert half.fault is not None and "softmax_fc_gpu_1.pt are found in softmax_fc_gpu_2.pt" in half.fault


def test_means_of_shuffled_labels_are_at_fault_although_each_mean_contains_its_image() -> None:
    labels = np.random.default_rng(1).permutation(LABELS)
    assert audit(class_means(PLAIN, MIRRORED, labels, NAMES), PLAIN, MIRRORED, labels).fault is not None


def test_a_random_head_is_at_fault_as_random() -> None:
    random = np.random.default_rng(2)
    rows = unit(random.normal(size=(len(LABELS), 512)))
    head = Head(torch.from_numpy(unit(random.normal(size=(CLASSES, 512)))), NAMES, "random.npz")
    fault = audit(head, rows, rows, LABELS).fault
    assert fault is not None and "not this teacher's" in fault


def test_singletons_cannot_be_judged_and_are_not_refused() -> None:
    rows = unit(np.random.default_rng(0).normal(size=(CLASSES, DIM)))
    labels = np.arange(CLASSES)
    found = audit(class_means(rows, rows, labels, NAMES), rows, rows, labels)
    assert found.top1 is None and found.audited_images == 0 and found.fault is None


def test_classes_without_images_are_counted() -> None:
    head = Head(class_means(PLAIN, MIRRORED, LABELS, NAMES).centres, NAMES, "file")
    few = LABELS < 30
    found = audit(head, PLAIN[few], MIRRORED[few], LABELS[few])
    assert found.empty_classes == 10 and found.fault is None
