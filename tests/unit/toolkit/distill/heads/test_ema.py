"""EmaHead: AdaDistill's average, image by image, and the batches that make it hard."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from pkd.toolkit.distill.heads.ema import EmaHead


def make(count: int = 4, dim: int = 8) -> tuple[EmaHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = EmaHead(normalize(torch.randn(3, dim, dtype=torch.float64)))
    return head, *(normalize(torch.randn(count, dim, dtype=torch.float64)) for _ in range(2))  # type: ignore[return-value]


def test_one_image_moves_its_centre_by_the_published_formula() -> None:
    head, student, teacher = make(1)
    teacher = normalize(head.units[[1]] + 0.5 * teacher)
    student = normalize(teacher + 0.3 * student)
    alpha = (student * teacher).sum() * (head.units[1] * teacher).sum()
    expected = alpha * head.units[1] + (1 - alpha) * teacher[0]
    others = head.units[[0, 2]].clone()
    head.update(student, teacher, torch.tensor([1]))
    assert torch.allclose(head.units[1], normalize(expected, dim=0), atol=1e-12)
    assert torch.allclose(head.lengths[1], expected.norm(), atol=1e-12)
    assert torch.equal(head.units[[0, 2]], others)


def test_the_average_runs_over_vectors_that_are_not_normalised_again() -> None:
    head, student, teacher = make(1)
    plain = head.units[0].clone()
    for _ in range(3):
        alpha = ((student * teacher).sum().clamp(-1, 1) * (normalize(plain, dim=0) @ teacher[0]).clamp(1e-6, 1)).clamp(
            1e-6, 1
        )
        plain = alpha * plain + (1 - alpha) * teacher[0]
        head.update(student, teacher, torch.tensor([0]))
    assert torch.allclose(head.units[0] * head.lengths[0], plain, atol=1e-12)


def test_a_student_that_knows_nothing_is_taught_the_teachers_own_embedding() -> None:
    head, _, teacher = make(1)
    head.update(-teacher, teacher, torch.tensor([2]))
    assert torch.allclose(head.units[2], teacher[0], atol=1e-5)


def test_duplicate_labels_do_not_depend_on_their_order() -> None:
    labels = torch.tensor([1, 0, 1, 1])
    head, student, teacher = make()
    turned, _, _ = make()
    head.update(student, teacher, labels)
    order = torch.tensor([3, 2, 1, 0])
    turned.update(student[order], teacher[order], labels[order])
    assert torch.allclose(head.units, turned.units, atol=1e-12)
    alone, _, _ = make()
    alone.update(student[[1]], teacher[[1]], labels[[1]])
    assert torch.allclose(head.units[0], alone.units[0], atol=1e-12)


def test_it_leaves_the_centres_it_started_from_alone_and_comes_back_from_a_checkpoint() -> None:
    torch.manual_seed(0)
    centres = normalize(torch.randn(3, 8))
    kept = centres.clone()
    head, again = EmaHead(centres), EmaHead(centres)
    vectors = normalize(torch.randn(2, 8))
    head.update(vectors, vectors.flip(0), torch.tensor([0, 2]))
    assert torch.equal(centres, kept) and not torch.equal(head.units, kept)
    again.restore(head.state())
    assert torch.equal(again.head.centres, head.units) and torch.equal(again.lengths, head.lengths)
