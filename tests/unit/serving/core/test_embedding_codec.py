"""Embeddings on the wire: every encoding survives the trip, and nothing but a unit vector is taken."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from pkd.serving.core.embedding_codec import decode, encode
from pkd.toolkit.core.errors import BadVector

VECTOR = np.random.default_rng(0).normal(size=512)
VECTOR = (VECTOR / np.linalg.norm(VECTOR)).astype(np.float32)


@pytest.mark.parametrize(
    ("encoding", "loss"), [("float", 1e-7), ("b64_f32", 1e-7), ("b64_f16", 1e-6), ("b64_i8", 1e-3)]
)
def test_round_trip(encoding: str, loss: Any) -> None:
    sent = encode(VECTOR, encoding)  # type: ignore[arg-type]
    got = decode(sent.tolist() if encoding == "float" else sent, encoding, 512)  # type: ignore[arg-type, union-attr]
    assert np.linalg.norm(got) == pytest.approx(1, abs=1e-12)
    assert 1 - got @ VECTOR < loss


def test_b64_i8_is_little_endian_int8_scaled_to_the_largest_element() -> None:
    raw = np.frombuffer(base64.b64decode(encode(VECTOR, "b64_i8")), np.int8)  # type: ignore[arg-type]
    assert np.array_equal(raw, np.round(127 * VECTOR / np.abs(VECTOR).max()).astype(np.int8))
    assert np.abs(raw).max() == 127


def test_b64_bytes_are_little_endian() -> None:
    vector = np.array([1.0, 0.0], np.float32)
    assert base64.b64decode(encode(vector, "b64_f32")) == bytes.fromhex("0000803f00000000")  # type: ignore[arg-type]
    assert base64.b64decode(encode(vector, "b64_f16")) == bytes.fromhex("003c0000")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (np.full(512, np.nan), "NaN"),
        (np.full(512, np.inf), "NaN or infinity"),
        (np.zeros(512), "zero"),
        (VECTOR * 1.011, "length"),
        (VECTOR * 0.989, "length"),
        (VECTOR * 1e30, "length"),
        (VECTOR[:511], "511 numbers"),
        (np.empty(0), "0 numbers"),
    ],
)
@pytest.mark.parametrize("encoding", ["float", "b64_f32"])
def test_bad_vectors_are_refused(vector: Any, reason: str, encoding: str) -> None:
    sent = vector.tolist() if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
    with pytest.raises(BadVector, match=reason):
        decode(sent, encoding, 512)  # type: ignore[arg-type]


def test_huge_finite_numbers_are_refused_without_a_warning() -> None:
    with pytest.raises(BadVector, match="length"):
        decode([1e300] * 4, "float", 4)


def test_a_norm_within_one_percent_is_taken_and_made_one() -> None:
    assert np.linalg.norm(decode((VECTOR * 1.009).tolist(), "float", 512)) == pytest.approx(1)


def test_b64_i8_has_no_length_but_may_not_be_zero() -> None:
    with pytest.raises(BadVector, match="zero"):
        decode(base64.b64encode(bytes(8)).decode(), "b64_i8", 8)


@pytest.mark.parametrize(
    ("sent", "encoding", "reason"),
    [
        ("AAAA", "float", "string"),
        ([0.6, 0.8], "b64_f32", "list"),
        ("not base64!", "b64_f32", "not base64"),
        ("ünïcode", "b64_f16", "not base64"),
        ("AAAA", "b64_f32", "multiple of 4"),
    ],
)
def test_encodings_that_do_not_fit_what_was_sent(sent: Any, encoding: str, reason: str) -> None:
    with pytest.raises(BadVector, match=reason):
        decode(sent, encoding, None)  # type: ignore[arg-type]


def test_an_unknown_dimension_is_not_checked() -> None:
    assert len(decode([0.6, 0.8], "float", None)) == 2
