"""Enrolling in Milvus: which enrolments may be written, and which must be withdrawn once they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pkd.serving.core.errors import REFUSED_ENROLMENT, GalleryConflict, IdempotencyConflict, TooLarge
from pkd.serving.galleries.milvus.commit import enrol, finish_enrolment, finish_removal, plan_removal, remove
from pkd.serving.galleries.milvus.gallery import MilvusGallery
from pkd.serving.galleries.milvus.records import Commit, GalleryRow
from pkd.serving.galleries.store import Enrolled, Enrolment
from pkd.serving.galleries.templates import check_enrolment, unknown_gallery, used_key
from pkd.toolkit.core.errors import PkdError

Answer = Enrolled | PkdError
SURELY_FIT = 1_000
"""Templates of one enrolment, of a few encoders, whose record fits into one row of Milvus. Some more may, too."""


@dataclass
class Written:
    """Hold the enrolments of one request that are in Milvus, to be finished, and what the others are answered."""

    row: GalleryRow
    """The gallery's row as it was when they were written."""
    answers: dict[int, Answer]
    planned: dict[int, tuple[Commit, Enrolment]]
    """Index in the request → what is written."""
    journal: str
    withdrawn: int = 0
    """Number of rows that were written and taken back."""


def write(gallery: MilvusGallery, row: GalleryRow, enrolments: Sequence[Enrolment]) -> Written:
    """Enrol some subjects, but for ``finish``. A NoCollection means that nobody was: it may be done again."""
    cipher, encoders = gallery.cipher, gallery.encoders(row)
    by_key = gallery.by_key(row, _keys(gallery, enrolments))
    earlier = gallery.commits(cipher.subject(one.subject) for one in enrolments)
    latest = {subject: list(commits) for subject, commits in earlier.items()}
    written = Written(row, {}, {}, "")
    for index, one in enumerate(enrolments):
        same_key = by_key[cipher.key(one.key)] if one.key is not None else []
        of_subject = latest.setdefault(cipher.subject(one.subject), [])
        try:
            if same_key:
                written.answers[index] = _replayed(one, same_key)
                continue
            encoders_then = check_enrolment(row.gallery(), one, encoders)
            commit = Commit.new(one, row.retention, of_subject)
            _check_size(gallery, commit)
        except REFUSED_ENROLMENT as refusal:
            written.answers[index] = refusal
            continue
        of_subject.append(commit)
        same_key.append(commit)
        encoders = encoders_then
        written.planned[index] = commit, one
    if written.planned:
        gallery.register(encoders)
        written.journal = enrol(gallery, row, list(written.planned.values()), earlier)
    return written


def finish(gallery: MilvusGallery, now: GalleryRow, written: Written) -> list[Answer]:
    """Finish an enrolment: withdraw what must not stay, and say what was done.

    After a NoCollection this is to be done again, and nothing else.

    ``now``: the gallery's row, read after ``write`` if the gallery was moving then.
    """
    answers, planned = written.answers, written.planned
    if planned:
        if now.id != written.row.id:
            raise unknown_gallery(now.name)
        answers |= {**dict(_used_meanwhile(gallery, now, written)), **dict(_left_meanwhile(now, written))}
        withdrawn = [index for index in planned if index in answers]
        if withdrawn:
            keys = [gallery.cipher.commit_key(planned[index][0]) for index in withdrawn]
            removal = plan_removal(gallery, now, keys)
            finish_removal(gallery, now, removal, remove(gallery, removal))
            written.withdrawn = removal.count[1]
        pseudonyms = {gallery.cipher.subject(commit.subject) for commit, _ in planned.values()}
        finish_enrolment(gallery, now, pseudonyms, written.journal)
        # Whoever sent the same twice in this request was told of the first: that is withdrawn, too.
        lost = {planned[index][0].template_ids: answers[index] for index in withdrawn}
        for index, answer in answers.items():
            if isinstance(answer, Enrolled):
                answers[index] = lost.get(answer.templates, answer)
    for index, (commit, _) in planned.items():
        answers.setdefault(index, Enrolled(commit.subject, commit.template_ids, commit.sequence, False))
    return [answers[index] for index in sorted(answers)]


def replayed(gallery: MilvusGallery, row: GalleryRow, enrolments: Sequence[Enrolment]) -> list[Answer | None]:
    """Return what ``write`` would say to idempotency keys used before, None for others."""
    by_key = gallery.by_key(row, _keys(gallery, enrolments))
    found: list[Answer | None] = []
    for one in enrolments:
        same_key = by_key[gallery.cipher.key(one.key)] if one.key is not None else []
        try:
            found.append(_replayed(one, same_key) if same_key else None)
        except IdempotencyConflict as refusal:
            found.append(refusal)
    return found


def _check_size(gallery: MilvusGallery, commit: Commit) -> None:
    if not gallery.cipher.fits(commit):
        raise TooLarge(
            f"subject {commit.subject}: {len(commit.templates):,} templates are too many for one enrolment in Milvus. "
            f"Send at most {SURELY_FIT:,} at a time.",
            details={"limit": SURELY_FIT},
        )


def _replayed(one: Enrolment, commits: Sequence[Commit]) -> Enrolled:
    """Repeat what the first enrolment with this idempotency key was answered."""
    commit = commits[0]
    if (commit.subject, commit.digest) != (one.subject, one.digest):
        raise used_key(one.key)
    return Enrolled(commit.subject, commit.template_ids, commit.sequence, True)


def _used_meanwhile(gallery: MilvusGallery, now: GalleryRow, written: Written) -> Iterator[tuple[int, Answer]]:
    """Yield those whose idempotency key another process used before they were written: the later one sees it."""
    by_key = gallery.by_key(now, _keys(gallery, [one for _, one in written.planned.values()]))
    ours = {commit.id for commit, _ in written.planned.values()}
    for index, (_, one) in written.planned.items():
        if one.key is not None and any(other.id not in ours for other in by_key[gallery.cipher.key(one.key)]):
            said = f"idempotency key {one.key} is being used by another request at this moment. Send this one again."
            yield index, IdempotencyConflict(said)


def _left_meanwhile(now: GalleryRow, written: Written) -> Iterator[tuple[int, Answer]]:
    """Yield those in a space that the gallery left before they were written: its templates are being deleted."""
    then = written.row
    taken = {space.id for space in now.gallery().spaces if now.tables[space.id] == then.tables.get(space.id)}
    for index, (commit, one) in written.planned.items():
        if not {space for _, space in commit.templates} <= taken:
            yield index, GalleryConflict(f"subject {one.subject}: the migration has ended. Look and try again.")


def _keys(gallery: MilvusGallery, enrolments: Sequence[Enrolment]) -> list[str]:
    return [gallery.cipher.key(one.key) for one in enrolments if one.key is not None]
