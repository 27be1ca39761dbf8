"""pkd-verify on files that someone changed: it never stumbles, and with a key it never believes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.toolkit.certificates.certificate import file_name
from pkd.toolkit.certificates.signing import SigningKey, TrustedKeys, write_signed
from pkd.toolkit.cli.verification import verify
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.evaluation.metrics.operating_points import measure
from pkd.toolkit.evaluation.metrics.pair_scores import score_pairs
from pkd.toolkit.evaluation.metrics.pairing import Pairing
from pkd.toolkit.evaluation.protocols.all_pairs import certify
from pkd.toolkit.evaluation.results.schema import Data, Evaluation

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
TRUSTED = TrustedKeys([KEY.private.public_key()])
TEACHER = describe("tiny", "teacher", "0" * 64, Preprocess(), 6)
VALUES: list[Any] = [None, True, -1, 0, 1, 0.5, 1e308, "", "x", [], {}, [[]], float("nan"), float("inf")]


@cache
def evaluated() -> tuple[str, str]:
    """report.json and its one certificate, as pkd-evaluate writes them."""
    random = np.random.default_rng(0)
    owners = np.repeat(np.arange(60), 2)
    vectors = random.normal(size=(60, 6))[owners] + 0.7 * random.normal(size=(120, 6))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    scores = score_pairs(Pairing(owners, owners, np.arange(120), np.arange(120), 60, unordered=True), unit, unit)
    found, _ = measure(scores, "T–T", TEACHER, TEACHER, fmrs=(0.1, 0.01), resamples=100, seed=0)
    name = file_name(TEACHER.id, TEACHER.id)
    evaluation = Evaluation(
        tool="pkd test",
        created="2026-01-01T00:00:00+00:00",
        protocol="all pairs of one set",
        data=Data(name="drawn", content_digest="0" * 64, images=120, identities=60, single_image_identities=0),
        synthetic=True,
        flip=False,
        resamples=100,
        seed=0,
        teacher=TEACHER,
        student=None,
        comparisons=(found.model_copy(update={"certificate": name}),),
    )
    return evaluation.model_dump_json(), certify(evaluation.comparisons[0], evaluation).model_dump_json()


def written(folder: Path) -> tuple[Path, Path]:
    """report.json and certificate on disk, signed."""
    report, certificate = folder / "report.json", folder / "certificates" / file_name(TEACHER.id, TEACHER.id)
    certificate.parent.mkdir()
    for path, text in zip((report, certificate), evaluated(), strict=True):
        write_signed(path, text.encode(), KEY)
    return report, certificate


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value of a JSON document is, the document itself left out."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in inside for place in ((*path, key), *places(value, (*path, key)))]


def test_the_untouched_evaluation_is_believed() -> None:
    with TemporaryDirectory() as folder:
        report, _ = written(Path(folder))
        assert not verify(report.parent, TRUSTED).failures and not verify(report.parent, None).failures


@given(st.data(), st.booleans(), st.sampled_from(VALUES))
@settings(max_examples=120)
def test_any_replaced_value(data: st.DataObject, of_report: bool, value: Any) -> None:
    document = json.loads(evaluated()[0 if of_report else 1])
    place = data.draw(st.sampled_from(places(document)))
    node = document
    for key in place[:-1]:
        node = node[key]
    before, node[place[-1]] = node[place[-1]], value
    with TemporaryDirectory() as folder:
        report, certificate = written(Path(folder))
        (report if of_report else certificate).write_text(json.dumps(document))
        assert verify(report.parent, TRUSTED).failures  # another spelling of the same numbers is not what was signed
        found = verify(report.parent, None).failures
        if not of_report:
            assert bool(found) == (json.dumps(before) != json.dumps(value) and before != value)
            verify(certificate, None)


@given(st.integers(0, 10**6), st.binary(max_size=30), st.integers(0, 500), st.booleans())
@settings(max_examples=80)
def test_any_splice(start: int, instead: bytes, length: int, of_report: bool) -> None:
    with TemporaryDirectory() as folder:
        report, certificate = written(Path(folder))
        path = report if of_report else certificate
        before = path.read_bytes()
        start %= len(before)
        path.write_bytes(before[:start] + instead + before[start + length :])
        found = verify(report.parent, TRUSTED).failures
        assert bool(found) == (path.read_bytes() != before)
        verify(report.parent, None)
