"""Searching a ExactIndex gives what a plain loop in float64 gives: ties, filters, deletions and all."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pkd.serving.galleries.index.exact_index import FEW, TILE, ExactIndex, products

DIM = 8


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    """Templates of few distinct vectors, so that ties are common; some removed and others put in their place."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    count = draw(st.sampled_from([0, 1, 3, 40, 400, 1100, 2500]))
    distinct = draw(st.sampled_from([1, 2, 5, 5000]))
    return {
        "random": random,
        "count": count,
        "palette": random.standard_normal((distinct, DIM)),
        "subjects": draw(st.sampled_from([1, 2, 30, 3000])),
        "top_k": draw(st.sampled_from([1, 2, 10, 5000])),
        "queries": draw(st.sampled_from([1, 2, FEW, 40])),
        "removed": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "kept_by_filter": draw(st.sampled_from([None, 0.02, 0.5, 0.0])),
    }


@given(cases())
@settings(max_examples=60)
def test_it_is_what_a_loop_finds(case: dict[str, object]) -> None:
    random: np.random.Generator = case["random"]  # type: ignore[assignment]
    count, many, top_k, queries = (int(case[name]) for name in ("count", "subjects", "top_k", "queries"))  # type: ignore[call-overload]
    index, rows = ExactIndex(DIM), {}
    number = 0
    for _ in range(2):  # the second time, holes are filled
        vectors = unit(case["palette"][random.integers(0, len(case["palette"]), count)])  # type: ignore[index,arg-type]
        templates = np.arange(number, number + count) + 1
        subjects = random.integers(1, many + 1, count)
        sets = random.integers(1, 51, count).astype(np.int32)
        index.add(templates, subjects, sets, vectors)
        for row in zip(templates.tolist(), subjects.tolist(), sets.tolist(), vectors, strict=True):
            rows[row[0]] = row
        gone = random.permutation(np.array(list(rows), np.int64))[: int(len(rows) * float(case["removed"]))]  # type: ignore[arg-type]
        found, _ = index.remove(np.append(gone, 10**9))
        assert sorted(found.tolist()) == sorted(rows.pop(template)[1] for template in gone.tolist())
        number += count
    assert len(index) == len(rows)
    kept = case["kept_by_filter"]
    allowed = None if kept is None else np.concatenate([[False], random.random(50) < float(kept)])  # type: ignore[arg-type]
    asked = unit(case["palette"][random.integers(0, len(case["palette"]), queries)])  # type: ignore[index,arg-type]

    def name(subject: int) -> str:
        return f"{subject * 7919 % 10007:05d}"  # another order than the numbers'

    answers = index.search(asked, [top_k] * queries, [allowed] * queries, name)
    for query, answer in zip(asked, answers, strict=True):
        taking_part = [row for row in rows.values() if allowed is None or allowed[row[2]]]
        assert answer.searched == len(taking_part)
        best: dict[int, float] = {}
        for _, subject, _, vector in taking_part:
            score = float((vector.astype(np.float64) * query.astype(np.float64)).sum())
            best[subject] = max(best.get(subject, -2.0), score)
        expected = sorted(best.items(), key=lambda item: (-item[1], name(item[0])))[:top_k]
        assert [(subject, score) for score, subject, _ in answer.best] == expected
        for score, subject, template in answer.best:
            assert rows[template][1] == subject
            assert float((rows[template][3].astype(np.float64) * query.astype(np.float64)).sum()) == score


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, TILE - 1, TILE, 3 * TILE + 5]), st.integers(0, 2 * FEW))
@settings(max_examples=40)
def test_products_are_products(seed: int, used: int, queries: int) -> None:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((4 * TILE, DIM)).astype(np.float32)
    asked = random.standard_normal((queries, DIM)).astype(np.float32)
    expected = asked.astype(np.float64) @ vectors[:used].astype(np.float64).T
    np.testing.assert_allclose(products(vectors, used, asked), expected, rtol=0, atol=1e-5)


def test_float32_alone_would_get_close_scores_wrong() -> None:
    """The reference and the search agree where the product in float32 puts two subjects in the wrong order."""
    random = np.random.default_rng(0)
    query = unit(random.standard_normal((1, 512)))
    near = np.repeat(query, 600, axis=0).astype(np.float64)
    near += 1e-4 * random.standard_normal(near.shape)
    vectors = unit(near)
    rough = vectors @ query[0]
    exact = (vectors.astype(np.float64) * query[0].astype(np.float64)).sum(axis=1)
    order = np.argsort(-exact)
    assert np.argsort(-rough).tolist() != order.tolist()
    index, numbers = ExactIndex(512), np.arange(600) + 1
    index.add(numbers, numbers, np.ones(600, np.int32), vectors)
    (answer,) = index.search(query, [20], [None], str)
    assert [template - 1 for _, _, template in answer.best] == order[:20].tolist()


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Make unit rows as they come out of float16."""
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return rows.astype(np.float16).astype(np.float32)
