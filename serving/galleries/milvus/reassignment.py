"""Taking some templates from a subject in Milvus: a commit is never rewritten, so those that stay are enrolled anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pkd.serving.galleries.milvus.gallery import MilvusGallery
from pkd.serving.galleries.milvus.records import GalleryRow, current
from pkd.serving.galleries.store import Enrolment
from pkd.serving.galleries.templates import choose_templates, enrolments_again, unknown_subject


@dataclass(frozen=True)
class Reassignment:
    """Say what is enrolled again, and which commits go then, so that these templates are gone and nothing else."""

    again: Sequence[Enrolment]
    commits: Sequence[str]
    """Keys of their rows."""
    removed: int
    last: bool
    """True: no template is left, and the subject goes as a whole."""

    @classmethod
    def plan(cls, gallery: MilvusGallery, row: GalleryRow, subject: str, templates: Sequence[str]) -> Reassignment:
        """Plan it. Raises UnknownSubject or UnknownTemplate."""
        pseudonym = gallery.cipher.subject(subject)
        commits = gallery.commits([pseudonym], "strong").get(pseudonym, [])
        found = next(gallery.subjects(row, [pseudonym], vectors=True), None)
        if found is None:
            raise unknown_subject(row.name, subject)
        chosen = {one.id for one in choose_templates(row.name, found, templates)}
        touched = {id.split(".")[0] for id in chosen}
        left = [commit for commit in commits if commit.id not in touched]
        staying = [one for one in found.templates if one.id.split(".")[0] in touched and one.id not in chosen]
        if left and not staying and current(left) != (found.attributes, found.consent):
            newest = max(left, key=lambda commit: commit.sequence)  # attributes and consent stand in what goes
            touched.add(newest.id)
            staying = [one for one in found.templates if one.id.split(".")[0] == newest.id]
        return cls(
            again=enrolments_again(subject, staying, "enrol", attributes=dict(found.attributes), consent=found.consent),
            commits=[gallery.cipher.commit_key(commit) for commit in commits if commit.id in touched],
            removed=len(chosen),
            last=len(chosen) == len(found.templates),
        )
