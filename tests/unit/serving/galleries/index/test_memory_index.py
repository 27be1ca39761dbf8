"""MemoryIndex: attributes, names and counts follow what is added and removed; threads do not disturb each other."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

from pkd.serving.galleries.index.exact_index import AttributeSets
from pkd.serving.galleries.index.memory_index import MemoryIndex, Rows, template_id
from tests.support.gallery_examples import plain_search, unit


def rows(first: int, count: int, *, encoder: str = "e", subjects: int = 10**6, site: str = "a") -> Rows:
    """Make the templates ``first`` and so on, of subjects ``first % subjects`` and so on."""
    templates = np.arange(first, first + count)
    owners = templates % subjects + 1
    names = [f"s{number:04d}" for number in owners.tolist()]
    return Rows(encoder, templates, owners, names, [{"site": site}], np.zeros(count, np.int64), unit(first, count))


def test_a_subject_stays_as_long_as_one_template_does() -> None:
    sets = AttributeSets()
    index = MemoryIndex(sets=sets)
    index.add(rows(1, 6, subjects=3))
    index.add(rows(7, 3, encoder="f", subjects=3))
    index.remove(np.arange(1, 7))
    assert len(index) == 3
    assert index.search("e", unit(0), 5, None)[0].hits == ()
    assert {hit.subject for hit in index.search("f", unit(0), 5, {"site": "a"})[0].hits} == {"s0001", "s0002", "s0003"}
    index.remove(np.arange(7, 10))
    assert len(index) == 0
    assert index.subjects == len(sets) == 0


def test_attributes_can_change_and_leave_no_trace() -> None:
    sets = AttributeSets()
    index = MemoryIndex(sets=sets)
    index.add(rows(1, 4, subjects=2))
    for site in ("b", "c", "b"):
        index.describe(1, {"site": site})
        assert index.search("e", unit(0), 5, {"site": site})[0].searched == 2
        assert index.search("e", unit(0), 5, {"site": "a"})[0].searched == 2
    index.describe(99, {"site": "nobody's"})
    assert len(sets) == 2
    assert len(sets.allowed({})) <= 4  # numbers are used again


def test_filters_ask_for_all() -> None:
    sets = AttributeSets()
    first, second = sets.hold({"a": "1", "b": "1"}, 2), sets.hold({"a": "1"}, 1)
    none = sets.hold({}, 1)
    assert sets.allowed({"a": "1"}).nonzero()[0].tolist() == [first, second]
    assert sets.allowed({"a": "1", "b": "1"}).nonzero()[0].tolist() == [first]
    assert sets.allowed({"a": "2"}).nonzero()[0].tolist() == []
    assert sets.allowed({}).nonzero()[0].tolist() == [first, second, none]
    sets.release(np.array([first, first], np.int32))
    assert sets.allowed({"b": "1"}).nonzero()[0].tolist() == []
    assert sets.hold({"c": "1"}, 1) == first


def test_contents_tell_whether_two_hold_the_same() -> None:
    one, other = MemoryIndex(), MemoryIndex()
    one.add(rows(1, 5))
    one.add(rows(6, 5))
    other.add(rows(6, 5))
    other.add(rows(1, 5))
    assert one.contents() == other.contents()
    other.remove(np.array([3]))
    assert one.contents() != other.contents()
    swapped = rows(3, 1)
    other.add(replace(swapped, vectors=unit(77)))
    assert one.contents() != other.contents()


def test_searches_are_right_while_templates_come_and_go() -> None:
    """Thirty templates stay; others are added and removed without pause. Answers about the thirty never change."""
    index, steady, stop, wrong = MemoryIndex(), rows(1, 30), threading.Event(), []
    index.add(steady)
    templates = [(f"s{number:04d}", vector) for number, vector in zip(range(2, 32), steady.vectors, strict=True)]
    queries = unit(9, 8)
    expected = [[name for name, _ in plain_search(templates, query, 5)] for query in queries]

    def search() -> None:
        while not stop.is_set():
            for query, names in zip(queries, expected, strict=True):
                (found,) = index.search("e", query[None], 5, {"site": "a"})
                if [hit.subject for hit in found.hits] != names or found.searched != 30:
                    wrong.append(found)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(60):
        index.add(rows(1000 + 100 * i, 100, site="b"))
        if i % 3:
            index.remove(np.arange(1000 + 100 * (i - 1), 1100 + 100 * (i - 1)))
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not wrong


def test_template_ids_are_ordered_as_their_numbers() -> None:
    numbers = [1, 9, 10, 16, 255, 256, 10**9, 2**47]
    assert sorted(map(template_id, numbers)) == [template_id(number) for number in numbers]
