"""Enrolling in Milvus: which enrolments may be written, and which must be taken back once they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pkd.serving.core.errors import REFUSED_ENROLMENT, GalleryConflict, IdempotencyConflict, InvalidRequest, TooLarge
from pkd.serving.galleries.milvus.collection import MilvusGallery
from pkd.serving.galleries.milvus.records import Commit, Entry
from pkd.serving.galleries.store import Enrolled, Enrolment
from pkd.serving.galleries.templates import check, unknown_gallery
from pkd.toolkit.core.errors import PkdError

Answer = Enrolled | PkdError
Planned = dict[int, tuple[Commit, Enrolment]]
"""Place in the request → what is to be written."""
SURELY_FIT = 1_000
"""Templates of one enrolment, of a few encoders, whose record fits into one row of Milvus. Some more may, too."""


@dataclass
class Written:
    """Enrolments of one request that are in Milvus, to be finished; and what the others are answered."""

    entry: Entry
    """As it was when they were written."""
    answers: dict[int, Answer]
    planned: Planned
    journal: str
    withdrawn: int = 0
    """Rows of those that were written and taken back."""


def write(gallery: MilvusGallery, entry: Entry, enrolments: Sequence[Enrolment]) -> Written:
    """Enrol some subjects, but for ``finish``. A NoTable means that nobody was enrolled, so it may be done again."""
    seal, encoders = gallery.seal, gallery.encoders(entry)
    by_key = gallery.by_key(entry, _keys(gallery, enrolments))
    earlier = gallery.commits(seal.subject(one.subject) for one in enrolments)
    latest = {subject: list(commits) for subject, commits in earlier.items()}
    written = Written(entry, {}, {}, "")
    for place, one in enumerate(enrolments):
        same_key = by_key[seal.key(one.key)] if one.key is not None else []
        of_subject = latest.setdefault(seal.subject(one.subject), [])
        try:
            if same_key:
                written.answers[place] = _answered(one, same_key)
                continue
            _check(entry, one, encoders)
            commit = Commit.new(one, entry.retention, of_subject)
            _check_size(gallery, commit)
        except REFUSED_ENROLMENT as refusal:
            written.answers[place] = refusal
            continue
        of_subject.append(commit)
        same_key.append(commit)
        encoders.update({template.encoder: template.space for template in one.templates})
        written.planned[place] = commit, one
    if written.planned:
        gallery.register(encoders)
        written.journal = gallery.insert(entry, list(written.planned.values()), earlier)
    return written


def finish(gallery: MilvusGallery, now: Entry, written: Written) -> list[Answer]:
    """Withdraw what must not stay, and say what was done. After a NoTable it is to be done again, and nothing else.

    ``now``: the gallery's row, read after ``write`` if the gallery was moving then.
    """
    answers, planned = written.answers, written.planned
    if planned:
        if now.id != written.entry.id:
            raise unknown_gallery(now.name)
        answers |= {**dict(_used_meanwhile(gallery, now, written)), **dict(_left_meanwhile(now, written))}
        withdrawn = [place for place in planned if place in answers]
        if withdrawn:
            rows = [gallery.row(planned[place][0]) for place in withdrawn]
            removal = gallery.removal(now, rows)
            gallery.remove(now, removal)
            written.withdrawn = removal.count[1]
        gallery.settle(now, {gallery.seal.subject(commit.subject) for commit, _ in planned.values()})
        gallery.cross_out(written.journal)
        # Whoever sent the same twice in this request was told of the first: that is withdrawn, too.
        lost = {planned[place][0].template_ids: answers[place] for place in withdrawn}
        for place, answer in answers.items():
            if isinstance(answer, Enrolled):
                answers[place] = lost.get(answer.templates, answer)
    for place, (commit, _) in planned.items():
        answers.setdefault(place, Enrolled(commit.subject, commit.template_ids, commit.sequence, False))
    return [answers[place] for place in sorted(answers)]


def answered(gallery: MilvusGallery, entry: Entry, enrolments: Sequence[Enrolment]) -> list[Answer | None]:
    """What ``write`` would say to idempotency keys used before, None for others."""
    by_key = gallery.by_key(entry, _keys(gallery, enrolments))
    found: list[Answer | None] = []
    for one in enrolments:
        same_key = by_key[gallery.seal.key(one.key)] if one.key is not None else []
        try:
            found.append(_answered(one, same_key) if same_key else None)
        except IdempotencyConflict as refusal:
            found.append(refusal)
    return found


def _check(entry: Entry, one: Enrolment, encoders: dict[str, str]) -> None:
    if not one.templates:
        raise InvalidRequest(f"subject {one.subject}: no template was given. Send at least one.")
    described, encoders = entry.gallery(), dict(encoders)
    for template in one.templates:
        check(described, template, encoders)
        encoders[template.encoder] = template.space


def _check_size(gallery: MilvusGallery, commit: Commit) -> None:
    if not gallery.seal.fits(commit):
        raise TooLarge(
            f"subject {commit.subject}: {len(commit.templates):,} templates are too many for one enrolment in Milvus. "
            f"Send at most {SURELY_FIT:,} at a time.",
            details={"limit": SURELY_FIT},
        )


def _answered(one: Enrolment, commits: Sequence[Commit]) -> Enrolled:
    """What the first enrolment with this idempotency key was answered; an idempotency-conflict if it was another."""
    commit = commits[0]
    if (commit.subject, commit.digest) != (one.subject, one.digest):
        raise IdempotencyConflict(
            f"idempotency key {one.key} was used for another request. Use a new key for a new request."
        )
    return Enrolled(commit.subject, commit.template_ids, commit.sequence, True)


def _used_meanwhile(gallery: MilvusGallery, now: Entry, written: Written) -> Iterator[tuple[int, Answer]]:
    """Those whose idempotency key another process used before they were written: at least the later one sees it."""
    by_key = gallery.by_key(now, _keys(gallery, [one for _, one in written.planned.values()]))
    ours = {commit.id for commit, _ in written.planned.values()}
    for place, (_, one) in written.planned.items():
        if one.key is not None and any(other.id not in ours for other in by_key[gallery.seal.key(one.key)]):
            yield (
                place,
                IdempotencyConflict(
                    f"idempotency key {one.key} is being used by another request at this moment. Send this one again."
                ),
            )


def _left_meanwhile(now: Entry, written: Written) -> Iterator[tuple[int, Answer]]:
    """Those in a space that the gallery left before they were written: its templates are being deleted."""
    then = written.entry
    taken = {space.id for space in now.gallery().spaces if now.tables[space.id] == then.tables.get(space.id)}
    for place, (commit, one) in written.planned.items():
        if not {space for _, space in commit.templates} <= taken:
            yield (
                place,
                GalleryConflict(f"subject {one.subject}: the migration has ended. Look and try again."),
            )


def _keys(gallery: MilvusGallery, enrolments: Sequence[Enrolment]) -> list[str]:
    return [gallery.seal.key(one.key) for one in enrolments if one.key is not None]
