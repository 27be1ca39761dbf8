"""Maps of stored templates into another teacher's space: recovered, chosen, written, and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pkd.toolkit.core.encoder_info import EncoderInfo, describe
from pkd.toolkit.core.errors import BadVector, InputError, SpaceMismatch
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import Embeddings, unit_rows
from pkd.toolkit.encoders.space_map import SpaceMap, fit_space_map

OLD = describe("old", "teacher", "aa", Preprocess(), 6)
NEW = describe("new", "teacher", "bb", Preprocess(), 10)


def faces(n: int = 400, noise: float = 0.2, seed: int = 0) -> tuple[Embeddings, Embeddings, np.ndarray]:
    """Old and new embeddings of the same images, and whose each is: four of every person."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) // 4
    person = random.normal(size=(n // 4, 6))[labels]
    old = person + 0.3 * random.normal(size=(n, 6))
    new = np.tanh(old) @ np.random.default_rng(99).normal(size=(6, 10)) + 0.3 + noise * random.normal(size=(n, 10))
    return unit_rows(old.astype(np.float32)), unit_rows(new.astype(np.float32)), labels


def fitted(labels: np.ndarray | None = None, old: EncoderInfo = OLD, new: EncoderInfo = NEW) -> SpaceMap:
    x, y, own = faces()
    return fit_space_map(old, new, x, y, own if labels is None else labels, data="faces", data_digest="d")


def test_a_map_says_honestly_what_it_does_to_people_it_has_not_seen() -> None:
    found = fitted()
    x, y, _ = faces(seed=1)
    mapped, expected = found.map(x)
    cosine = np.einsum("nd,nd->n", mapped, y)
    assert found.report.held_out_by == "people" and found.report.people == 100
    assert abs(found.report.held_out_cosine - cosine.mean()) < 0.03
    assert abs(expected.mean() - cosine.mean()) < 0.1
    assert np.corrcoef(expected, cosine)[0, 1] > 0.1  # which template is worse is known in advance


def test_nobody_needs_a_name() -> None:
    found = fitted(np.full(400, -1))
    assert (found.report.held_out_by, found.report.people, found.report.held_out_images) == ("images", 0, 80)


def test_a_template_is_mapped_alike_alone_and_among_many() -> None:
    found, (x, _, _) = fitted(), faces(seed=2)
    many = found.map(x)[0].astype(np.float16)
    for i in (0, 17, 399):
        np.testing.assert_array_equal(found.map(x[i : i + 1])[0].astype(np.float16)[0], many[i])


def test_the_expected_cosine_is_recovered_from_what_is_stored() -> None:
    found, (x, _, _) = fitted(), faces(seed=3)
    mapped, expected = found.map(x)
    stored = mapped.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(found.expected_cosine(stored), expected, atol=2e-3)
    a, b, labels = faces()
    back = fit_space_map(NEW, OLD, b, a, labels, data="faces", data_digest="d")
    assert np.isnan(back.expected_cosine(x)).all()


def test_the_id_is_of_the_old_encoder_and_of_every_number(tmp_path: Path) -> None:
    found = fitted()
    assert found.info.space == NEW.space and found.info.name == "old-mapped"
    other = replace(found, weight=found.weight + 1e-3)
    assert len({found.info.id, other.info.id, OLD.id}) == 3
    found.write(tmp_path / "map.npz")
    again = SpaceMap.read(tmp_path / "map.npz")
    assert again.info == found.info and again.report == found.report
    np.testing.assert_array_equal(again.weight, found.weight)


def test_what_is_no_map_is_refused(tmp_path: Path) -> None:
    found, file = fitted(), tmp_path / "map.npz"
    found.write(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for path in (file, tmp_path / "none.npz"):
        with pytest.raises(InputError, match=r"pkd-map|Fit the map again"):
            SpaceMap.read(path)
    replace(found, weight=found.weight[:, :5], bias=found.bias[:5]).write(file)
    with pytest.raises(InputError, match="no map of 6 to 10 numbers"):
        SpaceMap.read(file)
    replace(found, weight=found.weight * np.nan).write(file)
    with pytest.raises(InputError, match="no map of"):
        SpaceMap.read(file)
    with pytest.raises(BadVector, match="zero, NaN or infinite"):
        found.map(np.full((1, 6), np.nan))
    x, y, labels = faces()
    with pytest.raises(InputError, match="too few"):
        fit_space_map(OLD, NEW, x[:99], y[:99], labels[:99], data="faces", data_digest="d")
    with pytest.raises(SpaceMismatch, match="need no map"):
        fitted(new=OLD)
