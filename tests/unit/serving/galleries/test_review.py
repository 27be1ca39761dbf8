"""A review's list ends at the number of pairs that chance may put on it, however many people are compared."""

from __future__ import annotations

import numpy as np

from pkd.serving.galleries.review import review
from pkd.serving.galleries.store import Subject, Template
from pkd.toolkit.core.encoder_info import describe
from pkd.toolkit.core.preprocess import Preprocess
from tests.support import serving_bundles as made
from tests.support.gallery_fixtures import at

ENCODER = describe("teacher", "teacher", "00", Preprocess(), made.DIM)


def person(name: str, vector: np.ndarray) -> Subject:
    template = Template(name, ENCODER.id, ENCODER.space.id, 0.0, None, vector.astype(np.float32))
    return Subject(name, (template,), {}, None)


def test_a_score_is_judged_by_all_pairs_that_were_compared() -> None:
    crowd = [person(f"p{axis}", at(0, axis)) for axis in range(3, made.DIM)]
    people = [*crowd, person("ann", at(1, 1)), person("eve", at(0.55, 2))]
    certificates = {(ENCODER.id, ENCODER.id): made.certificate(ENCODER, ENCODER)}  # 0.5 at FMR 1e-2, 0.6 at 1e-3
    few = review(people[-2:], certificates)
    assert few.compared == 1 and few.pairs[0].expected_false <= 0.01
    many = review(people, certificates)
    assert many.compared == len(people) * (len(people) - 1) // 2 > 400
    assert many.pairs == []  # 0.55 is reached by more than one pair of strangers among so many
    (pair,) = review(people, certificates, expected_false=0.011 * many.compared).pairs
    assert {pair.subject, pair.other} == {"ann", "eve"} and pair.expected_false > 1
