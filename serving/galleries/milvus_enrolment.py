"""Enrolling in Milvus: which enrolments may be written, and which must be taken back once they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pkd.serving.galleries.enrolment import check
from pkd.serving.galleries.gallery import Enrolled, Enrolment, Space
from pkd.serving.galleries.milvus_gallery import MilvusGallery
from pkd.serving.galleries.milvus_rows import Commit, Entry
from pkd.serving.problems import Problem

Answer = Enrolled | Problem
Planned = dict[int, tuple[Commit, Enrolment]]
"""Place in the request → what is to be written."""


def enrol(
    gallery: MilvusGallery, entry: Entry, enrolments: Sequence[Enrolment], spaces: Callable[[], Sequence[Space]]
) -> list[Answer]:
    """Enrol some subjects; an answer in the place of each. ``spaces``: those that the gallery takes, read anew."""
    seal, encoders = gallery.seal, gallery.encoders(entry)
    by_key = gallery.by_key(_keys(gallery, enrolments))
    earlier = gallery.commits(seal.subject(one.subject) for one in enrolments)
    latest = {subject: list(commits) for subject, commits in earlier.items()}
    done: dict[int, Answer] = {}
    planned: Planned = {}
    for place, one in enumerate(enrolments):
        same_key = by_key[seal.key(one.key)] if one.key is not None else []
        try:
            if same_key:
                done[place] = _answered(one, same_key)
                continue
            _check(entry, one, encoders)
        except Problem as problem:
            done[place] = problem
            continue
        of_subject = latest.setdefault(seal.subject(one.subject), [])
        commit = Commit.new(one, entry.retention, of_subject)
        of_subject.append(commit)
        same_key.append(commit)
        encoders.update({template.encoder: template.space for template in one.templates})
        planned[place] = commit, one
    if planned:
        gallery.register(encoders)
        gallery.insert(entry, list(planned.values()), earlier)
        refused = {**dict(_used_meanwhile(gallery, planned)), **dict(_left_meanwhile(entry, planned, spaces))}
        gallery.remove(entry, [planned[place][0] for place in refused]) if refused else None
        done |= refused
    for place, (commit, _) in planned.items():
        done.setdefault(place, Enrolled(commit.subject, commit.template_ids, commit.sequence, False))
    return [done[place] for place in range(len(enrolments))]


def answered(gallery: MilvusGallery, enrolments: Sequence[Enrolment]) -> list[Answer | None]:
    """What ``enrol`` would say to idempotency keys used before, None for others."""
    by_key = gallery.by_key(_keys(gallery, enrolments))
    found: list[Answer | None] = []
    for one in enrolments:
        same_key = by_key[gallery.seal.key(one.key)] if one.key is not None else []
        try:
            found.append(_answered(one, same_key) if same_key else None)
        except Problem as problem:
            found.append(problem)
    return found


def _check(entry: Entry, one: Enrolment, encoders: dict[str, str]) -> None:
    if not one.templates:
        raise Problem("invalid-request", f"subject {one.subject}: no template was given. Send at least one.")
    described, encoders = entry.gallery(), dict(encoders)
    for template in one.templates:
        check(described, template, encoders)
        encoders[template.encoder] = template.space


def _answered(one: Enrolment, commits: Sequence[Commit]) -> Enrolled:
    """What the first enrolment with this idempotency key was answered; an idempotency-conflict if it was another."""
    commit = commits[0]
    if (commit.subject, commit.digest) != (one.subject, one.digest):
        raise Problem(
            "idempotency-conflict",
            f"idempotency key {one.key} was used for another request. Use a new key for a new request.",
        )
    return Enrolled(commit.subject, commit.template_ids, commit.sequence, True)


def _used_meanwhile(gallery: MilvusGallery, planned: Planned) -> Iterator[tuple[int, Answer]]:
    """Those whose idempotency key another process used before they were written: at least the later one sees it."""
    by_key = gallery.by_key(_keys(gallery, [one for _, one in planned.values()]))
    ours = {commit.id for commit, _ in planned.values()}
    for place, (_, one) in planned.items():
        others = (
            [] if one.key is None else [other for other in by_key[gallery.seal.key(one.key)] if other.id not in ours]
        )
        if others:
            yield (
                place,
                Problem(
                    "idempotency-conflict",
                    f"idempotency key {one.key} is being used by another request at this moment. Send this one again.",
                ),
            )


def _left_meanwhile(
    entry: Entry, planned: Planned, spaces: Callable[[], Sequence[Space]]
) -> Iterator[tuple[int, Answer]]:
    """Those in a space that the gallery left before they were written: its templates are being deleted."""
    if entry.moving_to is None:
        return
    taken = {space.id for space in spaces()}
    for place, (commit, one) in planned.items():
        if not {space for _, space in commit.templates} <= taken:
            yield (
                place,
                Problem("gallery-conflict", f"subject {one.subject}: the migration has ended. Look and try again."),
            )


def _keys(gallery: MilvusGallery, enrolments: Sequence[Enrolment]) -> list[str]:
    return [gallery.seal.key(one.key) for one in enrolments if one.key is not None]
