"""Embed, enrol, identify, verify, import and delete by the client that openapi-python-client makes of the document.

Run as: python use.py URL KEY IMAGE ENCODER, with the folder of the generated package in PYTHONPATH; prints JSON.
IMAGE is an aligned crop, ENCODER the id of the encoder that photographs are embedded with.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import TypeVar

from pkd_client import AuthenticatedClient
from pkd_client.api.galleries import create_gallery, delete_subject, enrol_templates, get_gallery
from pkd_client.api.matching import embed, identify, verify
from pkd_client.api.transfer import enrol_bulk, export_gallery
from pkd_client.models import (
    BulkItem,
    EmbedBody,
    EmbeddingSide,
    EmbeddingSideEncoding,
    EmbedEncoding,
    EmbedFilesBody,
    EnrolBody,
    EnrolTemplatesFilesBody,
    GalleryBody,
    IdentifyBody,
    IdentifyFilesBody,
    ImageInput,
    PolicyType0,
    ProblemBody,
    SubjectSide,
    VerifyBody,
)
from pkd_client.types import File

Answer = TypeVar("Answer")


def need(answer: Answer | ProblemBody | None) -> Answer:
    """Return what was answered; ends the program with a refusal."""
    if answer is None or isinstance(answer, ProblemBody):
        sys.exit(f"refused: {answer}")
    return answer


def main(url: str, key: str, image: Path, encoder: str) -> None:
    """Use every way to send something: JSON, multipart and lines."""
    client = AuthenticatedClient(base_url=url, token=key)
    data = image.read_bytes()
    encoded = ImageInput(image_b64=base64.b64encode(data).decode())
    made = need(create_gallery.sync("python", client=client, body=GalleryBody()))
    body = EmbedBody(inputs=[encoded], aligned=True, encoding=EmbedEncoding("b64_f16"))
    (face,) = need(embed.sync(client=client, body=body)).data
    (again,) = need(embed.sync(client=client, body=EmbedFilesBody(image=[_file(data)], aligned=True))).data
    probe = EmbeddingSide(embedding=face.embedding, encoder=encoder, encoding=EmbeddingSideEncoding("b64_f16"))
    enrolled = need(
        enrol_templates.sync("python", "ann", client=client, body=EnrolBody(inputs=[encoded], aligned=True))
    )
    files = EnrolTemplatesFilesBody(image=[_file(data)], aligned=True)
    more = need(enrol_templates.sync("python", "bob", client=client, body=files))
    line = json.dumps(BulkItem(subject="eve", inputs=[probe]).to_dict())
    bulk = enrol_bulk.sync_detailed("python", client=client, body=File(payload=io.BytesIO(f"{line}\n".encode())))
    found = need(identify.sync("python", client=client, body=IdentifyBody(query=probe, top_k=3)))
    by_file = need(identify.sync("python", client=client, body=IdentifyFilesBody(image=[_file(data)], aligned=True)))
    sides = VerifyBody(a=probe, b=SubjectSide(gallery="python", subject="ann"), policy=PolicyType0(target_fmr=1e-3))
    decided = need(verify.sync(client=client, body=sides))
    exported = export_gallery.sync_detailed("python", client=client)
    receipt = need(delete_subject.sync("python", "ann", client=client))
    refused = get_gallery.sync("nobody", client=client)
    said = {
        "gallery": made.name,
        "numbers": [len(again.embedding), face.encoding.value],
        "sequences": [enrolled.sequence, more.sequence],
        "bulk": json.loads(bulk.content.decode().splitlines()[0])["subject"],
        "identified": [found.decision.value, by_file.decision.value, sorted(one.subject for one in found.candidates)],
        "verified": decided.match,
        "exported": len(exported.content.decode().splitlines()),
        "deleted": receipt.templates,
        "refused": refused.type_ if isinstance(refused, ProblemBody) else None,
    }
    print(json.dumps(said))


def _file(data: bytes) -> File:
    return File(payload=io.BytesIO(data), file_name="crop.png", mime_type="image/png")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
