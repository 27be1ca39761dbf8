"""OpenAPI: what generated documentation and clients need beyond what FastAPI sees for itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from pkd.serving.problems import ProblemBody, documented
from pkd.serving.schemas import EmbedBody, EmbedOptions, VerifyBody

REF = "#/components/schemas/{model}"
DESCRIPTION = """\
Embeds faces and decides whether two belong to the same person, with the false match rate that was measured for exactly
this ordered pair of encoders. A query embedded on a device by a distilled student may be compared with a gallery
embedded by its teacher wherever a certificate joins the two.

Embeddings are biometric data: faces can be reconstructed from them. There is no liveness detection. No image is kept.
"""
Examples = dict[str, dict[str, object]]

TAKEN: Examples = {
    "auth": {},
    "timeout": {},
    "too-large": {"limit": 8388608},
    "overloaded": {},
    "not-ready": {},
    "draining": {},
}
IMAGE: Examples = {
    "bad-image": {"index": 0},
    "unsupported-media": {},
    "no-face": {"index": 0},
    "multiple-faces": {"index": 0, "found": 2},
    "not-aligned": {"index": 0, "expected": [112, 112], "got": [250, 250]},
    "no-detector": {},
    "unknown-encoder": {"got": "mobilefacenet", "encoders": ["edgeface-xs@sha256:…"]},
    "invalid-request": {"errors": [{"field": "faces", "message": "Input should be 'largest', 'all' or 'exactly_one'"}]},
}
PAIR: Examples = {
    "space-mismatch": {"expected": {"space": "edgeface-xs@sha256:…"}, "got": {"encoder": "…", "space": "…"}},
    "not-certified": {
        "expected": [{"query": "student@sha256:…", "gallery": "teacher@sha256:…"}],
        "got": {"query": "teacher@sha256:…", "gallery": "student@sha256:…"},
        "works": {"queries": [], "galleries": ["teacher@sha256:…"]},
    },
    "bad-vector": {},
    "unsupported-fmr": {"smallest": 1e-4, "largest": 1e-2, "got": 1e-6},
}

EMBED_RESPONSES = documented({**IMAGE, **TAKEN})
VERIFY_RESPONSES = documented({**IMAGE, **PAIR, **TAKEN})

_BINARY = {"schema": {"type": "string", "format": "binary"}}
EMBED_EXTRA: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "query", "schema": schema, "description": schema.get("description", "")}
        for name, schema in EmbedOptions.model_json_schema()["properties"].items()
    ],
    "requestBody": {
        "required": True,
        "content": {
            "image/jpeg": _BINARY,
            "image/png": _BINARY,
            "image/webp": _BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}},
                        **EmbedOptions.model_json_schema()["properties"],
                    },
                    "required": ["image"],
                }
            },
            "application/json": {
                "schema": {"$ref": REF.format(model="EmbedBody")},
                "example": {"inputs": [{"image_b64": "/9j/4AAQ…"}], "aligned": True, "encoding": "b64_f16"},
            },
        },
    },
}
VERIFY_EXTRA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": REF.format(model="VerifyBody")},
                "example": {
                    "a": {"embedding": "wyoAPA==…", "encoding": "b64_f16", "encoder": "student@sha256:…"},
                    "b": {"image_b64": "/9j/4AAQ…", "encoder": "teacher@sha256:…"},
                    "policy": {"target_fmr": 1e-4},
                },
            }
        },
    },
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document: FastAPI's, with the schemas of bodies that the routes read by themselves."""
    if not app.openapi_schema:
        made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
        _, sent = models_json_schema(
            [(EmbedBody, "validation"), (VerifyBody, "validation"), (ProblemBody, "serialization")], ref_template=REF
        )
        made.setdefault("components", {}).setdefault("schemas", {}).update(sent["$defs"])
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}, {}]
        app.openapi_schema = made
    return app.openapi_schema
