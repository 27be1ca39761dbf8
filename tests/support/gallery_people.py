"""Ask of every GalleryStore what it promises of mappings, and of templates that are removed, moved and mapped."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from pkd.serving.core.errors import GalleryConflict, InvalidRequest, UnknownGallery, UnknownSubject, UnknownTemplate
from pkd.serving.galleries.mapping import map_gallery, worst_first
from pkd.serving.galleries.store import (
    NOTHING_MAPPED,
    Consent,
    Enrolment,
    GalleryStore,
    MapOrigin,
    MappingState,
    NewTemplate,
    Subject,
)
from tests.support.gallery_examples import (
    ALICE,
    BOB,
    ENCODER,
    NEW,
    NEXT,
    OLD,
    STUDENT,
    Floats,
    Open,
    enrolled,
    id_of,
    one,
    refused,
    soon,
    space_map,
    unit,
)


def one_of(subject: Subject, vector: Floats) -> str:
    """Return the id of the template that holds this vector."""
    return next(template.id for template in subject.templates if id_of(template) == vector.tobytes())


class PeopleConformance:
    """Inherited by Conformance, which has the fixtures."""

    # MappingState, and templates that change hands

    def test_what_was_mapped_is_remembered_and_changed_in_one_step(self, store: GalleryStore, opened: Open) -> None:
        assert store.get("staff").mapping == NOTHING_MAPPED
        maps = {NEXT: MapOrigin(old=ENCODER, new="new@sha256:d")}
        made = store.set_mapping("staff", lambda state: state.model_copy(update={"maps": maps}), ALICE)
        assert made.mapping.maps == maps
        store.set_mapping("staff", lambda state: state.model_copy(update={"staged": (NEXT,)}), BOB)
        assert store.get("staff").mapping == MappingState(maps=maps, staged=(NEXT,))
        assert soon(lambda: opened().get("staff").mapping == store.get("staff").mapping)
        with refused(UnknownGallery):
            store.set_mapping("nobody", lambda state: state, ALICE)
        assert store.note("staff", "refuse", "ann", ALICE).sequence > 0

    def test_templates_keep_a_date_that_is_given(self, store: GalleryStore) -> None:
        enrolled(store.enrol("staff", [one("ann", unit(1)[0], created=1e9), one("bo", unit(2)[0])], ALICE))
        assert [template.created for template in store.subject("staff", "ann").templates] == [1e9]
        assert abs(store.subject("staff", "bo").templates[0].created - time.time()) < 60
        store.create("guests", OLD, 1000.0, ALICE)
        enrolled(store.enrol("guests", [one("ann", unit(1)[0], created=4e9)], ALICE))
        assert store.subject("guests", "ann").templates[0].expires == 4e9 + 1000

    def test_single_templates_are_removed(self, store: GalleryStore) -> None:
        vectors = unit(1, 4)
        consent = Consent("contract")
        both = Enrolment("ann", [NewTemplate(ENCODER, OLD.id, vector) for vector in vectors[:2]], {"a": "b"}, consent)
        enrolled(store.enrol("staff", [both], ALICE))
        enrolled(store.enrol("staff", [one("ann", vectors[2]), one("bo", vectors[3])], ALICE))
        ids = {id_of(template): template.id for template in store.subject("staff", "ann", vectors=True).templates}
        receipt = store.remove_templates("staff", "ann", [ids[vectors[0].tobytes()]], ALICE)
        assert (receipt.subject, receipt.templates) == ("ann", 1) and receipt.rows >= 1
        left = store.subject("staff", "ann", vectors=True)
        assert sorted(map(id_of, left.templates)) == sorted(vector.tobytes() for vector in vectors[1:3])
        assert (dict(left.attributes), left.consent) == ({"a": "b"}, consent)
        assert store.search("staff", ENCODER, vectors[:1], 1)[0].searched == 3
        with refused(UnknownTemplate):
            store.remove_templates("staff", "ann", ["none"], ALICE)
        store.remove_templates(
            "staff", "ann", [next(t.id for t in left.templates if id_of(t) == vectors[1].tobytes())], BOB
        )
        again = store.subject("staff", "ann", vectors=True)
        assert (dict(again.attributes), again.consent, len(again.templates)) == ({"a": "b"}, consent, 1)
        store.remove_templates("staff", "ann", [again.templates[0].id], BOB)
        assert list(store.subjects("staff")) == ["bo"]
        assert not store.verify().wrong

    def test_two_subjects_are_merged_and_taken_apart(self, store: GalleryStore) -> None:
        vectors = unit(1, 4)
        later = Enrolment("ann-2", [NewTemplate(ENCODER, OLD.id, vectors[1])], created=1e9, expires=4e9)
        enrolled(store.enrol("staff", [one("ann", vectors[0], attributes={"a": "b"}), later], ALICE))
        moved = store.move("staff", "ann-2", "ann", ALICE)
        assert (moved.subject, moved.into, moved.receipt.templates) == ("ann-2", "ann", 1)
        found = store.subject("staff", "ann", vectors=True)
        assert dict(found.attributes) == {"a": "b"}
        kept = next(template for template in found.templates if id_of(template) == vectors[1].tobytes())
        assert (kept.created, kept.expires) == (1e9, 4e9) and kept.id in moved.templates
        assert list(store.subjects("staff")) == ["ann"]
        assert store.search("staff", ENCODER, vectors[1:2], 1)[0].hits[0].subject == "ann"
        apart = store.move("staff", "ann", "bo", ALICE, templates=[kept.id], new=True)
        assert apart.sequence > moved.sequence
        assert sorted(store.subjects("staff")) == ["ann", "bo"]
        assert len(store.subject("staff", "ann").templates) == len(store.subject("staff", "bo").templates) == 1
        for error, call in (
            (UnknownSubject, lambda: store.move("staff", "ann", "cy", ALICE)),
            (UnknownSubject, lambda: store.move("staff", "cy", "ann", ALICE)),
            (GalleryConflict, lambda: store.move("staff", "ann", "bo", ALICE, new=True)),
            (InvalidRequest, lambda: store.move("staff", "ann", "ann", ALICE)),
            (UnknownTemplate, lambda: store.move("staff", "ann", "bo", ALICE, templates=["none"])),
        ):
            with refused(error):
                call()  # type: ignore[no-untyped-call]
        assert not store.verify().wrong

    def test_mapped_templates_appear_all_at_once_and_are_gone_on_with(self, store: GalleryStore) -> None:
        mapping, vectors = space_map(), unit(1, 7)
        enrolled(
            store.enrol("staff", [one(f"s{i}", vectors[i], created=1e9 + i, expires=4e9) for i in range(6)], ALICE)
        )
        enrolled(store.enrol("staff", [one("student", vectors[6], encoder=STUDENT)], ALICE))
        id, enrol = mapping.info.id, store.enrol

        def dies(*args: Any) -> Any:
            store.enrol = enrol  # type: ignore[method-assign]
            enrol(args[0], args[1][:4], args[2])
            raise KeyboardInterrupt

        store.enrol = dies  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            map_gallery(store, "staff", [mapping], ALICE)
        assert soon(lambda: store.get("staff").templates.get(id) == 4)
        assert store.get("staff").mapping.staged == (id,)
        done = map_gallery(store, "staff", [mapping], ALICE)
        assert (done.templates, done.there_already >= 4, done.unmoved) == (2, True, 1)
        after = store.get("staff")
        assert (after.templates[id], after.mapping.staged, after.mapping.maps[id].old) == (6, (), ENCODER)
        assert map_gallery(store, "staff", [mapping], ALICE).templates == 0
        for i in range(6):
            (made,) = [t for t in store.subject("staff", f"s{i}", vectors=True).templates if t.encoder == id]
            assert (made.created, made.expires) == (1e9 + i, 4e9)
            np.testing.assert_allclose(made.vector, mapping.map(vectors[i : i + 1])[0][0], atol=1e-3)  # type: ignore[arg-type]
        worst = list(worst_first(store, "staff", [mapping]))
        assert len(worst) == 6 and [cosine for *_, cosine in worst] == sorted(cosine for *_, cosine in worst)
        native = mapping.new.id
        enrolled(store.enrol("staff", [one("s0", unit(9)[0], encoder=native, space=NEW)], ALICE))
        assert "s0" not in {subject for subject, *_ in worst_first(store, "staff", [mapping])}
        with refused(GalleryConflict):
            store.end_migration("staff", ALICE)
        store.delete_subject("staff", "student", ALICE)
        store.end_migration("staff", ALICE)
        assert store.get("staff").space == NEW and store.get("staff").templates == {id: 6, native: 1}

    def test_a_check_passes_and_changes_nothing(self, store: GalleryStore) -> None:
        before = store.get("staff")
        store.check()
        assert store.get("staff") == before
