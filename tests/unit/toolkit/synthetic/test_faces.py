"""Synthetic faces: determinism, aligned geometry, factors that act where they should, identities that differ."""

from __future__ import annotations

from dataclasses import fields, replace

import cv2
import numpy as np
import pytest

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.images.alignment import TEMPLATE
from pkd.toolkit.images.codec import Rgb
from pkd.toolkit.synthetic.canvas import MIDDLE
from pkd.toolkit.synthetic.faces import (
    OCCLUSIONS,
    Conditions,
    Identity,
    draw,
    face,
    random_conditions,
    random_identity,
    write_faces,
)
from pkd.toolkit.synthetic.head import Head
from pkd.toolkit.synthetic.scene import photograph

AVERAGE = Identity()
EXTREMES = {
    "yaw": 30.0, "pitch": 18.0, "roll": 10.0, "shift_x": 4.0, "shift_y": 4.0, "zoom": 1.1, "light_azimuth": 70.0,
    "light_elevation": 60.0, "light_strength": 0.9, "exposure": 1.4, "warmth": 1.0, "contrast": 1.3, "smile": 1.0,
    "mouth_open": 1.0, "brow_raise": 1.0, "eyelids": 1.0, "gaze": 1.0, "occlusion": "mask", "blur": 2.0, "noise": 8.0,
    "jpeg": 30, "scene": 5,
}  # fmt: skip


def changed(a: Rgb, b: Rgb) -> np.ndarray:
    """Mean absolute difference per pixel, grey levels."""
    return np.abs(a.astype(np.float64) - b).mean(axis=2)


def test_a_crop_is_uint8_rgb_of_the_template_s_size() -> None:
    crop = draw(AVERAGE)
    assert crop.dtype == np.uint8
    assert crop.shape == (112, 112, 3)
    assert crop.std() > 20


def test_image_k_of_identity_i_depends_on_nothing_else() -> None:
    forwards = [face(5, person, image) for person in (0, 1, 2) for image in (0, 1)]
    backwards = [face(5, person, image) for person in (2, 1, 0) for image in (1, 0)]
    assert np.array_equal(forwards, backwards[::-1])
    assert not np.array_equal(forwards[0], forwards[1]) and not np.array_equal(forwards[0], forwards[2])
    assert not np.array_equal(face(5, 0, 0), face(6, 0, 0))


@pytest.mark.parametrize("factor", [f.name for f in fields(Conditions) if f.name != "occlusion_seed"])
def test_every_condition_changes_the_image(factor: str) -> None:
    assert changed(draw(AVERAGE), draw(AVERAGE, replace(Conditions(), **{factor: EXTREMES[factor]}))).mean() > 0.05  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [f.name for f in fields(Identity)])
def test_every_factor_of_identity_changes_the_face(factor: str) -> None:
    shorn = replace(AVERAGE, hair_length=-0.8)  # long hair hides the ears
    low, high = (replace(shorn, **{factor: value}) for value in ((1, 2) if factor == "marks" else (-1.0, 1.0)))  # type: ignore[arg-type]
    assert changed(draw(low), draw(high)).mean() > 0.08


@pytest.mark.parametrize("kind", [kind for kind in OCCLUSIONS if kind != "none"])
def test_an_occlusion_covers_part_of_the_face_in_its_own_way(kind: str) -> None:
    plain = draw(AVERAGE)
    one, two = (draw(AVERAGE, Conditions(occlusion=kind, occlusion_seed=seed)) for seed in (1, 2))  # type: ignore[arg-type]
    assert 0.005 < (changed(plain, one) > 8).mean() < 0.6
    assert changed(one, two).mean() > 0.2


def test_expression_stays_where_it_belongs() -> None:
    plain = draw(AVERAGE)
    lids = changed(plain, draw(AVERAGE, Conditions(eyelids=1.0)))
    assert lids[85:].max() == 0
    assert lids[44:60].max() > 20
    mouth = changed(plain, draw(AVERAGE, Conditions(gaze=1.0)))
    assert mouth[65:].max() == 0


def test_the_scene_leaves_the_face_alone() -> None:
    difference = changed(draw(AVERAGE), draw(AVERAGE, Conditions(scene=9)))
    assert difference[40:100, 35:77].max() == 0
    assert difference[:, :4].mean() > 3


@pytest.mark.parametrize("yaw", [-30.0, 0.0, 30.0])
def test_a_turned_head_stays_aligned_to_the_template(yaw: float) -> None:
    """The five points, painted as dots on the head, come out at the template's places on average."""
    conditions = Conditions(yaw=yaw, light_strength=0.0)
    head = Head(AVERAGE, conditions)
    head.canvas.rgb[:] = 0
    head.canvas.alpha[:] = 1
    found = []
    for x, y in head.five_points:
        head.canvas.rgb[:] = 0
        head.canvas.paint(np.array([[x - 2, y - 2], [x + 2, y - 2], [x + 2, y + 2], [x - 2, y + 2]]), np.full(3, 255.0))
        spot = photograph(head, conditions, 112)[..., 0].clip(0)
        rows, columns = np.mgrid[:112, :112]
        found.append([(spot * columns).sum() / spot.sum(), (spot * rows).sum() / spot.sum()])
    offsets = np.array(found) - TEMPLATE
    assert np.abs(offsets.mean(axis=0)).max() < 1.0
    assert np.abs(offsets).max() < (2.0 if yaw == 0 else 9.0)


def test_nose_and_eyes_shift_against_each_other_when_the_head_turns() -> None:
    """Parallax: yaw moves the nose tip, which is nearer, further than the middle of the eyes."""
    noses = []
    for yaw in (-25.0, 25.0):
        conditions = Conditions(yaw=yaw, light_strength=0.0)
        head = Head(AVERAGE, conditions)
        places = []
        for x, y in ((MIDDLE, head.nose_y), (MIDDLE, 51.6)):
            head.canvas.rgb[:] = 0
            head.canvas.paint(
                np.array([[x - 2, y - 2], [x + 2, y - 2], [x + 2, y + 2], [x - 2, y + 2]]), np.full(3, 255.0)
            )
            head.canvas.alpha[:] = 1
            spot = photograph(head, conditions, 112)[..., 0].clip(0)
            places.append((spot.sum(0) * np.arange(112)).sum() / spot.sum())
        noses.append(places[0] - places[1])
    assert noses[1] - noses[0] > 3


def test_identities_are_told_apart_above_chance_but_not_perfectly() -> None:
    """Nearest neighbour on small, standardised grey images of eyes, nose and mouth: no colour, scene or hair."""
    people, images = 30, 6
    crops = [face(11, person, image) for person in range(people) for image in range(images)]
    labels = np.repeat(np.arange(people), images)
    small = np.stack([cv2.resize(cv2.cvtColor(c, cv2.COLOR_RGB2GRAY)[30:106, 24:88], (16, 19)) for c in crops])
    vectors = small.reshape(len(small), -1).astype(np.float64)
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -2)
    accuracy = (labels[cosine.argmax(axis=1)] == labels).mean()
    assert 4 / people < accuracy < 0.95


def test_difficulty_is_a_dial() -> None:
    calm, wild = (
        np.array([[c.yaw, c.noise, c.blur] for c in (random_conditions(0, p, 0, d) for p in range(40))]).std(axis=0)
        for d in (0.3, 1.5)
    )
    assert (wild > 2 * calm).all()
    portrait = random_conditions(0, 1, 2, 0.0)
    assert portrait == Conditions(scene=portrait.scene, occlusion_seed=portrait.occlusion_seed)
    with pytest.raises(InputError, match="difficulty 3: give 0"):
        random_conditions(0, 0, 0, 3.0)


def test_conditions_do_not_depend_on_identity_factors() -> None:
    """Identity and conditions come from separate streams: no factor of one follows one of the other."""
    pairs = [(random_identity(2, p), random_conditions(2, p, 0)) for p in range(300)]
    skin = np.array([i.skin for i, _ in pairs])
    for name in ("yaw", "light_azimuth", "exposure", "smile"):
        assert abs(np.corrcoef(skin, [getattr(c, name) for _, c in pairs])[0, 1]) < 0.2


def test_written_faces_read_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    done: list[int] = []
    write_faces(tmp_path, 3, 4, 2, first=7, progress=done.append)
    assert sum(done) == 8
    faces = FaceSet.read(tmp_path)
    assert faces.identities == tuple(f"synthetic-{p:05d}" for p in range(7, 11))
    assert np.array_equal(faces.load([3], 112)[0], face(3, 8, 1))
