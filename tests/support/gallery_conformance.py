"""What every GalleryStore promises, as tests. A test file subclasses ``Conformance`` and says how to open a store.

Not collected by itself: ``class TestSqlite(Conformance)`` in tests/unit runs all of it against SqliteStore.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pkd.serving.core.errors import (
    GalleryConflict,
    IdempotencyConflict,
    InvalidRequest,
    UnknownGallery,
    UnknownSubject,
)
from pkd.serving.galleries.store import Consent, Enrolled, Enrolment, GalleryStore, NewTemplate, Space
from pkd.toolkit.core.errors import BadVector, PkdError, SpaceMismatch
from tests.support.gallery_examples import (
    ALICE,
    BOB,
    DIM,
    ENCODER,
    NEW,
    NEXT,
    OLD,
    STUDENT,
    Open,
    enrolled,
    one,
    plain_search,
    refused,
    soon,
    unit,
)
from tests.support.gallery_people import PeopleConformance


class Conformance(PeopleConformance):
    """Fixtures ``opened`` (opens a store on the same data each time it is called) and, from it, ``store``."""

    erased = frozenset({"rows", "key"})
    """What a receipt of a deletion covers at least. Milvus: no key, whose row its disks keep for a while."""
    ascending = True
    """Whether subjects are listed by id. Milvus: not, since it must not learn ids, and so cannot sort them."""
    of_one_moment = True
    """Whether an export is. Milvus: each subject is, since it has no snapshots."""

    @pytest.fixture
    def opened(self) -> Iterator[Open]:
        raise NotImplementedError

    @pytest.fixture
    def store(self, opened: Open) -> GalleryStore:
        store = opened()
        store.create("staff", OLD, None, ALICE)
        return store

    # Galleries

    def test_a_gallery_is_created_once(self, store: GalleryStore) -> None:
        made = store.create("guests", OLD, 3600.0, ALICE)
        assert (made.name, made.space, made.moving_to, made.retention) == ("guests", OLD, None, 3600.0)
        assert (made.subjects, dict(made.templates), made.moved) == (0, {}, 0)
        assert abs(made.created - time.time()) < 60
        assert store.create("guests", OLD, 3600.0, BOB) == made
        with refused(GalleryConflict):
            store.create("guests", NEW, 3600.0, ALICE)
        with refused(GalleryConflict):
            store.create("guests", replace(OLD, dim=DIM + 1), 3600.0, ALICE)
        assert [gallery.name for gallery in store.list()] == ["guests", "staff"]

    def test_what_is_not_there_is_named(self, store: GalleryStore) -> None:
        for call in (
            lambda: store.get("nobody"),
            lambda: store.delete("nobody", ALICE),
            lambda: store.enrol("nobody", [one("ann", unit(1)[0])], ALICE),
            lambda: store.subject("nobody", "ann"),
            lambda: store.subjects("nobody"),
            lambda: store.delete_subject("nobody", "ann", ALICE),
            lambda: store.search("nobody", ENCODER, unit(1), 1),
            lambda: store.begin_migration("nobody", NEW, ALICE),
            lambda: store.unmoved("nobody"),
            lambda: store.end_migration("nobody", ALICE),
            lambda: store.export("nobody"),
        ):
            with refused(UnknownGallery) as caught:
                call()  # type: ignore[no-untyped-call]
            assert "nobody" in str(caught.value)
        for call in (lambda: store.subject("staff", "nemo"), lambda: store.delete_subject("staff", "nemo", ALICE)):
            with refused(UnknownSubject) as caught:
                call()  # type: ignore[no-untyped-call]
            assert "nemo" in str(caught.value)

    def test_a_deleted_gallery_is_gone_and_its_name_free(self, store: GalleryStore) -> None:
        enrolled(store.enrol("staff", [one("ann", unit(1)[0]), one("bo", unit(2)[0])], ALICE))
        receipt = store.delete("staff", ALICE)
        assert (receipt.gallery, receipt.subject, receipt.templates) == ("staff", None, 2)
        assert receipt.rows >= 2
        assert self.erased <= set(receipt.covers)
        with refused(UnknownGallery):
            store.search("staff", ENCODER, unit(1), 1)
        assert store.create("staff", NEW, None, ALICE).subjects == 0
        assert store.search("staff", ENCODER, unit(1), 1)[0].hits == ()
        with refused(UnknownSubject):
            store.subject("staff", "ann")

    # Enrolment

    def test_enrolled_templates_are_found_by_id(self, store: GalleryStore) -> None:
        vectors = unit(1, 3)
        consent = Consent("contract", "drawer 3", "2026-01-01T00:00:00Z")
        (answer,) = enrolled(
            store.enrol(
                "staff",
                [
                    Enrolment(
                        "ann",
                        [NewTemplate(ENCODER, OLD.id, vectors[0]), NewTemplate(STUDENT, OLD.id, vectors[1])],
                        {"site": "north"},
                        consent,
                        expires=4e9,
                    )
                ],
                ALICE,
            )
        )
        assert (answer.subject, answer.replayed, len(set(answer.templates))) == ("ann", False, 2)
        found = store.subject("staff", "ann", vectors=True)
        assert (found.id, dict(found.attributes), found.consent) == ("ann", {"site": "north"}, consent)
        assert tuple(template.id for template in found.templates) == answer.templates
        assert [(t.encoder, t.space, t.expires) for t in found.templates] == [
            (ENCODER, OLD.id, 4e9),
            (STUDENT, OLD.id, 4e9),
        ]
        for template, vector in zip(found.templates, vectors, strict=False):
            assert template.vector is not None
            np.testing.assert_array_equal(template.vector, vector)
        assert all(template.vector is None for template in store.subject("staff", "ann").templates)
        gallery = store.get("staff")
        assert (gallery.subjects, dict(gallery.templates)) == (1, {ENCODER: 1, STUDENT: 1})

    def test_a_later_enrolment_adds_and_describes_anew(self, store: GalleryStore) -> None:
        first = one("ann", unit(1)[0], attributes={"site": "north"}, consent=Consent("consent"))
        (before,) = enrolled(store.enrol("staff", [first], ALICE))
        (after,) = enrolled(store.enrol("staff", [one("ann", unit(2)[0])], ALICE))
        assert after.sequence > before.sequence
        found = store.subject("staff", "ann")
        assert len(found.templates) == 2
        assert (dict(found.attributes), found.consent) == ({"site": "north"}, Consent("consent"))
        enrolled(store.enrol("staff", [one("ann", unit(3)[0], attributes={"role": "guard"})], ALICE))
        assert dict(store.subject("staff", "ann").attributes) == {"role": "guard"}
        assert store.search("staff", ENCODER, unit(1), 1, {"site": "north"})[0].searched == 0
        assert store.search("staff", ENCODER, unit(1), 1, {"role": "guard"})[0].searched == 3

    def test_what_is_refused_does_not_keep_out_the_rest(self, store: GalleryStore) -> None:
        good, bad = unit(1)[0], unit(2)[0]
        halves = Enrolment("half", [NewTemplate(ENCODER, OLD.id, good), NewTemplate(ENCODER, NEW.id, bad)])
        answers = store.enrol(
            "staff",
            [
                one("ann", good),
                one("wrong-space", bad, space=NEW),
                one("wrong-size", bad[:-1]),
                one("nan", np.full(DIM, np.nan, np.float32)),
                one("long", bad * 2),
                halves,
                Enrolment("nothing", []),
                one("bo", good),
            ],
            ALICE,
        )
        types = [type(answer) for answer in answers]
        assert types[:2] == [Enrolled, SpaceMismatch]
        assert types[2:5] == [BadVector] * 3
        assert types[5:] == [SpaceMismatch, InvalidRequest, Enrolled]
        assert sorted(store.subjects("staff")) == ["ann", "bo"]

    def test_an_encoder_keeps_to_its_space(self, store: GalleryStore) -> None:
        enrolled(store.enrol("staff", [one("ann", unit(1)[0])], ALICE))
        store.begin_migration("staff", NEW, ALICE)
        (answer,) = store.enrol("staff", [one("ann", unit(1)[0], space=NEW)], ALICE)
        assert isinstance(answer, PkdError)
        assert isinstance(answer, SpaceMismatch)

    def test_an_idempotency_key_enrols_once(self, store: GalleryStore) -> None:
        asked = one("ann", unit(1)[0], key="k1", digest="d1")
        (first,) = enrolled(store.enrol("staff", [asked], ALICE))
        (again,) = enrolled(store.enrol("staff", [asked], ALICE))
        assert again == replace(first, replayed=True)
        other = replace(asked, digest="d2")
        twice = one("bo", unit(2)[0], key="k2", digest="d")
        answers = store.enrol("staff", [other, twice, twice], ALICE)
        assert isinstance(answers[0], PkdError)
        assert isinstance(answers[0], IdempotencyConflict)
        assert [answer.replayed for answer in enrolled(answers[1:])] == [False, True]
        assert store.get("staff").templates == {ENCODER: 2}
        store.create("guests", OLD, None, ALICE)
        assert not enrolled(store.enrol("guests", [asked], ALICE))[0].replayed

    def test_what_was_answered_can_be_asked_without_templates(self, store: GalleryStore) -> None:
        asked = [one("ann", unit(1)[0], key="k1", digest="d1"), one("bo", unit(2)[0], key="k2", digest="d")]
        first, second = enrolled(store.enrol("staff", asked, ALICE))
        bare = [replace(each, templates=()) for each in asked]
        unknown = [one("ann", unit(1)[0], key="k3", digest="d1"), one("ann", unit(1)[0])]
        said = store.replayed("staff", [bare[1], *unknown, replace(bare[0], digest="d2"), bare[0]])
        assert isinstance(said[3], IdempotencyConflict)
        assert [said[0], *said[1:3], said[4]] == [
            replace(second, replayed=True),
            None,
            None,
            replace(first, replayed=True),
        ]
        assert store.replayed("staff", []) == []
        store.delete_subject("staff", "ann", ALICE)
        assert store.replayed("staff", bare[:1]) == [None]
        with pytest.raises(PkdError, match="nobody"):
            store.replayed("nobody", bare)

    def test_four_threads_enrol_at_once(self, store: GalleryStore) -> None:
        vectors, failed = unit(3, 80), []

        def enrol(thread: int) -> None:
            try:
                for i in range(thread * 20, thread * 20 + 20, 2):
                    subjects = [one(f"s{i:02d}", vectors[i]), one("shared", vectors[i + 1])]
                    enrolled(store.enrol("staff", subjects, ALICE))
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=enrol, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert store.get("staff").subjects == 41
        assert len(store.subject("staff", "shared").templates) == 40
        for i in range(0, 80, 2):
            assert store.search("staff", ENCODER, vectors[i : i + 1], 1)[0].hits[0].subject == f"s{i:02d}"

    # Paging and export

    def test_pages_follow_each_other(self, store: GalleryStore) -> None:
        names = sorted(["Zoë", "ann", "bo", "Ångström", "~", "0"])
        enrolled(store.enrol("staff", [one(name, unit(i)[0]) for i, name in enumerate(reversed(names))], ALICE))
        listed = list(store.subjects("staff"))
        assert sorted(listed) == names
        if self.ascending:
            assert listed == names
        names = listed
        assert list(store.subjects("staff", limit=2)) == names[:2]
        assert list(store.subjects("staff", after=names[1], limit=3)) == names[2:5]
        assert list(store.subjects("staff", after=names[-1])) == []

    def test_an_export_is_of_one_moment(self, store: GalleryStore) -> None:
        vectors = unit(1, 30)
        enrolled(store.enrol("staff", [one(f"s{i:02d}", vectors[i], attributes={"n": str(i)}) for i in range(20)], BOB))
        listed = list(store.subjects("staff"))
        assert not self.ascending or listed == sorted(listed)
        export = store.export("staff")
        first = next(export)
        enrolled(store.enrol("staff", [one("s05", vectors[21]), one("s99", vectors[22])], ALICE))
        store.delete_subject("staff", "s19", ALICE)
        subjects = [first, *export]
        if not self.of_one_moment:
            subjects = [subject for subject in subjects if subject.id not in ("s05", "s19", "s99")]
            listed = [subject for subject in listed if subject not in ("s05", "s19")]
        assert [subject.id for subject in subjects] == listed
        for subject in subjects:
            i = int(subject.id[1:])
            assert dict(subject.attributes) == {"n": str(i)}
            (template,) = subject.templates
            assert template.vector is not None
            np.testing.assert_array_equal(template.vector, vectors[i])

    # Search

    def test_a_search_is_exact(self, store: GalleryStore) -> None:
        vectors = unit(5, 120)
        vectors[60:70] = vectors[0]  # ties
        templates = [(f"s{i % 40:02d}", vectors[i]) for i in range(120)]
        store.enrol("staff", [one(subject, vector) for subject, vector in templates], ALICE)
        store.enrol("staff", [one(f"s{i:02d}", unit(900 + i)[0], encoder=STUDENT) for i in range(5)], ALICE)
        owned = {subject: store.subject("staff", subject).templates for subject in {name for name, _ in templates}}
        queries = np.concatenate([unit(6, 5), vectors[:2]])
        for top_k in (1, 3, 50):
            for query, found in zip(queries, store.search("staff", ENCODER, queries, top_k), strict=True):
                expected = plain_search(templates, query, top_k)
                assert [hit.subject for hit in found.hits] == [subject for subject, _ in expected]
                scores = [score for _, score in expected]
                np.testing.assert_allclose([hit.score for hit in found.hits], scores, atol=1e-6)
                assert found.searched == 120
                for hit in found.hits:
                    assert hit.template in {template.id for template in owned[hit.subject]}

    def test_encoders_are_searched_apart(self, store: GalleryStore) -> None:
        vector = unit(1)[0]
        store.enrol("staff", [one("ann", vector), one("bo", vector, encoder=STUDENT)], ALICE)
        (found,) = store.search("staff", STUDENT, vector[None], 5)
        assert [hit.subject for hit in found.hits] == ["bo"]
        (found,) = store.search("staff", "none@sha256:0", vector[None], 5)
        assert (found.hits, found.searched) == ((), 0)

    def test_a_filter_asks_for_all_attributes(self, store: GalleryStore) -> None:
        vectors = unit(7, 60)
        described = [{"site": "ab"[i % 2], "floor": str(i % 3)} for i in range(60)]
        store.enrol("staff", [one(f"s{i:02d}", vectors[i], attributes=described[i]) for i in range(60)], ALICE)
        for where in ({"site": "a"}, {"site": "b", "floor": "2"}, {"site": "c"}, {"colour": "red"}, {}):
            templates = [
                (f"s{i:02d}", vectors[i]) for i in range(60) if all(described[i].get(k) == v for k, v in where.items())
            ]
            (found,) = store.search("staff", ENCODER, unit(8), 10, where)
            assert [hit.subject for hit in found.hits] == [name for name, _ in plain_search(templates, unit(8)[0], 10)]
            assert found.searched == len(templates)

    # Deletion

    def test_a_deleted_subject_leaves_nothing(self, store: GalleryStore) -> None:
        vectors = unit(1, 3)
        asked = one("ann", vectors[0], key="k", digest="d")
        enrolled(store.enrol("staff", [asked, one("ann", vectors[1]), one("bo", vectors[2])], ALICE))
        receipt = store.delete_subject("staff", "ann", ALICE)
        assert (receipt.gallery, receipt.subject, receipt.templates) == ("staff", "ann", 2)
        assert receipt.rows >= 3  # the key, too
        assert self.erased <= set(receipt.covers)
        assert len(bytes.fromhex(receipt.hash)) == 32
        with refused(UnknownSubject):
            store.subject("staff", "ann")
        assert [hit.subject for hit in store.search("staff", ENCODER, vectors[:1], 5)[0].hits] == ["bo"]
        assert store.get("staff").subjects == 1
        assert store.get("staff").templates == {ENCODER: 1}
        assert store.delete_subject("staff", "bo", ALICE).sequence > receipt.sequence

    def test_a_key_of_a_deleted_subject_does_not_claim_that_they_are_there(self, store: GalleryStore) -> None:
        asked = one("ann", unit(1)[0], key="k", digest="d")
        store.enrol("staff", [asked], ALICE)
        store.delete_subject("staff", "ann", ALICE)
        (answer,) = store.enrol("staff", [asked], ALICE)
        there = list(store.subjects("staff")) == ["ann"]
        assert there == (isinstance(answer, Enrolled) and not answer.replayed)

    def test_a_subject_who_comes_back_is_new(self, store: GalleryStore) -> None:
        enrolled(store.enrol("staff", [one("ann", unit(1)[0], attributes={"site": "a"})], ALICE))
        store.delete_subject("staff", "ann", ALICE)
        enrolled(store.enrol("staff", [one("ann", unit(2)[0])], ALICE))
        found = store.subject("staff", "ann", vectors=True)
        assert dict(found.attributes) == {}
        assert len(found.templates) == 1
        assert store.search("staff", ENCODER, unit(2), 1)[0].hits[0].score == pytest.approx(1.0, abs=1e-3)

    # Time

    def test_templates_expire_when_their_time_has_come(self, store: GalleryStore) -> None:
        now = time.time()
        store.create("guests", OLD, 1000.0, ALICE)
        enrolled(
            store.enrol(
                "guests",
                [one("ann", unit(1)[0]), one("ann", unit(2)[0], expires=now + 5000), one("bo", unit(3)[0])],
                BOB,
            )
        )
        enrolled(store.enrol("staff", [one("cy", unit(4)[0]), one("di", unit(5)[0], expires=now + 10)], ALICE))
        assert store.expire(now) == 0
        assert store.expire(now - 1e6) == 0
        assert store.expire(now + 11) == 1
        assert list(store.subjects("staff")) == ["cy"]
        assert store.expire(now + 1100) == 2
        assert list(store.subjects("guests")) == ["ann"]
        assert [hit.subject for hit in store.search("guests", ENCODER, unit(1), 9)[0].hits] == ["ann"]
        assert store.search("guests", ENCODER, unit(1), 9)[0].searched == 1
        assert store.expire(now + 1e9) == 1
        assert list(store.subjects("staff")) == ["cy"]

    # Idempotency keys

    def test_a_key_is_remembered_as_long_as_a_template_is_there(self, store: GalleryStore) -> None:
        def send(key: str, space: Space = OLD, expires: float | None = None) -> Enrolled:
            encoder = ENCODER if space == OLD else NEXT
            asked = one("ann", unit(7)[0], encoder=encoder, space=space, key=key, digest="d", expires=expires)
            (known,) = store.replayed("staff", [asked])
            (answer,) = enrolled(store.enrol("staff", [asked], ALICE))
            assert bool(known) == answer.replayed
            return answer

        first = send("k")
        late = send("late", expires=1e9)
        assert send("k") == replace(first, replayed=True)
        store.begin_migration("staff", NEW, ALICE)
        moved = send("moved", NEW)
        assert send("moved", NEW).replayed
        store.end_migration("staff", ALICE, abandon=True)
        assert send("k").replayed and send("late", expires=1e9).replayed
        store.expire(2e9)
        assert send("k").replayed
        assert not send("late", expires=4e9).replayed
        store.begin_migration("staff", NEW, ALICE)
        again = send("moved", NEW)  # what it had enrolled was abandoned
        assert not again.replayed and set(again.templates).isdisjoint({*moved.templates, *late.templates})
        assert store.get("staff").moved == 1

    # Migration

    def test_a_migration_moves_every_subject_before_it_ends(self, store: GalleryStore) -> None:
        vectors = unit(1, 6)
        enrolled(store.enrol("staff", [one(f"s{i}", vectors[i]) for i in range(3)], ALICE))
        with refused(GalleryConflict):
            store.end_migration("staff", ALICE)
        with refused(GalleryConflict):
            store.unmoved("staff")
        with refused(GalleryConflict):
            store.begin_migration("staff", OLD, ALICE)
        moving = store.begin_migration("staff", NEW, ALICE)
        assert (moving.space, moving.moving_to, moving.moved) == (OLD, NEW, 0)
        assert store.begin_migration("staff", NEW, ALICE) == moving
        with refused(GalleryConflict):
            store.begin_migration("staff", Space("third@sha256:3", DIM), ALICE)
        listed = list(store.unmoved("staff"))
        assert listed == list(store.subjects("staff"))
        assert sorted(listed) == ["s0", "s1", "s2"]
        assert list(store.unmoved("staff", after=listed[0], limit=1)) == listed[1:2]
        enrolled(store.enrol("staff", [one("s1", vectors[4], encoder=NEXT, space=NEW)], ALICE))
        assert store.get("staff").moved == 1
        assert list(store.unmoved("staff")) == [subject for subject in listed if subject != "s1"]
        assert len(store.search("staff", ENCODER, vectors[:1], 9)[0].hits) == 3  # both answer
        assert [hit.subject for hit in store.search("staff", NEXT, vectors[4:5], 9)[0].hits] == ["s1"]
        with refused(GalleryConflict):
            store.end_migration("staff", ALICE)
        store.delete_subject("staff", "s2", ALICE)
        enrolled(store.enrol("staff", [one("s0", vectors[3], encoder=NEXT, space=NEW)], ALICE))
        moved = store.end_migration("staff", ALICE)
        assert (moved.templates, moved.receipt.templates, moved.receipt.subject) == (2, 2, None)
        after = store.get("staff")
        assert (after.space, after.moving_to, after.moved, dict(after.templates)) == (NEW, None, 0, {NEXT: 2})
        assert store.search("staff", ENCODER, vectors[:1], 9)[0].hits == ()
        assert len(store.search("staff", NEXT, vectors[:1], 9)[0].hits) == 2
        (answer,) = store.enrol("staff", [one("s0", vectors[0])], ALICE)
        assert isinstance(answer, PkdError)

    def test_an_abandoned_migration_leaves_what_was(self, store: GalleryStore) -> None:
        vectors = unit(1, 4)
        enrolled(store.enrol("staff", [one("ann", vectors[0])], ALICE))
        store.begin_migration("staff", NEW, ALICE)
        enrolled(store.enrol("staff", [one("ann", vectors[1], encoder=NEXT, space=NEW)], ALICE))
        enrolled(store.enrol("staff", [one("bo", vectors[2], encoder=NEXT, space=NEW)], ALICE))
        with refused(GalleryConflict):
            store.end_migration("staff", ALICE, abandon=True)  # bo would be left without a template
        store.delete_subject("staff", "bo", ALICE)
        assert store.end_migration("staff", ALICE, abandon=True).templates == 1
        after = store.get("staff")
        assert (after.space, after.moving_to, dict(after.templates)) == (OLD, None, {ENCODER: 1})
        store.begin_migration("staff", NEW, ALICE)

    def test_spaces_of_a_migration_may_differ_in_size(self, store: GalleryStore) -> None:
        wide = Space("wide@sha256:4", 2 * DIM)
        enrolled(store.enrol("staff", [one("ann", unit(1)[0])], ALICE))
        store.begin_migration("staff", wide, ALICE)
        vector = unit(2, dim=2 * DIM)
        enrolled(store.enrol("staff", [one("ann", vector[0], encoder=NEXT, space=wide)], ALICE))
        assert store.search("staff", NEXT, vector, 1)[0].hits[0].subject == "ann"
        store.end_migration("staff", ALICE)
        assert store.get("staff").space == wide

    # Several processes, and staying power

    def test_what_one_store_acknowledged_the_other_answers_by(self, store: GalleryStore, opened: Open) -> None:
        other, vectors = opened(), unit(1, 3)
        enrolled(store.enrol("staff", [one("ann", vectors[0], attributes={"site": "a"})], ALICE))
        assert soon(lambda: len(other.search("staff", ENCODER, vectors[:1], 5)[0].hits) == 1)
        enrolled(other.enrol("staff", [one("bo", vectors[1]), one("ann", vectors[2], attributes={"site": "b"})], ALICE))
        assert soon(lambda: store.search("staff", ENCODER, vectors[:1], 5)[0].searched == 3)
        assert soon(lambda: store.search("staff", ENCODER, vectors[:1], 5, {"site": "b"})[0].searched == 2)
        assert store.search("staff", ENCODER, vectors[:1], 5, {"site": "a"})[0].searched == 0
        store.delete_subject("staff", "ann", ALICE)
        assert soon(lambda: [h.subject for h in other.search("staff", ENCODER, vectors[:1], 5)[0].hits] == ["bo"])
        other.create("guests", OLD, None, BOB)
        assert soon(lambda: "guests" in [gallery.name for gallery in store.list()])
        assert store.search("guests", ENCODER, vectors[:1], 5)[0].hits == ()
        store.delete("staff", ALICE)
        with refused(UnknownGallery):
            soon(lambda: bool(other.search("staff", ENCODER, vectors[:1], 5)) and False)

    def test_a_store_opened_again_has_everything(self, store: GalleryStore, opened: Open) -> None:
        asked = one("ann", unit(1)[0], attributes={"site": "a"}, key="k", digest="d")
        (answer,) = enrolled(store.enrol("staff", [asked], ALICE))
        store.begin_migration("staff", NEW, ALICE)
        before, subject = store.get("staff"), store.subject("staff", "ann")
        store.close()
        again = opened()
        assert (again.get("staff"), again.subject("staff", "ann")) == (before, subject)
        assert enrolled(again.enrol("staff", [asked], ALICE)) == [replace(answer, replayed=True)]
        (found,) = again.search("staff", ENCODER, unit(1), 1, {"site": "a"})
        assert found.hits[0].template == answer.templates[0]
