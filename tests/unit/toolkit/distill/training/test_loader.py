"""Loader and augmentation: the same batches in every run, whatever the threads do."""

from __future__ import annotations

import numpy as np
import pytest

from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.training.augment import augment, light
from pkd.toolkit.distill.training.loader import Loader
from pkd.toolkit.images.codec import write_rgb


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> FaceSet:
    folder = tmp_path_factory.mktemp("faces")
    random = np.random.default_rng(0)
    for i in range(10):
        (folder / f"p{i % 3}").mkdir(exist_ok=True)
        write_rgb(folder / f"p{i % 3}" / f"{i}.png", random.integers(0, 256, (112, 112, 3), np.uint8))
    return FaceSet.read(folder)


def test_a_resumed_run_sees_the_batches_it_would_have_seen(faces: FaceSet) -> None:
    whole = list(Loader(faces, 4, 112, augment=0.7, seed=5, workers=3).run(0, 7))
    rest = list(Loader(faces, 4, 112, augment=0.7, seed=5, workers=1).run(3, 7))
    for a, b in zip(whole[3:], rest, strict=True):
        np.testing.assert_array_equal(a.crops, b.crops)
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_array_equal(a.mirrored, b.mirrored)


def test_an_epoch_shows_no_image_twice_and_the_next_another_order(faces: FaceSet) -> None:
    loader = Loader(faces, 5, 112, augment=0, seed=0)
    batches = [b.indices for b in loader.run(0, 4)]
    assert sorted(np.concatenate(batches[:2])) == list(range(10)) == sorted(np.concatenate(batches[2:]))
    assert not np.array_equal(np.concatenate(batches[:2]), np.concatenate(batches[2:]))


def test_without_augmentation_only_the_mirroring_is_left_and_it_is_told(faces: FaceSet) -> None:
    batch = next(iter(Loader(faces, 10, 112, augment=0, seed=1).run(0, 1)))
    plain = faces.load(batch.indices, 112)
    assert 0 < batch.mirrored.sum() < 10
    for crop, image, mirrored in zip(batch.crops, plain, batch.mirrored, strict=True):
        np.testing.assert_array_equal(crop, image[:, ::-1] if mirrored else image)


def test_images_that_must_not_be_mirrored_are_not_and_nothing_else_changes(faces: FaceSet) -> None:
    with_, without = (
        next(iter(Loader(faces, 10, 112, augment=0.3, seed=1, mirror=m).run(0, 1))) for m in (True, False)
    )
    assert not without.mirrored.any()
    np.testing.assert_array_equal(with_.indices, without.indices)
    for row in np.flatnonzero(~with_.mirrored):
        np.testing.assert_array_equal(with_.crops[row], without.crops[row])


def test_seeds_differ(faces: FaceSet) -> None:
    a, b = (next(iter(Loader(faces, 8, 112, augment=0.5, seed=s).run(0, 1))) for s in (0, 1))
    assert not np.array_equal(a.crops, b.crops)


@pytest.mark.parametrize("size", [24, 112])
def test_augmentation_keeps_shape_and_type_and_changes_more_with_strength(size: int) -> None:
    yy, xx = np.mgrid[0:size, 0:size]
    image = np.stack([yy * 255 // size, xx * 255 // size, (yy + xx) * 127 // size], axis=2).astype(np.uint8)
    change = {}
    for strength in (0.0, 0.2, 1.0):
        out = [augment(image.copy(), strength, np.random.default_rng(s)) for s in range(60)]
        assert all(o.shape == image.shape and o.dtype == np.uint8 for o in out)
        change[strength] = np.mean([np.abs(o.astype(int) - image).mean() for o in out])
    assert change[0.0] == 0 < change[0.2] < change[1.0]


def test_light_is_gain_around_mid_grey_plus_offset() -> None:
    image = np.array([[[0, 100, 255]]], np.uint8)
    np.testing.assert_array_equal(light(image, np.array([1.0, 0.5, 2.0]), 10), [[[10, 123, 255]]])


def test_the_shares_of_two_ranks_are_the_batch_of_one(faces: FaceSet) -> None:
    whole = next(iter(Loader(faces, 8, 112, augment=0.5, seed=2).run(1, 2)))
    parts = [next(iter(Loader(faces, 8, 112, augment=0.5, seed=2, share=s).run(1, 2))) for s in (slice(4), slice(4, 8))]
    np.testing.assert_array_equal(whole.crops, np.concatenate([p.crops for p in parts]))
    np.testing.assert_array_equal(whole.indices, np.concatenate([p.indices for p in parts]))
    np.testing.assert_array_equal(whole.mirrored, np.concatenate([p.mirrored for p in parts]))
