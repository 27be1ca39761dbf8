"""The check after a training: its figures, and one line of advice."""

from __future__ import annotations

import numpy as np
import pytest

from pkd.toolkit.cli.student_check import advice, check_student, map_lines
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import unit_rows

INFO = describe("t", "teacher", "0" * 64, Preprocess(), 8)


def test_a_perfect_student_is_the_teacher_and_a_random_one_is_not() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 3)
    centres = random.normal(size=(60, 8))
    teacher = unit_rows((centres[labels] + 0.1 * random.normal(size=(180, 8))).astype(np.float32))
    found = check_student(teacher, teacher, labels, INFO)
    assert found["tar"] == found["teacher"] > 0.95
    assert found["interval"][0] <= found["tar"] <= found["interval"][1]
    other = check_student(unit_rows(random.normal(size=(180, 8)).astype(np.float32)), teacher, labels, INFO)
    assert other["tar"] < 0.2
    unknown = check_student(teacher, teacher, np.full(180, -1), INFO)
    assert unknown == {"unresolved": "no two held-out people with two images each"}


@pytest.mark.parametrize(
    ("tar", "mapped", "gain", "said"),
    [
        (0.8, 0.85, None, "the training lost against the map alone"),
        (0.95, 0.85, 0.02, "still rising"),
        (0.6, 0.5, 0.0, "far from the teacher. Give more faces"),
        (0.6, None, 0.0, "far from the teacher. Start from a mobile face model"),
        (0.95, 0.9, 0.0, None),
    ],
)
def test_one_line_of_advice(tar: float, mapped: float | None, gain: float | None, said: str | None) -> None:
    check = {"tar": tar, "teacher": 0.97, "fmr": 1e-3}
    found = advice(check, {"tar": mapped, "fmr": 1e-3} if mapped else None, gain)
    assert (said is None and found is None) or (said is not None and found is not None and said in found)


def test_the_curve_says_whether_more_images_would_help() -> None:
    held = {
        "people": 20,
        "images": 80,
        "tar": 0.9,
        "interval": (0.85, 0.95),
        "fmr": 1e-3,
        "teacher": 0.97,
        "cosine": 0.7,
    }
    report = {"layer": "embedding", "kind": "ridge", "images": 5000, "held_out": held}
    first, second = map_lines({**report, "curve": [{"images": 3000, "cosine": 0.6}, {"images": 5000, "cosine": 0.65}]})
    assert first.endswith("S–T TAR 90.0% (85.0% to 95.0%) at FMR 0.001, the teacher alone 97.0%, mean cosine 0.700")
    assert second.endswith("more images would still help")
    level = [{"images": 3, "cosine": 0.6}, {"images": 5, "cosine": 0.6}]
    assert map_lines({**report, "curve": level})[1].endswith("help little")
