"""Views: what the student sees is what the teacher embedded, stored or live, and a seed makes the same again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.distill.training.loader import Loader
from pkd.toolkit.distill.training.views import MappedRows, StoredViews, Teaching, ViewMaker
from pkd.toolkit.encoders.base import Embeddings
from pkd.toolkit.images.codec import Rgb
from tests.support.training_data import SIZE, make_teacher, write_patterns

Make = Callable[..., StoredViews]


class CountingTeacher:
    """The projection teacher, counting the crops that it embeds."""

    def __init__(self) -> None:
        self.info: EncoderInfo = make_teacher().info
        self.crops = 0
        self._teacher = make_teacher()

    def embed(self, crops: Rgb) -> Embeddings:
        self.crops += len(crops)
        return self._teacher.embed(crops)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patterns(tmp_path_factory.mktemp("views") / "faces", identities=4, images=3)


@pytest.fixture
def stored(folder: Path, tmp_path: Path) -> Make:
    """Store views of the pictures, embedded by a teacher."""

    def make(teacher: CountingTeacher, faces: FaceSet | None = None, *, augment: float = 0.8, mix: float = 0.0,
             count: int = 3, seed: int = 0) -> StoredViews:  # fmt: skip
        maker = ViewMaker(faces or FaceSet.read(folder), SIZE, augment=augment, mix=mix)
        views = StoredViews(maker, count, seed, tmp_path / "cache")
        views.embed(teacher, 1, lambda done: None)
        return views

    return make


@pytest.mark.parametrize("mix", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["stored", "live"])
def test_the_teacher_embedded_exactly_what_the_student_sees(folder: Path, stored: Make, kind: str, mix: float) -> None:
    teacher = CountingTeacher()
    teaching = Teaching(live=teacher) if kind == "live" else Teaching(views=stored(teacher, mix=mix))
    loader = Loader(FaceSet.read(folder), 6, SIZE, augment=0.8, seed=0, mix=mix, teaching=teaching)
    mixed = 0
    for batch in loader.run(0, 8):
        assert batch.teacher is not None and batch.teacher.dtype == torch.float32
        np.testing.assert_allclose(
            batch.teacher, make_teacher().embed(batch.crops.numpy()), atol=1e-6 if kind == "live" else 1e-3
        )
        np.testing.assert_allclose(np.linalg.norm(batch.teacher.numpy(), axis=1), 1, atol=1e-6)
        mixed += int(batch.mixed.sum())
    assert (mixed > 8) == (mix > 0)


def test_cached_embeddings_of_clean_images_are_not_those_of_augmented_ones(folder: Path) -> None:
    faces = FaceSet.read(folder)
    plain = make_teacher().embed(faces.load(np.arange(len(faces)), SIZE))
    mirrored = make_teacher().embed(np.ascontiguousarray(faces.load(np.arange(len(faces)), SIZE)[:, :, ::-1]))
    batch = next(iter(Loader(faces, 12, SIZE, augment=0.8, seed=0, teaching=Teaching((plain, mirrored))).run(0, 1)))
    assert batch.teacher is not None
    np.testing.assert_array_equal(
        batch.teacher, np.where(batch.mirrored[:, None], mirrored[batch.indices], plain[batch.indices])
    )
    assert np.abs(batch.teacher.numpy() - make_teacher().embed(batch.crops.numpy())).max() > 0.05


def test_the_students_own_embedding_is_added_with_its_length(folder: Path) -> None:
    faces = FaceSet.read(folder)
    random = np.random.default_rng(0)
    plain = make_teacher().embed(faces.load(np.arange(len(faces)), SIZE))
    features = random.normal(size=(len(faces), 5)).astype(np.float32)
    weight = random.normal(size=(5, plain.shape[1]))
    bias = random.normal(size=(1, plain.shape[1]))[0]
    own = features @ weight + bias
    own *= 0.3 / np.linalg.norm(own, axis=1, keepdims=True)
    teaching = Teaching((plain, plain), own=MappedRows(features, weight, bias, length=0.3))
    batch = next(iter(Loader(faces, 12, SIZE, augment=0.0, seed=0, teaching=teaching).run(0, 1)))
    expected = plain + own
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert batch.teacher is not None
    np.testing.assert_allclose(batch.teacher, expected[batch.indices], atol=1e-6)


def test_views_come_in_turn_and_again(folder: Path, stored: Make) -> None:
    loader = Loader(
        FaceSet.read(folder), 12, SIZE, augment=0.8, seed=0, teaching=Teaching(views=stored(CountingTeacher()))
    )
    epochs = [batch.crops[np.argsort(batch.indices)] for batch in loader.run(0, 6)]
    for first, second in ((0, 3), (1, 4), (2, 5)):
        np.testing.assert_array_equal(epochs[first], epochs[second])
    assert all(not np.array_equal(epochs[0][i], epochs[1][i]) for i in range(12))


def test_a_view_is_embedded_once_and_kept_as_half_floats(stored: Make, tmp_path: Path) -> None:
    teacher = CountingTeacher()
    stored(teacher)
    assert teacher.crops == 36
    (rows,) = (tmp_path / "cache").glob("*.f16")
    assert rows.stat().st_size == 36 * 16 * 2
    stored(teacher)
    stored(teacher, count=4)
    assert teacher.crops == 48  # the fourth view alone is new
    for changed in ({"augment": 0.7}, {"seed": 1}):
        before = teacher.crops
        stored(teacher, **changed)
        assert teacher.crops == before + 36


def test_views_of_fewer_images_are_those_of_all_unless_they_are_mixed(folder: Path, stored: Make) -> None:
    """A view depends on its image, not on its place; a mixed one on its partner's contents, too."""
    teacher, part = CountingTeacher(), FaceSet.read(folder).select(np.array([7, 2, 5]))
    stored(teacher)
    stored(teacher, part)
    assert teacher.crops == 36
    stored(teacher, mix=1.0)
    stored(teacher, part, mix=1.0)
    assert teacher.crops > 36 + 36 + 4


def test_copies_of_an_image_have_the_same_views(folder: Path, stored: Make) -> None:
    faces = FaceSet.read(folder).select(np.array([4, 4]))
    views = stored(CountingTeacher(), faces)
    both = ViewMaker(faces, SIZE, augment=0.8).make(np.array([0, 1]), views.seeds(np.array([0, 1]), np.array([2, 2])))
    np.testing.assert_array_equal(both.crops[0], both.crops[1])


def test_views_kept_in_memory_are_those_that_are_made_again(folder: Path, stored: Make) -> None:
    views = stored(CountingTeacher(), mix=0.3)
    made, kept = (
        list(Loader(FaceSet.read(folder), 5, SIZE, augment=0.8, seed=0, mix=0.3, teaching=Teaching(views=views),
                    memory=memory).run(1, 9))
        for memory in (None, torch.device("cpu"))
    )  # fmt: skip
    for one, other in zip(made, kept, strict=True):
        assert torch.equal(one.crops, other.crops) and one.teacher is not None and other.teacher is not None
        torch.testing.assert_close(one.teacher, other.teacher, atol=1e-3, rtol=0)
        for name in ("indices", "mirrored", "mixed"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_views_that_do_not_fit_into_memory_are_refused(
    folder: Path, stored: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    teaching = Teaching(views=stored(CountingTeacher()))
    loader = Loader(FaceSet.read(folder), 5, SIZE, augment=0.8, seed=0, teaching=teaching, memory=torch.device("cpu"))

    def full(*shape: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(InputError, match=r"--views-in-memory: 3 views of 12 images are 0.0 GiB"):
        loader.run(0, 1)
