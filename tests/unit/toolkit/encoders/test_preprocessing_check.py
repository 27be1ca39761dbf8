"""The encoder itself says whether its preprocessing is right: scale and channel order, and nothing where it is."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.data.face_set import FaceSet
from pkd.toolkit.encoders.base import Encoder, NetEncoder
from pkd.toolkit.encoders.preprocessing_check import FEWEST, check_preprocessing

SIZE = 16
RIGHT = Preprocess(size=SIZE, mean=127.5, std=127.5)


def teacher(preprocess: Preprocess) -> Encoder:
    """Embed what lies within -1 to 1 in the first channel: any other scale saturates, another order sees noise."""

    def net(crops: np.ndarray) -> np.ndarray:
        seen = np.clip(preprocess(crops)[:, 0], -1, 1).reshape(len(crops), -1)
        return np.concatenate([seen, np.full((len(seen), 1), 0.1, np.float32)], axis=1)

    return NetEncoder(describe("t", "teacher", "0" * 64, preprocess, SIZE * SIZE + 1), net)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> FaceSet:
    """Write people whose red plane is theirs, and whose blue one is noise."""
    folder, random = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    for person in range(2 * FEWEST):
        (folder / f"p{person:02d}").mkdir()
        own = random.integers(0, 256, (SIZE, SIZE))
        for image in range(2):
            picture = random.integers(0, 256, (SIZE, SIZE, 3))  # as OpenCV writes it: red is last
            picture[..., 2] = np.clip(own + random.integers(-60, 61, own.shape), 0, 255)
            cv2.imwrite(str(folder / f"p{person:02d}" / f"{image}.png"), picture.astype(np.uint8))
    return FaceSet.read(folder)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({}, None),
        ({"std": 128.0}, None),
        ({"mean": 0.0, "std": 1.0}, r"its scaling first\. With channels=rgb,mean=127\.5,std=.*mean=0,std=1 by"),
        ({"channels": "bgr"}, r"its channel order first\. With channels=rgb"),
    ],
)
def test_what_is_wrong_is_named_first(faces: FaceSet, stated: dict[str, object], said: str | None) -> None:
    found = check_preprocessing(teacher(RIGHT.model_copy(update=stated)), faces, teacher)
    if said is None:
        assert found is None
    else:
        assert found is not None and re.match(f"teacher t: .*{said}", found), found


def test_nothing_is_said_of_few_people_or_of_an_encoder_that_states_its_own(faces: FaceSet) -> None:
    wrong = teacher(RIGHT.model_copy(update={"mean": 0.0, "std": 1.0}))
    assert check_preprocessing(wrong, faces, None) is None
    assert check_preprocessing(wrong, faces.select(np.flatnonzero(faces.labels < FEWEST - 1)), teacher) is None
