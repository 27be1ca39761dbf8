"""The fitted head: its gradient against autograd in float64, what it improves, that it repeats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pkd.toolkit.distill.heads import fit
from pkd.toolkit.distill.heads.fit import fit_head, gradients, steps_of
from pkd.toolkit.distill.heads.head import class_means
from pkd.toolkit.distill.heads.margin import Margin, margin_cross_entropy
from tests.support.head_data import clusters, unit

NAMES = tuple(map(str, range(60)))


@pytest.mark.parametrize("kind", ["softmax", "cosface:0.3", "arcface:0.5"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_and_gradient_equal_autograd_of_the_plain_loss(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "CHUNK_CLASSES", chunk)
    random = np.random.default_rng(0)
    centres, rows = (torch.from_numpy(unit(random.normal(size=(n, 12)))).double() for n in (23, 40))
    centres, rows = (torch.nn.functional.normalize(t) for t in (centres, rows))
    labels = torch.from_numpy(random.integers(0, 23, 40))
    leaf = centres.clone().requires_grad_()
    expected = margin_cross_entropy(rows, leaf, labels, Margin.parse(kind), 16.0)
    (slope,) = torch.autograd.grad(expected, leaf)
    with torch.no_grad():
        loss, gradient = gradients(centres, rows, labels, Margin.parse(kind), 16.0)
        parts = torch.cat([gradient(start, min(start + chunk, 23)) for start in range(0, 23, chunk)])
    assert float(loss) == pytest.approx(float(expected.detach()), abs=1e-9)
    torch.testing.assert_close(parts, slope, atol=1e-9, rtol=1e-7)


def test_fitting_lowers_the_loss_and_repeats_with_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, mirrored, labels = clusters(60, 6, 24, noise=0.9)
    means = class_means(plain, mirrored, labels, NAMES)
    before = means.centres.clone()
    seen: list[int] = []
    head = fit_head(means, plain, mirrored, labels, 0, seen.append)
    assert torch.equal(means.centres, before) and head.identities == NAMES and sum(seen) == steps_of(360)
    torch.testing.assert_close(head.centres.norm(dim=1), torch.ones(60))
    rows, ids = torch.from_numpy(np.concatenate([plain, mirrored])), torch.from_numpy(np.tile(labels, 2))
    losses = [float(gradients(c, rows, ids, fit.MARGIN, fit.SCALE)[0]) for c in (before, head.centres)]
    assert losses[1] < 0.9 * losses[0]
    assert torch.equal(fit_head(means, plain, mirrored, labels, 0).centres, head.centres)
    monkeypatch.setattr(fit, "CHUNK_CLASSES", 7)  # bfloat16 products may round otherwise in other shapes
    torch.testing.assert_close(fit_head(means, plain, mirrored, labels, 0).centres, head.centres, atol=5e-3, rtol=0)


def test_it_places_held_out_images_better_than_means() -> None:
    """With uneven classes, whose means lean towards each other, as those of real faces do."""
    random = np.random.default_rng(1)
    common, centres = random.normal(size=16) * 1.5, random.normal(size=(60, 16))
    labels = np.repeat(np.arange(60), 12)
    rows = unit(centres[labels] + common * random.normal(size=(720, 1)) + random.normal(size=(720, 16)) * 0.6)
    train = np.arange(720) % 12 < 8
    means = class_means(rows[train], rows[train], labels[train], NAMES)
    head = fit_head(means, rows[train], rows[train], labels[train], 0)
    right = [float(np.mean((rows[~train] @ h.centres.numpy().T).argmax(1) == labels[~train])) for h in (means, head)]
    assert right[1] > right[0] + 0.02


def test_unlabelled_images_and_singletons() -> None:
    plain, mirrored, labels = clusters(60, 3, 24)
    labels = np.where(np.arange(180) % 3 == 0, labels, -1)
    means = class_means(plain, mirrored, labels, NAMES)
    head = fit_head(means, plain, mirrored, labels, 0)
    assert torch.isfinite(head.centres).all()
    other = plain.copy()
    other[labels < 0] = 0  # what is unlabelled is never looked at
    assert torch.equal(fit_head(means, other, mirrored, labels, 0).centres, head.centres)


def test_steps_have_bounds() -> None:
    assert [steps_of(n) for n in (1, 30_000, 10_000_000)] == [60, 176, 1000]
