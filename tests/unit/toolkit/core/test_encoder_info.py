"""Encoders are named by what they compute."""

from __future__ import annotations

import pytest

from pkd.toolkit.core.encoder_info import combine, describe, require_same_space, short
from pkd.toolkit.core.errors import InputError, SpaceMismatch
from pkd.toolkit.core.preprocess import Preprocess

A, B = "a" * 64, "b" * 64


def test_weights_and_preprocessing_define_space_and_encoder() -> None:
    base = describe("net", "teacher", A, Preprocess(), 512)
    assert describe("net", "teacher", A, Preprocess(), 512) == base
    for other in (
        describe("net", "teacher", B, Preprocess(), 512),
        describe("net", "teacher", A, Preprocess(channels="bgr"), 512),
    ):
        assert other.id != base.id
        assert other.space != base.space


def test_the_numeric_mode_makes_another_encoder_in_the_same_space() -> None:
    fp32 = describe("net", "teacher", A, Preprocess(), 512)
    int8 = describe("net", "teacher", A, Preprocess(), 512, numeric_mode="int8")
    assert fp32.id != int8.id
    require_same_space(fp32, int8)


def test_a_student_lives_in_its_teachers_space() -> None:
    teacher = describe("big", "teacher", A, Preprocess(), 512)
    student = describe("small", "student", B, Preprocess(), 512, space=teacher.space)
    require_same_space(student, teacher)
    assert student.id.startswith("small@sha256:")
    with pytest.raises(SpaceMismatch, match="gives 128 numbers"):
        describe("small", "student", B, Preprocess(), 128, space=teacher.space)


def test_strangers_are_refused_even_with_the_same_dimension() -> None:
    a, b = (describe("net", "teacher", weights, Preprocess(), 512) for weights in (A, B))
    with pytest.raises(SpaceMismatch, match="cannot be compared"):
        require_same_space(a, b)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a@b", "a\\b", "a\nb"])
def test_names_that_would_break_ids_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="encoder name"):
        describe(name, "teacher", A, Preprocess(), 512)


def test_combine_knows_where_each_part_ends() -> None:
    assert combine(["ab", "c"]) != combine(["a", "bc"])
    assert combine(["a"]) != combine(["a", ""])


def test_short() -> None:
    assert short("net@sha256:" + A) == "net@" + "a" * 10
    assert short("plain") == "plain"
