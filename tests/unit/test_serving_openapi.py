"""The OpenAPI document: complete, and true."""

from __future__ import annotations

import base64
import subprocess
import sys

import pytest
import serving_bundles as made
from pydantic import TypeAdapter

from pkd.serving.app import create_app
from pkd.serving.encoders import Encoders
from pkd.serving.problems import PROBLEMS
from pkd.serving.schemas import EmbedBody, VerifyBody
from pkd.serving.service import Service
from pkd.serving.settings import Settings


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    family = made.family(tmp_path_factory.mktemp("bundles"))
    service = Service(Encoders.open(family.folders), Settings(threads=1))
    yield create_app(service).openapi()
    service.close()


def walk(node):
    yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from walk(child)


def test_every_reference_leads_somewhere(document):
    references = {node["$ref"] for node in walk(document) if isinstance(node, dict) and "$ref" in node}
    assert references
    for reference in references:
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]


def test_the_routes(document):
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        "/v1/embed", "/v1/verify", "/v1/encoders", "/v1/spaces", "/v1/certificates", "/healthz", "/readyz",
    }  # fmt: skip
    body = document["paths"]["/v1/embed"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "application/json", "image/jpeg"} <= set(body)


def test_the_documented_problems_exist_with_their_status(document):
    seen = set()
    for node in walk(document["paths"]):
        for status, answer in node.get("responses", {}).items() if isinstance(node, dict) else ():
            examples = answer.get("content", {}).get("application/problem+json", {}).get("examples", {})
            for name, example in examples.items():
                assert int(status) == example["value"]["status"] == PROBLEMS[name][0]
                seen.add(name)
    assert seen == set(PROBLEMS) - {"internal", "not-found", "method-not-allowed"}


def test_the_examples_of_bodies_are_valid(document):
    for path, model in (("/v1/embed", EmbedBody), ("/v1/verify", VerifyBody)):
        example = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        TypeAdapter(model).validate_python(example)


def test_the_catalogue(tmp_path):
    family = made.family(tmp_path)
    with made.running(Service(Encoders.open(family.folders), Settings(threads=1))) as client:
        encoders = client.get("/v1/encoders").json()["encoders"]
        assert [(one["name"], one["default"]) for one in encoders] == [
            ("teacher", True),
            ("student", False),
            ("stranger", False),
        ]
        spaces = client.get("/v1/spaces").json()["spaces"]
        assert [len(one["encoders"]) for one in spaces] == [2, 1]
        pairs = {(one["query"], one["gallery"]) for one in client.get("/v1/certificates").json()["certificates"]}
        teacher, student = family.teacher.info.id, family.student.info.id
        assert pairs == {(teacher, teacher), (student, teacher)}
        assert client.get("/openapi.json").status_code == 200
        for answer, status, type in (
            (client.get("/nope"), 404, "not-found"),
            (client.get("/embed"), 405, "method-not-allowed"),
            (client.post("/gälleries", content=base64.b64encode(b"x")), 404, "not-found"),
        ):
            assert (answer.status_code, answer.json()["type"]) == (status, type)


def test_serving_reaches_neither_torch_nor_onnx():
    """What the import contract says of the source must hold of a running process, too."""
    code = (
        "import sys, pkd.serving.app, pkd.serving.cli, pkd.serving.server, pkd.toolkit.detect;"
        "print([m for m in ('torch', 'onnx', 'pkd.toolkit.distill', 'pkd.export') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
