"""Describe to generated documentation and clients what FastAPI does not see for itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pkd.serving.api.problems import ProblemBody, documented
from pkd.serving.api.responses import NDJSON
from pkd.serving.api.tokens import TokenBody
from pkd.serving.core.gallery_schemas import EnrolBody, GalleryBody, IdentifyBody, MigrationBody, MoveBody
from pkd.serving.core.schemas import EmbedBody, VerifyBody
from pkd.serving.core.transfer_schemas import BulkAnswer, BulkItem, ExportedSubject, ExportEnd, ExportHeader

REF = "#/components/schemas/{model}"
DESCRIPTION = """\
Embeds faces, decides whether two belong to the same person, and searches galleries, with the false match rate that was
measured for exactly this ordered pair of encoders. A query embedded on a device by a distilled student may be compared
with a gallery embedded by its teacher wherever a certificate joins the two.

Every 409 says what was `expected`, what it `got`, and what `works` instead. HEAD is answered wherever GET is. A query
parameter that a route does not have is refused, and so is a body with a `Content-Encoding`.

Embeddings are biometric data: faces can be reconstructed from them. No detector of presentation attacks
is shipped: a gallery can demand the signed verdict of one, or a model that the operator adds. No image is kept.
"""
BODIES: list[type[BaseModel]] = [
    EmbedBody, VerifyBody, GalleryBody, EnrolBody, IdentifyBody, MigrationBody, BulkItem, ExportedSubject, TokenBody,
    MoveBody,
]  # fmt: skip
LINES_OUT: list[type[BaseModel]] = [BulkAnswer, ExportHeader, ExportedSubject, ExportEnd]
Examples = Mapping[str, Mapping[str, object]]
Content = dict[str, Any]
REQUEST_ID: Content = {
    "name": "X-Request-Id", "in": "header", "required": False, "schema": {"type": "string"},
    "description": "Id that the answer and log lines bear: up to 64 letters, digits, `.`, `_`, `-`; else a new one",
}  # fmt: skip
"""Parameter of operations with a body.

openapi-python-client 0.29 needs one: of ``/v1/verify``, which has a body of two types and nothing else, it writes a
module that misses an import."""
Mode = Literal["validation", "serialization"]

STUDENT, TEACHER, SPACE = "student@sha256:…", "teacher@sha256:…", "teacher@sha256:…"

READ: Examples = {
    "auth": {},
    "foreign-origin": {},
    "headers-too-large": {},
    "rate-limited": {"retry_after": 1},
    "invalid-request": {
        "errors": [{"field": "limt", "message": "no such query parameter; this route takes after, limit"}],
    },
}
TAKEN: Examples = {
    **READ,
    "forbidden": {"scope": "enrol", "scopes": ["embed", "verify"]},
    "timeout": {},
    "too-large": {"limit": 8388608},
    "overloaded": {},
    "not-ready": {},
    "draining": {},
    "invalid-request": {"errors": [{"field": "faces", "message": "Input should be 'largest' or 'exactly_one'"}]},
}
ENCODER: Examples = {"unknown-encoder": {"got": "mobilefacenet", "encoders": ["edgeface-xs@sha256:…"]}}
CERTIFICATE: Examples = {"not-found": {"certificates": ["student@0123456789__teacher@0123456789"]}}
ARTIFACT: Examples = {
    "not-found": {"got": "openvino-int4", "targets": ["openvino-int8"]},
    "range": {"bytes": 5242880},
}
DEVICE_CLASS: Examples = {"not-found": {"got": "watch", "classes": ["phone"]}}
IMAGE: Examples = {
    "not-live": {"reason": "missing"},
    "low-quality": {"low": ["yaw"], "measured": {"yaw": -41.0}, "required": {"yaw": 30}},
    "bad-image": {"index": 0},
    "unsupported-media": {},
    "no-face": {"index": 0},
    "multiple-faces": {"index": 0, "found": 2},
    "too-many-faces": {"index": 0, "found": 1462, "limit": 256},
    "not-aligned": {"index": 0, "expected": [112, 112], "got": [250, 250]},
    "no-detector": {},
    **ENCODER,
}
_NOT_CERTIFIED = {
    "expected": [{"query": STUDENT, "gallery": TEACHER}],
    "got": {"query": TEACHER, "gallery": STUDENT},
    "works": {"queries": [], "galleries": [TEACHER]},
}
PAIR: Examples = {
    "space-mismatch": {
        "expected": {"space": SPACE},
        "got": {"query": "stranger@sha256:…", "gallery": TEACHER, "space": "stranger@sha256:…"},
        "works": {"queries": [STUDENT, TEACHER], "galleries": []},
    },
    "not-certified": _NOT_CERTIFIED,
    "bad-vector": {},
    "unsupported-fmr": {"smallest": 1e-4, "largest": 1e-2, "got": 1e-6},
}
NO_STORE: Examples = {
    "no-galleries": {},
    "forbidden": {"scope": "admin", "scopes": ["verify"]},
    "store-unavailable": {},
}
NAMED: Examples = {**NO_STORE, "unknown-gallery": {}, "invalid-request": {}}
SUBJECT: Examples = {**NAMED, "unknown-subject": {}}
CREATION: Examples = {
    "unsupported-media": {},
    "space-mismatch": {
        "expected": {"spaces": [SPACE]}, "got": {"space": "stranger@sha256:…"}, "works": {"spaces": [SPACE]},
    },
    "gallery-conflict": {
        "expected": {"space": SPACE}, "got": {"space": "stranger@sha256:…"}, "works": {"spaces": [SPACE]},
    },
}  # fmt: skip
ENROLMENT: Examples = {
    "space-mismatch": {
        "index": 0,
        "expected": {"spaces": [SPACE]},
        "got": {"encoder": "stranger@sha256:…", "space": "stranger@sha256:…"},
        "works": {"galleries": [TEACHER]},
    },
    "not-certified": {
        "index": 0,
        "expected": {"galleries": [TEACHER]},
        "got": {"encoder": STUDENT, "space": SPACE},
        "works": {"galleries": [TEACHER]},
    },
    "idempotency-conflict": {
        "expected": {"key": "ann-1", "request": "the one first sent under this key, for the same subject"},
        "got": {"key": "ann-1", "digest": "60303a…"},
        "works": {"key": "a new one for a new request"},
    },
    "low-quality": {
        "index": 0,
        "low": ["sharpness", "yaw"],
        "measured": {"detection_score": 0.93, "face_pixels": 81.5, "sharpness": 4.1, "yaw": -41.0},
        "required": {"detection_score": 0.6, "face_pixels": 40, "sharpness": 10, "yaw": 30},
    },
    "duplicate-face": {
        "index": 0,
        "expected": {"subject": "ann"},
        "got": {"score": 0.61, "threshold": 0.44, "rate": 0.01, "calibrated": False},
        "works": {"subject": "ann", "accept_doubts": True},
    },
    "unlike-subject": {
        "index": 0,
        "expected": {"score": 0.31},
        "got": {"score": 0.12, "threshold": 0.31, "rate": 0.001, "calibrated": True},
        "works": {"accept_doubts": True},
    },
    "bad-vector": {"index": 0},
}  # fmt: skip
MOVED: Examples = {
    "unsupported-media": {},
    "unknown-template": {},
    "gallery-conflict": {
        "expected": {"subject": "a new one"}, "got": {"subject": "ann"}, "works": {"new": False},
    },
}  # fmt: skip
REVIEW: Examples = {"too-large": {"limit": 20000}}
SEARCH: Examples = {
    "space-mismatch": {
        "expected": {"spaces": [SPACE]},
        "got": {"query": "stranger@sha256:…", "space": "stranger@sha256:…"},
        "works": {"queries": [STUDENT, TEACHER], "templates": {TEACHER: [STUDENT, TEACHER]}},
    },
    "not-certified": {
        "expected": [{"query": STUDENT, "gallery": "student2@sha256:…"}],
        "got": {"query": STUDENT, "galleries": [TEACHER, "student2@sha256:…"]},
        "works": {"queries": [TEACHER], "templates": {TEACHER: [STUDENT, TEACHER], "student2@sha256:…": [TEACHER]}},
    },
    "bad-vector": {},
}
MIGRATION: Examples = {
    "unsupported-media": {},
    "space-mismatch": CREATION["space-mismatch"],
    "gallery-conflict": {
        "expected": {"moving_to": "teacher2@sha256:…"},
        "got": {
            "moving_to": {"id": "teacher2@sha256:…", "dim": 512, "metric": "cosine"}, "unmoved": ["ann", "bob", "eve"],
        },
        "works": {"enrol_or_delete": ["ann", "bob", "eve"]},
    },
}  # fmt: skip
LINES: Examples = {"unsupported-media": {}}

EMBED_EXAMPLE: Content = {"inputs": [{"image_b64": "/9j/4AAQ…"}], "aligned": True, "encoding": "b64_f16"}
VERIFY_EXAMPLE: Content = {
    "a": {"embedding": "wyoAPA==…", "encoding": "b64_f16", "encoder": STUDENT},
    "b": {"gallery": "staff", "subject": "ann"},
    "policy": {"target_fmr": 1e-4},
}
GALLERY_EXAMPLE: Content = {"space": SPACE, "retention_seconds": 7776000}
ENROL_EXAMPLE: Content = {
    "inputs": [{"image_b64": "/9j/4AAQ…"}, {"embedding": "wyoAPA==…", "encoding": "b64_f16", "encoder": STUDENT}],
    "attributes": {"site": "north"},
    "consent": {"basis": "consent", "reference": "form 17", "given": "2026-05-01"},
}
IDENTIFY_EXAMPLE: Content = {
    "query": {"embedding": "wyoAPA==…", "encoding": "b64_f16", "encoder": STUDENT},
    "top_k": 3,
    "target_fpir": 0.01,
    "where": {"site": "north"},
}
TOKEN_EXAMPLE: Content = {"scopes": ["verify"], "gallery": "staff", "seconds": 900, "rate": 5}
MOVE_EXAMPLE: Content = {"into": "ann", "templates": ["00000000002a"]}
MIGRATION_EXAMPLE: Content = {"space": "teacher2@sha256:…"}
BULK_EXAMPLE: Content = {"subject": "ann", "key": "ann-1", "inputs": [{"image_b64": "/9j/4AAQ…"}]}
BULK_ANSWER: Content = {
    "line": 1, "subject": "ann", "key": "ann-1", "templates": ["t1"], "sequence": 7, "replayed": False,
}  # fmt: skip
IMPORT_EXAMPLE: Content = {
    "subject": "ann",
    "attributes": {"site": "north"},
    "templates": [{"encoder": TEACHER, "space": SPACE, "embedding": "wyoAPA==…", "encoding": "b64_f16"}],
}
EXPORT_ANSWER: Content = {"end": True, "subjects": 1}


FORM = "multipart/form-data"


def responses(*examples: Examples, description: str = "Done", status: int = 200) -> dict[int | str, dict[str, Any]]:
    """Describe what a route answers beside the model that it returns: the problems of all ``examples``."""
    return {status: {"description": description}, **documented(_merged(examples))}


def stream(example: Content, *examples: Examples) -> dict[int | str, dict[str, Any]]:
    """Describe what a route answers in lines, an ``example`` of which is given."""
    schema = {"anyOf": [{"$ref": REF.format(model=one.__name__)} for one in LINES_OUT]}
    content = {NDJSON: {"schema": _LINES, "itemSchema": schema, "example": example}}
    return {200: {"description": "One JSON object a line", "content": content}, **documented(_merged(examples))}


def file(*examples: Examples) -> dict[int | str, dict[str, Any]]:
    """Describe what a download answers."""
    headers = {"ETag": {"description": "SHA-256 of the file", "schema": {"type": "string"}}}
    part = {"Content-Range": {"description": "Which of its bytes", "schema": {"type": "string"}}}
    content = {kind: {"schema": _BINARY} for kind in ("application/octet-stream", "application/zip")}
    refusals = documented(_merged(examples))
    refusals[416]["headers"] = {"Content-Range": {"description": "bytes */SIZE", "schema": {"type": "string"}}}
    return {
        200: {"description": "The file", "headers": headers, "content": content},
        206: {"description": "The part of it that Range asks for", "headers": {**headers, **part}},
        304: {"description": "The file is the one of If-None-Match"},
        **refusals,
    }


def small_file(*examples: Examples) -> dict[int | str, dict[str, Any]]:
    """Describe what a download answers that has no parts."""
    made = file(*examples, {"range": {}})
    return {status: one for status, one in made.items() if status not in (206, 416)}


def json_body(model: type[BaseModel], example: Content, *, required: bool = True) -> Content:
    """Describe a body that the route reads by itself."""
    return {"requestBody": {"required": required, "content": {"application/json": _json(model, example)}}}


def lines_body(model: type[BaseModel], example: Content) -> Content:
    """Describe a body of lines."""
    item = {"$ref": REF.format(model=model.__name__)}
    content = {NDJSON: {"schema": _LINES, "itemSchema": item, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def images_body(model: type[BaseModel], options: type[BaseModel], example: Content) -> Content:
    """Describe JSON, a multipart form with files ``image``, or a raw image with its ``options`` in the query string."""
    properties = options.model_json_schema(ref_template=REF)["properties"]
    form = {
        "type": "object",
        "properties": {
            "image": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}},
            **properties,
        },
        "required": ["image"],
    }
    return {
        "parameters": [_parameter(name, schema) for name, schema in properties.items()],
        "requestBody": {
            "required": True,
            "content": {
                **{kind: {"schema": _BINARY} for kind in IMAGES},
                FORM: {"schema": form},
                "application/json": _json(model, example),
            },
        },
    }


def pair_body(model: type[BaseModel], options: type[BaseModel], example: Content) -> Content:
    """Describe JSON, or a multipart form with the files ``a`` and ``b``."""
    properties = options.model_json_schema(ref_template=REF)["properties"]
    form = {"type": "object", "properties": {"a": _BINARY, "b": _BINARY, **properties}, "required": ["a", "b"]}
    described = json_body(model, example)
    described["requestBody"]["content"][FORM] = {"schema": form}
    return described


def describe(app: FastAPI) -> dict[str, Any]:
    """Make the OpenAPI 3.1 document: FastAPI's, with the schemas of bodies that the routes read by themselves."""
    if not app.openapi_schema:
        made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
        answers: list[type[BaseModel]] = [ProblemBody, *(model for model in LINES_OUT if model not in BODIES)]
        modes: list[tuple[type[BaseModel], Mode]] = [(model, "validation") for model in BODIES]
        modes += [(model, "serialization") for model in answers]
        _, sent = models_json_schema(modes, ref_template=REF)
        made.setdefault("components", {}).setdefault("schemas", {}).update(sent["$defs"])
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}, {}]
        for operations in made["paths"].values():
            for operation in operations.values():
                if "requestBody" in operation:
                    operation.setdefault("parameters", []).append(REQUEST_ID)
        app.openapi_schema = made
    return app.openapi_schema


def _json(model: type[BaseModel], example: Content) -> Content:
    return {"schema": {"$ref": REF.format(model=model.__name__)}, "example": example}


def _parameter(name: str, schema: Content) -> Content:
    """Describe an option in a query string, where what has parts is JSON.

    Its default is told in words alone: generated clients send the defaults that they are told, and a JSON body that
    states the option, too, would then be refused as stating it twice.
    """
    schema = dict(schema)
    default = schema.pop("default", None)
    said = [schema.get("description", ""), "" if default is None else f"default: {json.dumps(default)}"]
    schema["description"] = "; ".join(filter(None, said))
    shape = {"content": {"application/json": {"schema": schema}}} if _has_parts(schema) else {"schema": schema}
    return {"name": name, "in": "query", "description": schema["description"], **shape}


def _has_parts(schema: Content) -> bool:
    return "$ref" in schema or schema.get("type") == "object" or any(map(_has_parts, schema.get("anyOf", ())))


def _merged(examples: tuple[Examples, ...]) -> Examples:
    return {type: members for one in examples for type, members in one.items()}


IMAGES = ("image/jpeg", "image/png", "image/webp", "image/avif", "image/heic")
_BINARY = {"type": "string", "format": "binary"}
_LINES = {**_BINARY, "description": "One JSON object a line, each as `itemSchema` (OpenAPI 3.2) says"}
