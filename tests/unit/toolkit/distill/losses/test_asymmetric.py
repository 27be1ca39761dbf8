"""csd, infonce, raml and d3still against plain float64 derivations, their gradients, and where they take a student."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from pkd.toolkit.distill.losses.asymmetric import csd, d3still, infonce, raml
from pkd.toolkit.distill.losses.inputs import Bank, LossInputs
from tests.support.loss_inputs import DIM, make_inputs

LABELS = [0, 1, 2, 0, -1, 3, 1, 4, 2, -1, 3, 0, 4]
LOSSES = [csd, infonce, raml, d3still]
Loss = Callable[[LossInputs], Tensor]
Double = NDArray[np.float64]


def batch(*, bank: int = 0, dtype: torch.dtype = torch.float64) -> LossInputs:
    """Draw 13 images of 5 people; every third row of the bank is an image of the batch, and its teacher's."""
    inputs = make_inputs(LABELS, dtype=dtype)
    assert inputs.teacher is not None
    images, people = torch.arange(len(LABELS)) + 100, torch.tensor(LABELS)
    random = torch.Generator().manual_seed(9)
    rows = normalize(torch.randn(bank, DIM, generator=random, dtype=torch.float64)).to(dtype)
    bank_images = torch.arange(bank)
    bank_people = torch.randint(-1, 5, (bank,), generator=random)
    for row in range(0, bank, 3):
        of = row // 3 % len(LABELS)
        rows[row], bank_images[row], bank_people[row] = inputs.teacher[of], images[of], people[of]
    kept = Bank(rows, bank_images, bank_people) if bank else None
    return replace(inputs, images=images, people=people, bank=kept)


def arrays(inputs: LossInputs) -> tuple[Double, Double]:
    assert inputs.teacher is not None
    return normalize(inputs.embeddings).numpy().astype(float), inputs.teacher.numpy().astype(float)


@pytest.mark.parametrize("bank", [0, 40, 500])
def test_csd_against_numpy(bank: int) -> None:
    inputs = batch(bank=bank)
    student, teacher = arrays(inputs)
    total = 0.0
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        candidates = list(teacher)
        if inputs.bank is not None and inputs.images is not None:
            candidates += [row for row, image in zip(inputs.bank.rows.numpy(), inputs.bank.images, strict=True)
                           if image != inputs.images[i]]  # fmt: skip
        near = sorted(candidates, key=lambda row: -float(t @ row))[:256]
        p = np.exp([(t @ row - 1) / 0.01 for row in near])
        q = np.exp([s @ row for row in near])
        p, q = p / p.sum(), q / q.sum()
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    assert float(csd(inputs)) == pytest.approx(total / len(student), rel=1e-9)


@pytest.mark.parametrize("bank", [0, 40])
def test_infonce_against_numpy(bank: int) -> None:
    inputs = batch(bank=bank)
    student, teacher = arrays(inputs)
    total = 0.0
    for i, s in enumerate(student):
        negatives = [t for j, t in enumerate(teacher) if j != i and (LABELS[j] != LABELS[i] or LABELS[i] < 0)]
        if inputs.bank is not None:
            for row, image, person in zip(*(x.tolist() for x in (
                inputs.bank.rows, inputs.bank.images, inputs.bank.people)), strict=True):  # fmt: skip
                if image != 100 + i and (person != LABELS[i] or person < 0):
                    negatives.append(np.array(row))
        logits = [s @ teacher[i] / 0.07, *(s @ row / 0.07 for row in negatives)]
        total -= logits[0] - math.log(sum(map(math.exp, logits)))
    assert float(infonce(inputs)) == pytest.approx(total / len(student), rel=1e-9)


def test_raml_against_numpy() -> None:
    inputs = batch()
    student, teacher = arrays(inputs)
    count = len(student)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    expected = np.mean([(1 - s @ t) ** 2 for s, t in zip(student, teacher, strict=True)])
    expected += 0.7482 * np.mean([(student[i] @ teacher[j] - teacher[i] @ teacher[j]) ** 2 for i, j in pairs])
    expected += 0.6778 * np.mean([(student[i] @ student[j] - teacher[i] @ teacher[j]) ** 2 for i, j in pairs])
    assert float(raml(inputs)) == pytest.approx(float(expected), rel=1e-9)


def test_d3still_against_numpy() -> None:
    inputs = batch()
    student, teacher = arrays(inputs)
    count = len(student)
    relations = 0.0
    for i in range(count):
        near = sorted((j for j in range(count) if j != i), key=lambda j: -float(teacher[i] @ teacher[j]))[:9]
        squares = {True: 0.0, False: 0.0}
        for a in near:
            for b in near:
                found = student[i] @ teacher[a] - student[i] @ teacher[b]
                wanted = teacher[i] @ teacher[a] - teacher[i] @ teacher[b]
                if a != b:
                    squares[bool(found * wanted > 0)] += ((found - wanted) / (0.1 + abs(wanted))) ** 2
        relations += (5 * math.sqrt(squares[False]) + math.sqrt(squares[True])) / 9
    own = 100 * math.sqrt(sum((1 - s @ t) ** 2 for s, t in zip(student, teacher, strict=True))) / count
    assert float(d3still(inputs)) == pytest.approx(own + relations / count, rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bank", [0, 40])
def test_gradients(loss: Loss, bank: int) -> None:
    inputs = batch(bank=bank)
    start = inputs.embeddings.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(replace(inputs, embeddings=x)), (start,))


@pytest.mark.parametrize("loss", [raml, d3still])
def test_the_teacher_itself_costs_nothing_and_has_a_finite_gradient(loss: Loss) -> None:
    inputs = batch()
    assert inputs.teacher is not None
    start = (7 * inputs.teacher).requires_grad_()
    value = loss(replace(inputs, embeddings=start))
    value.backward()  # type: ignore[no-untyped-call]
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    assert start.grad is not None and bool(torch.isfinite(start.grad).all())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bank", [0, 200])
def test_descent_takes_the_student_to_the_teacher(loss: Loss, bank: int) -> None:
    """Free embeddings, not the loss alone, must end at their own teacher embeddings: the space is the teacher's."""
    inputs = batch(bank=bank)
    assert inputs.teacher is not None
    free = inputs.embeddings.clone().requires_grad_()
    before = float((normalize(free.detach()) * inputs.teacher).sum(dim=1).mean())
    optimiser = torch.optim.Adam([free], lr=0.05)
    for _ in range(300):
        optimiser.zero_grad()
        loss(replace(inputs, embeddings=free)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    cosines = normalize(free.detach()) @ inputs.teacher.T
    assert before < 0.2
    assert float(cosines.diagonal().mean()) > (0.99 if loss in (raml, d3still) else 0.6)
    assert cosines.argmax(dim=1).tolist() == list(range(len(LABELS)))


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_agrees_with_float64_and_small_batches_are_finite(loss: Loss) -> None:
    assert float(loss(batch(bank=30, dtype=torch.float32))) == pytest.approx(float(loss(batch(bank=30))), rel=1e-4)
    for count in (1, 2, 3):
        small = replace(make_inputs(LABELS[:count]), images=torch.arange(count), people=torch.tensor(LABELS[:count]))
        assert bool(torch.isfinite(loss(small)))
