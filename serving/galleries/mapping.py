"""Map a gallery's templates into a new teacher's space: a migration for which nobody is photographed.

The mapped templates are those of an encoder of their own (toolkit/encoders/space_map.py) in the gallery's second space.
Until all are there that encoder is *staged*, and no search sees it; then one change of the gallery shows all of them.
A process that dies leaves whole subjects: the same call again skips what is there, bit for bit, and goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pkd.serving.core.errors import GalleryConflict
from pkd.serving.galleries.store import (
    Enrolment,
    Gallery,
    GalleryStore,
    MapOrigin,
    MappingState,
    NewTemplate,
    Space,
    Subject,
    Template,
)
from pkd.serving.galleries.templates import fingerprint
from pkd.toolkit.core.encoder_info import short
from pkd.toolkit.core.errors import PkdError
from pkd.toolkit.encoders.space_map import SpaceMap

BATCH = 512
"""Subjects that are mapped and stored together."""


@dataclass
class Mapped:
    """Count what a mapping did. ``unmoved``: subjects of whom no template is mapped, 1,000 at most."""

    subjects: int = 0
    templates: int = 0
    there_already: int = 0
    unmoved: int = 0


def map_gallery(
    store: GalleryStore,
    name: str,
    maps: Sequence[SpaceMap],
    actor: str,
    advance: Callable[[int], None] = lambda done: None,
) -> Mapped:
    """Add to every subject the mapped templates that they lack, then show all of them at once.

    Who is enrolled meanwhile is mapped, too. The migration is begun, not ended: both spaces answer. Raises
    GalleryConflict where the gallery has another space than the maps' old encoders, or moves elsewhere.
    """
    by_old, ids = {one.old.id: one for one in maps}, {one.info.id: one for one in maps}
    (new,) = {(one.new.space.id, one.new.space.dim) for one in maps}
    gallery = store.get(name)
    check_spaces(gallery, maps)
    if gallery.space.id != new[0]:
        gallery = store.begin_migration(name, Space(*new), actor)
    origins = {id: MapOrigin(old=one.old.id, new=one.new.id) for id, one in ids.items()}
    fresh = [id for id in ids if not gallery.templates.get(id) and id not in gallery.mapping.maps]
    if fresh:
        store.set_mapping(
            name,
            lambda state: state.model_copy(
                update={
                    "maps": {**state.maps, **{id: origins[id] for id in fresh}},
                    "staged": (*state.staged, *(id for id in fresh if id not in state.staged)),
                }
            ),
            actor,
        )
    done, again = Mapped(), True
    while again:
        before = done.templates
        for subjects in _batches(store.export(name), BATCH):
            _map_some(store, name, subjects, by_old, actor, done)
            advance(len(subjects))
        counts = store.get(name).templates
        behind = any(counts.get(id, 0) < counts.get(one.old.id, 0) for id, one in ids.items())
        again = behind and done.templates > before  # until nobody was enrolled while the others were mapped
        advance = _nothing
    if gallery.moving_to is not None:
        done.unmoved = len(store.unmoved(name, limit=1000))
    store.set_mapping(name, lambda state: _shown(state, ids), actor)
    return done


def check_spaces(gallery: Gallery, maps: Sequence[SpaceMap]) -> None:
    """Raise GalleryConflict unless the maps lead from the gallery's space to the one that it moves to, or may."""
    spaces = {one.new.space.id for one in maps}
    if len(spaces) > 1:
        raise GalleryConflict("the maps lead into different spaces. Give maps into one.")
    (target,) = spaces
    for one in maps:
        if one.old.space.id != gallery.space.id and target != gallery.space.id:
            raise GalleryConflict(
                f"gallery {gallery.name} has templates of {short(gallery.space.id)}, and the map is for those of "
                f"{short(one.old.space.id)}. Fit one for the gallery's encoder."
            )
    if gallery.moving_to is not None and gallery.moving_to.id != target:
        raise GalleryConflict(
            f"gallery {gallery.name} moves to {short(gallery.moving_to.id)} already. End or abandon that first."
        )


def worst_first(store: GalleryStore, name: str, maps: Sequence[SpaceMap]) -> Iterator[tuple[str, str, float]]:
    """Yield subjects whom only mapped templates stand for, with the template's id and its expected cosine, worst first.

    The cosine is the one expected between the mapped and the native template (SpaceMap): whose is smallest is missed
    most, and gains most by being photographed again. A subject counts by their best template.
    """
    ids, found = {one.info.id: one for one in maps}, []
    for subject in store.export(name):
        native = any(template.encoder == one.new.id for template in subject.templates for one in maps)
        mapped = [template for template in subject.templates if template.encoder in ids]
        if native or not mapped:
            continue
        expected = [float(ids[one.encoder].expected_cosine(_rows([one]))[0]) for one in mapped]
        best = max(range(len(mapped)), key=lambda i: (expected[i], mapped[i].id))
        found.append((subject.id, mapped[best].id, expected[best]))
    yield from sorted(found, key=lambda one: (one[2], one[0]))


def replaced(state: MappingState, subject: Subject, encoders: Sequence[str]) -> list[str]:
    """List the mapped templates of a subject that templates of these encoders, enrolled now, make needless."""
    return [one.id for one in subject.templates if (origin := state.maps.get(one.encoder)) and origin.new in encoders]


def _map_some(
    store: GalleryStore,
    name: str,
    subjects: Sequence[Subject],
    by_old: Mapping[str, SpaceMap],
    actor: str,
    done: Mapped,
) -> None:
    wanted: dict[str, list[tuple[Subject, Template]]] = defaultdict(list)
    for subject in subjects:
        if any(one.encoder == each.new.id for one in subject.templates for each in by_old.values()):
            continue  # has a native template already
        for template in subject.templates:
            if template.encoder in by_old:
                wanted[template.encoder].append((subject, template))
    coming: dict[tuple[str, float, float | None], list[NewTemplate]] = defaultdict(list)
    there = {subject.id: {fingerprint(one) for one in subject.templates} for subject in subjects}
    for encoder, pairs in wanted.items():
        mapping = by_old[encoder]
        id, space = mapping.info.id, mapping.new.space.id
        vectors = mapping.templates(_rows([template for _, template in pairs]))
        for (subject, template), vector in zip(pairs, vectors, strict=True):
            made = NewTemplate(id, space, vector)
            if fingerprint(made) in there[subject.id]:
                done.there_already += 1
            else:
                coming[subject.id, template.created, template.expires].append(made)
    enrolments = [
        Enrolment(subject, templates, created=created, expires=expires, action="map")
        for (subject, created, expires), templates in coming.items()
    ]
    for enrolment, answer in zip(enrolments, store.enrol(name, enrolments, actor) if enrolments else (), strict=True):
        if isinstance(answer, PkdError):
            raise answer
        done.templates += len(enrolment.templates)
    done.subjects += len({enrolment.subject for enrolment in enrolments})


def _rows(templates: Sequence[Template]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Stack templates as they are searched: of unit length, whatever 16-bit floats took from it."""
    rows = np.stack([np.asarray(one.vector, np.float64) for one in templates])
    unit: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _shown(state: MappingState, ids: Mapping[str, SpaceMap]) -> MappingState:
    return state.model_copy(update={"staged": tuple(id for id in state.staged if id not in ids)})


def _batches(subjects: Iterator[Subject], size: int) -> Iterator[list[Subject]]:
    while some := list(islice(subjects, size)):
        yield some


def _nothing(done: int) -> None:
    """Take no notice: later rounds see everybody again."""
