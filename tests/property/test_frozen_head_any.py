"""For any batch, head, chunk and excluded ranges: the streaming sum is the plain one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from pkd.toolkit.distill.heads.frozen_softmax import frozen_cross_entropy, streaming_logsumexp
from pkd.toolkit.distill.heads.margin import Margin, margin_cross_entropy


@settings(max_examples=60)
@given(data=st.data())
def test_sum_and_centre_of_any_problem(data: st.DataObject) -> None:
    batch, dim = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12))
    classes, chunk = data.draw(st.integers(1, 40)), data.draw(st.none() | st.integers(1, 50))
    scale = data.draw(st.sampled_from([0.5, 16.0, 64.0, 500.0]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x, head = normalize(torch.randn(batch, dim)), normalize(torch.randn(classes, dim))
    bounds = st.lists(st.integers(0, classes), min_size=2, max_size=2).map(sorted)
    ranges = torch.tensor(data.draw(st.lists(bounds, min_size=batch, max_size=batch)))
    total, centre = streaming_logsumexp(x, head, scale, exclude=ranges, chunk=chunk)
    logits = scale * x.double() @ head.double().T
    for row, (start, stop) in enumerate(ranges.tolist()):
        logits[row, start:stop] = -torch.inf
    some = ~torch.isinf(logits).all(dim=1)
    torch.testing.assert_close(total.double(), logits.logsumexp(dim=1), rtol=2e-6, atol=2e-6 * scale)
    expected = logits[some].softmax(dim=1) @ head.double()
    torch.testing.assert_close(centre[some].double(), expected, rtol=0, atol=2e-6 * max(scale, 1))
    assert not bool(centre[~some].any())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 12),
    classes=st.integers(1, 60),
    chunk=st.none() | st.integers(1, 70),
    spec=st.sampled_from(["softmax", "cosface:0.4", "arcface:0.3"]),
    length=st.floats(1e-3, 1e3),
)
def test_loss_and_gradient_of_any_problem(
    seed: int, batch: int, classes: int, chunk: int | None, spec: str, length: float
) -> None:
    torch.manual_seed(seed)
    x = (length * torch.randn(batch, 16, dtype=torch.float64)).requires_grad_()
    head = normalize(torch.randn(classes, 16, dtype=torch.float64))
    labels, margin = torch.randint(0, classes, (batch,)), Margin.parse(spec)
    found = frozen_cross_entropy(x, head, labels, margin, 32, chunk=chunk)
    expected = margin_cross_entropy(x, head, labels, margin, 32)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    a, b = (torch.autograd.grad(loss, x)[0] * length for loss in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
