"""The streaming head: gradients in float64, extremes, what is left out, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pkd.toolkit.core.errors import BadHead, InputError
from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead, chunk_rows, frozen_cross_entropy, streaming_logsumexp
from pkd.toolkit.distill.heads.margin import Margin

ARCFACE = Margin.parse("arcface:0.5")


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("chunk", [1, 7, 50, None])
@pytest.mark.parametrize("spec", ["softmax", "cosface:0.35", "arcface:0.5"])
def test_gradient_is_exact(spec: str, chunk: int | None) -> None:
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([0, 49, 3, 3, 7])
    assert torch.autograd.gradcheck(
        lambda e: frozen_cross_entropy(e, unit(50, 6), labels, Margin.parse(spec), 8, reduction="none", chunk=chunk),
        x,
    )


def test_gradient_of_the_plain_sum_over_all_classes() -> None:
    x = unit(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: streaming_logsumexp(u, unit(20, 6, seed=1), 8, chunk=3)[0], x)


def test_straight_through_takes_the_slope_of_the_margin_as_one() -> None:
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    head, labels = unit(9, 8), torch.arange(6)
    through = frozen_cross_entropy(x, head, labels, Margin.parse("arcface:0.5", "straight-through"), 16)
    exact = frozen_cross_entropy(x, head, labels, ARCFACE, 16)
    assert float(through.detach()) == pytest.approx(float(exact.detach()), abs=1e-12)
    (found,) = torch.autograd.grad(through, x)
    length = x.detach().norm(dim=1, keepdim=True)
    cosines = (x.detach() / length) @ head.T
    logits = 16 * cosines
    logits[torch.arange(6), labels] = 16 * ARCFACE(cosines[torch.arange(6), labels])
    slope = logits.softmax(dim=1) - torch.nn.functional.one_hot(labels, 9)  # dψ/dc = 1
    toward = 16 / 6 * slope @ head
    expected = (toward - (toward * x.detach() / length).sum(1, keepdim=True) * x.detach() / length) / length
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_weighted_centre_is_the_softmax_average() -> None:
    x, head = unit(3, 5), unit(40, 5, seed=1)
    total, centre = streaming_logsumexp(x, head, 20, chunk=9)
    logits = 20 * x @ head.T
    torch.testing.assert_close(total, logits.logsumexp(dim=1))
    torch.testing.assert_close(centre, logits.softmax(dim=1) @ head)


@pytest.mark.parametrize("chunk", [4, 11, None])
def test_ranges_leave_out_other_rows_of_the_same_person(chunk: int | None) -> None:
    x, head = unit(5, 6), unit(30, 6, seed=1)
    exclude = torch.tensor([[0, 1], [3, 17], [29, 30], [10, 10], [0, 30]])
    total, centre = streaming_logsumexp(x, head, 10, exclude=exclude, chunk=chunk)
    logits = 10 * x @ head.T
    for row, (start, stop) in enumerate(exclude.tolist()):
        logits[row, start:stop] = -math.inf
    torch.testing.assert_close(total, logits.logsumexp(dim=1))
    expected = torch.cat([logits[:4].softmax(dim=1) @ head, torch.zeros(1, 6, dtype=torch.float64)])
    torch.testing.assert_close(centre, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["softmax", "cosface:0.35", "arcface:0.5"])
def test_poles_at_full_scale_stay_finite(spec: str, dtype: torch.dtype) -> None:
    head = torch.eye(8, dtype=dtype)
    x = torch.cat([torch.eye(8)[:2], -torch.eye(8)[:2], 1e-20 * torch.eye(8)[:1], 1e20 * torch.eye(8)[:1]])
    x.requires_grad_()
    losses = frozen_cross_entropy(x, head, torch.tensor([0, 5, 2, 0, 0, 0]), Margin.parse(spec), 64, reduction="none")
    losses.sum().backward()
    assert bool(torch.isfinite(losses).all()) and bool((losses >= 0).all())
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_a_tiny_loss_is_not_rounded_away() -> None:
    """At cosine 1 and s = 64 the loss is (C − 1)·e^−64: log(sum) − logit would give 0 or an ulp of 64."""
    loss = frozen_cross_entropy(torch.eye(8)[:1], torch.eye(8), torch.tensor([0]), Margin("softmax"), 64)
    assert float(loss) == pytest.approx(7 * math.exp(-64), rel=1e-4)


def test_one_class_has_nothing_to_tell_apart() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    loss = frozen_cross_entropy(x, unit(1, 4, dtype=torch.float32), torch.zeros(3, dtype=torch.int64), ARCFACE, 64)
    loss.backward()
    assert float(loss.detach()) == 0 and x.grad is not None and not bool(x.grad.any())


@pytest.mark.parametrize("late", [False, True])
def test_chunks_without_weight_are_left_out_exactly(late: bool) -> None:
    """One class outweighs all others, before or after them; samples of both kinds share the batch."""
    x = unit(6, 32, dtype=torch.float32)
    head = unit(400, 32, seed=1, dtype=torch.float32)
    head[399 if late else 0] = x[0]
    head[200] = x[1]
    total, centre = streaming_logsumexp(x, head, 64, chunk=25)
    logits = 64 * x.double() @ head.double().T
    torch.testing.assert_close(total.double(), logits.logsumexp(dim=1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(centre.double(), logits.softmax(dim=1) @ head.double(), rtol=0, atol=3e-6)


def test_nan_is_not_hidden() -> None:
    x = torch.randn(4, 8)
    x[1, 3] = math.nan
    losses = frozen_cross_entropy(
        x, unit(30, 8, dtype=torch.float32), torch.arange(4), ARCFACE, 64, reduction="none", chunk=10
    )
    assert torch.isnan(losses).tolist() == [False, True, False, False]


def test_reduction_mean_is_the_mean_of_none() -> None:
    x, head, labels = torch.randn(7, 8), unit(30, 8, dtype=torch.float32), torch.arange(7)
    each = frozen_cross_entropy(x, head, labels, ARCFACE, 64, reduction="none")
    assert each.shape == (7,)
    assert float(frozen_cross_entropy(x, head, labels, ARCFACE, 64)) == pytest.approx(float(each.mean()), rel=1e-6)


def test_automatic_chunks_are_small() -> None:
    assert 128 * chunk_rows(128, torch.device("cpu")) * 4 <= 2**24
    assert chunk_rows(10**9, torch.device("cpu")) == 256


@pytest.mark.parametrize("label", [-1, 30])
def test_labels_outside_the_head_are_refused(label: int) -> None:
    with pytest.raises(InputError, match=f"label {label}"):
        frozen_cross_entropy(torch.randn(1, 8), unit(30, 8), torch.tensor([label]), ARCFACE, 64)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="without labels"):
        frozen_cross_entropy(torch.randn(0, 8), unit(30, 8), torch.empty(0, dtype=torch.int64), ARCFACE, 64)


@pytest.mark.parametrize("centres", [torch.zeros(0, 4), torch.zeros(4), torch.zeros(3, 4, dtype=torch.int64)])
def test_heads_of_another_shape_are_refused(centres: Tensor) -> None:
    with pytest.raises(BadHead, match="C×D"):
        FrozenHead(centres)


def test_second_derivatives_are_refused_in_words_and_first_ones_are_not() -> None:
    head = FrozenHead(normalize(torch.randn(7, 5, dtype=torch.float64)))
    x = normalize(torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    loss = head.logsumexp(x, 8.0)[0].sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (kept,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(plain, kept)
    with pytest.raises(NotImplementedError, match=r"frozen head.*second derivative.*margin_cross_entropy"):
        kept.square().sum().backward()
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (weighted,) = torch.autograd.grad((head.logsumexp(x, 8.0)[0] * weight).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(weighted.sum(), weight)
