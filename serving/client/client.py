"""Call the REST API from Python, for example ``Client("http://127.0.0.1:8000").identify("staff", photo)``.

Answers are the server's own schemas. A busy server is asked again when it says so; a refusal is raised with its
problem. Embeddings travel as float16 in base64: a tenth of the bytes of numbers in JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from pkd.serving.client.connection import Connection, Unreachable, lines_of
from pkd.serving.core.embedding_codec import decode, encode
from pkd.serving.core.gallery_schemas import (
    EnrolAnswer,
    GalleriesAnswer,
    GalleryAnswer,
    IdentifyAnswer,
    MigrationAnswer,
    MovedAnswer,
    ReceiptAnswer,
    SubjectAnswer,
    SubjectsAnswer,
)
from pkd.serving.core.schemas import (
    CertificatesAnswer,
    EmbedAnswer,
    EncoderDetail,
    EncodersAnswer,
    SpacesAnswer,
    VerifyAnswer,
)
from pkd.serving.core.transfer_schemas import BulkAnswer
from pkd.toolkit.certificates.certificate import Assurance, Certificate
from pkd.toolkit.core.errors import PkdError

if TYPE_CHECKING:
    import httpx

Answered = TypeVar("Answered", bound=BaseModel)


@dataclass(frozen=True)
class Embedding:
    """Hold an embedding made on a device: unit vector D, and the id of the encoder that made it."""

    vector: NDArray[np.floating[Any]]
    encoder: str
    space: str | None = None


@dataclass(frozen=True)
class Enrolled:
    """Name somebody in a gallery, as a side of a verification."""

    gallery: str
    subject: str


@dataclass(frozen=True)
class Item:
    """Hold one subject's part of a bulk enrolment. The key makes it safe to send again; by default a random one."""

    subject: str
    inputs: tuple[bytes | Embedding, ...]
    key: str = field(default_factory=lambda: uuid4().hex)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields: encoder, aligned, faces, attributes, consent, expires, quality."""

    def line(self) -> bytes:
        """Write it as the server reads it."""
        inputs = [_input(one) for one in self.inputs]
        return json.dumps({"subject": self.subject, "key": self.key, "inputs": inputs, **self.options}).encode() + b"\n"


class Client:
    """Ask one server. Safe to share between threads. Every method raises Refused or Unreachable."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Open no connection yet.

        ``timeout``: seconds without an answer. ``retries``: how often a busy server is asked again.
        """
        self._connection = Connection(url, key, timeout, retries, transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    # Matching

    def embed(self, *images: bytes, **options: Any) -> EmbedAnswer:
        """Embed the faces of image files. ``options``: encoder, faces, aligned, encoding (b64_f16)."""
        inputs = [_input(image) for image in images]
        return self._post(EmbedAnswer, "/v1/embed", {"inputs": inputs, "encoding": "b64_f16", **options})

    def verify(
        self,
        a: bytes | Embedding | Enrolled,
        b: bytes | Embedding | Enrolled,
        *,
        target_fmr: float | None = None,
        threshold: float | None = None,
        assurance: Assurance | None = None,
        **options: Any,
    ) -> VerifyAnswer:
        """Compare query ``a`` with gallery side ``b``. ``options`` go with images: encoder, aligned, faces."""
        policy = _given(target_fmr=target_fmr, threshold=threshold, assurance=assurance)
        body = {"a": _side(a, options), "b": _side(b, options), **({"policy": policy} if policy else {})}
        return self._post(VerifyAnswer, "/v1/verify", body)

    def identify(
        self,
        gallery: str,
        query: bytes | Embedding,
        *,
        top_k: int = 5,
        target_fpir: float | None = None,
        threshold: float | None = None,
        assurance: Assurance | None = None,
        where: Mapping[str, str] | None = None,
        partial: bool = False,
        **options: Any,
    ) -> IdentifyAnswer:
        """Search a gallery. ``options`` go with an image: encoder, aligned, faces."""
        wanted = _given(target_fpir=target_fpir, threshold=threshold, assurance=assurance, where=where)
        body = {"query": _side(query, options), "top_k": top_k, "partial": partial, **wanted}
        return self._post(IdentifyAnswer, f"/v1/galleries/{gallery}/identify", body)

    # Galleries

    def create_gallery(
        self, name: str, space: str | None = None, retention_seconds: float | None = None
    ) -> GalleryAnswer:
        """Create a gallery; if it is there with this space, nothing happens."""
        body = _given(space=space, retention_seconds=retention_seconds)
        return self._ask(GalleryAnswer, "PUT", f"/v1/galleries/{name}", json=body)

    def galleries(self) -> list[GalleryAnswer]:
        """List all galleries, by name."""
        return self._ask(GalleriesAnswer, "GET", "/v1/galleries").galleries

    def gallery(self, name: str) -> GalleryAnswer:
        """Describe one gallery."""
        return self._ask(GalleryAnswer, "GET", f"/v1/galleries/{name}")

    def delete_gallery(self, name: str) -> ReceiptAnswer:
        """Delete it with everyone in it."""
        return self._ask(ReceiptAnswer, "DELETE", f"/v1/galleries/{name}", safe=False)

    def enrol(
        self, gallery: str, subject: str, *inputs: bytes | Embedding, key: str | None = None, **options: Any
    ) -> EnrolAnswer:
        """Enrol image files and embeddings, all or none. ``key``: idempotency key; a random one guards the retries."""
        body = {"inputs": [_input(one) for one in inputs], **options}
        headers = {"idempotency-key": key or uuid4().hex}
        return self._post(EnrolAnswer, f"/v1/galleries/{gallery}/subjects/{subject}/templates", body, headers=headers)

    def subjects(self, gallery: str) -> Iterator[str]:
        """List every subject's id, in ascending order, a page at a time."""
        after: str | None = ""
        while after is not None:
            page = self._ask(
                SubjectsAnswer, "GET", f"/v1/galleries/{gallery}/subjects", params={"after": after, "limit": 1000}
            )
            yield from page.subjects
            after = page.next

    def subject(self, gallery: str, subject: str) -> SubjectAnswer:
        """Describe what is kept of a subject."""
        return self._ask(SubjectAnswer, "GET", f"/v1/galleries/{gallery}/subjects/{subject}")

    def delete_subject(self, gallery: str, subject: str) -> ReceiptAnswer:
        """Delete a subject; returns the receipt."""
        return self._ask(ReceiptAnswer, "DELETE", f"/v1/galleries/{gallery}/subjects/{subject}", safe=False)

    # Many at once

    def enrol_bulk(self, gallery: str, items: Iterable[Item]) -> Iterator[tuple[Item, BulkAnswer]]:
        """Enrol many subjects; gives each item with its answer, a refused one with its ``problem``.

        What a busy server or a broken connection left without an answer is sent again.
        """
        path = f"/v1/galleries/{gallery}/templates:bulk"
        yield from self._connection.send_lines(path, ((item, item.line()) for item in items))

    def export(self, gallery: str) -> Iterator[bytes]:
        """Give the lines of an export. Raises Unreachable where it was cut off, for it has no last line then."""
        last: dict[str, Any] = {}
        with self._connection.stream("GET", f"/v1/galleries/{gallery}/export") as response:
            for line in lines_of(response):
                last = json.loads(line)
                yield line + b"\n"
        if not last.get("end"):
            raise Unreachable(
                f"{self._connection.url}: the export of {gallery} was cut off. {last.get('problem', 'Try again.')}"
            )

    def import_gallery(self, gallery: str, lines: Iterable[bytes]) -> Iterator[BulkAnswer]:
        """Enrol everyone of an export; gives an answer for each subject.

        Raises PkdError where its last line is missing.
        """
        count, end = 0, None

        def subjects() -> Iterator[tuple[bytes, bytes]]:
            nonlocal count, end
            for line in lines:
                sent = json.loads(line)
                end = sent.get("subjects") if sent.get("end") else end
                if "subject" in sent:
                    count += 1
                    yield line, line.rstrip() + b"\n"

        for _, answer in self._connection.send_lines(f"/v1/galleries/{gallery}/import", subjects(), closed=True):
            yield answer
        if end != count:
            raise PkdError(f"the export states {end} subjects and holds {count}: it was cut off. Export again.")

    # Migrations

    def begin_migration(self, gallery: str, space: str) -> MigrationAnswer:
        """Take templates of ``space``, too."""
        return self._post(MigrationAnswer, f"/v1/galleries/{gallery}/migrations", {"space": space})

    def migration(self, gallery: str, after: str = "", limit: int = 100) -> MigrationAnswer:
        """Say how far a migration is, with a page of those who are not moved."""
        return self._ask(
            MigrationAnswer, "GET", f"/v1/galleries/{gallery}/migrations", params={"after": after, "limit": limit}
        )

    def finish_migration(self, gallery: str, *, abandon: bool = False) -> MovedAnswer:
        """Keep the second space alone; with ``abandon`` the first one."""
        end = "abandon" if abandon else "finish"
        return self._ask(MovedAnswer, "POST", f"/v1/galleries/{gallery}/migrations/{end}", safe=False)

    # Catalogue

    def encoders(self) -> EncodersAnswer:
        """List the encoders that images can be sent to."""
        return self._ask(EncodersAnswer, "GET", "/v1/encoders")

    def encoder(self, encoder: str) -> EncoderDetail:
        """Describe one encoder, by id, short id or name."""
        return self._ask(EncoderDetail, "GET", f"/v1/encoders/{encoder}")

    def spaces(self) -> SpacesAnswer:
        """List the spaces of the loaded encoders."""
        return self._ask(SpacesAnswer, "GET", "/v1/spaces")

    def certificates(self, query: str | None = None, gallery: str | None = None) -> list[Certificate]:
        """List the certificates of the ordered pairs that may be compared."""
        return self._ask(
            CertificatesAnswer, "GET", "/v1/certificates", params=_given(query=query, gallery=gallery)
        ).certificates

    def download(self, encoder: str, path: Path, **options: str) -> bool:
        """Write what a device runs to ``path``, unless it is there already; returns whether it was written.

        ``options``: target, file. Raises PkdError where the bytes do not have the SHA-256 that the server states.
        """

        def digest(data: bytes) -> str:
            return f'"{hashlib.sha256(data).hexdigest()}"'

        known = {"if-none-match": digest(path.read_bytes())} if path.exists() else {}
        response = self._connection.send("GET", f"/v1/encoders/{encoder}/artifact", params=options, headers=known)
        if response.status_code == 304:
            return False
        if digest(response.content) != response.headers["etag"]:
            raise PkdError(f"{encoder}: the download is damaged: its SHA-256 is not the server's. Download it again.")
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(response.content)
        part.replace(path)
        return True

    def _post(
        self, model: type[Answered], path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> Answered:
        return self._ask(model, "POST", path, json=body, headers=headers)

    def _ask(self, model: type[Answered], method: str, path: str, *, safe: bool = True, **request: Any) -> Answered:
        return model.model_validate_json(self._connection.send(method, path, safe=safe, **request).content)


def vectors(answer: EmbedAnswer) -> NDArray[np.float32]:
    """Collect the embeddings of an answer, float32 N×D, unit rows."""
    rows = [decode(one.embedding, one.encoding, answer.space.dim) for one in answer.data]
    return np.array(rows, np.float32).reshape(len(rows), answer.space.dim)


def _input(one: bytes | Embedding) -> dict[str, Any]:
    if isinstance(one, bytes):
        return {"image_b64": base64.b64encode(one).decode()}
    unit = np.asarray(one.vector, np.float32)
    sent = {"embedding": encode(unit, "b64_f16"), "encoding": "b64_f16", "encoder": one.encoder}
    return {**sent, **_given(space=one.space)}


def _side(one: bytes | Embedding | Enrolled, options: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(one, Enrolled):
        return {"gallery": one.gallery, "subject": one.subject}
    return {**_input(one), **(options if isinstance(one, bytes) else {})}


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
