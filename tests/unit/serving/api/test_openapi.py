"""The OpenAPI document: complete, and true."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import TypeAdapter

from pkd.serving.api.app import create_api
from pkd.serving.api.openapi import BODIES
from pkd.serving.api.problems import TYPES
from pkd.serving.core.options import Settings
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from tests.support import gallery_fixtures as galleries
from tests.support import serving_bundles as made

OTHERWISE = {"get /v1/encoders/{encoder}/artifact", "get /v1/detector", "get /healthz", "get /readyz"}
"""Answers that are a file, or too simple for a schema."""
SNAPSHOT = Path(__file__).parents[4] / "docs" / "openapi.json"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    family = made.family(tmp_path_factory.mktemp("bundles"))
    service = Service(Encoders.open(family.folders), Settings(threads=1))
    yield create_api(service)
    service.close()


@pytest.fixture(scope="module")
def document(app: Any) -> Any:
    return json.loads(json.dumps(app.openapi()))


def walk_routes(routes: Any) -> Iterator[Any]:
    """Routes of included routers, too, however this FastAPI keeps them."""
    for route in routes:
        inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
        yield from walk_routes(inner) if inner else [route] if getattr(route, "methods", None) else []


def walk(node: Any) -> Iterator[Any]:
    yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from walk(child)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = {node["$ref"] for node in walk(document) if isinstance(node, dict) and "$ref" in node}
    assert references
    for reference in references:
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]


def test_the_document_is_the_committed_one(document: dict[str, Any]) -> None:
    """docs/openapi.json is what clients are generated from: a change of the contract shows in review.

    Renew it with: RENEW=1 pytest tests/unit/serving/api/test_openapi.py
    """
    text = json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if os.environ.get("RENEW"):
        SNAPSHOT.write_text(text, encoding="utf-8")
    assert json.loads(SNAPSHOT.read_text(encoding="utf-8")) == json.loads(text), "RENEW=1 pytest " + __file__


def operations(document: dict[str, Any]) -> Iterator[Any]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def test_every_operation_is_complete(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    seen = set()
    for name, operation in operations(document):
        seen.add(operation["operationId"])
        assert operation["summary"] and operation["description"] and operation["tags"], name
        for parameter in operation.get("parameters", []):
            assert parameter.get("description") is not None, (name, parameter["name"])
            assert ("schema" in parameter) != ("content" in parameter), (name, parameter["name"])
        for status, answer in operation["responses"].items():
            assert answer["description"], (name, status)
            if status == "200" and name not in OTHERWISE:
                (content,) = answer["content"].values()
                assert "$ref" in content.get("schema", {}) or "anyOf" in content["itemSchema"], name
            if int(status) >= 400:
                assert list(answer["content"]) == ["application/problem+json"], (name, status)
        open_to_all = name in ("get /healthz", "get /readyz")
        assert ("401" in operation["responses"]) != open_to_all, name
        assert operation.get("security") == ([] if open_to_all else None), name
    assert len(seen) == len(list(operations(document)))
    body = document["paths"]["/v1/embed"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "application/json", "image/jpeg"} <= set(body)


def test_every_route_is_documented(app: Any, document: dict[str, Any]) -> None:
    served = {
        f"{method.lower()} {route.path}"
        for route in walk_routes(app.routes)
        for method in route.methods
        if route.path.startswith("/v1") and method != "HEAD"
    }
    assert served <= {name for name, _ in operations(document)} and len(served) >= 18


def test_every_conflict_says_what_works(document: dict[str, Any]) -> None:
    conflicts = 0
    for name, operation in operations(document):
        for answer in (operation["responses"].get("409"),):
            for example in answer["content"]["application/problem+json"]["examples"].values() if answer else ():
                assert {"expected", "got", "works"} <= set(example["value"]), name
                conflicts += 1
    assert conflicts > 8


def test_query_parameters_that_have_parts_are_json(document: dict[str, Any]) -> None:
    """Else a client would write where[site]=north, which no route reads."""
    in_json = set()
    for name, operation in operations(document):
        for parameter in operation.get("parameters", []):
            for kind, content in parameter.get("content", {}).items():
                assert (parameter["in"], kind) == ("query", "application/json")
                assert content["schema"]
                in_json.add((name.rpartition("/")[2], parameter["name"]))
            plain = json.dumps(parameter.get("schema", {}))
            assert "object" not in plain and "$ref" not in plain, (name, parameter["name"])
    assert in_json == {
        ("identify", "where"), ("templates", "attributes"), ("templates", "consent"), ("templates", "quality"),
    }  # fmt: skip


def test_what_a_download_says_of_ranges(document: dict[str, Any]) -> None:
    answers = document["paths"]["/v1/encoders/{encoder}/artifact"]["get"]["responses"]
    for status in ("206", "416"):
        assert "Content-Range" in answers[status]["headers"]


def test_every_operation_but_those_of_operators_refuses_query_parameters(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        examples = operation["responses"].get("422", {}).get("content", {}).get("application/problem+json", {})
        assert ("invalid-request" in examples.get("examples", ())) != (name in ("get /healthz", "get /readyz")), name


def examples_of(document: dict[str, Any], type: str, path: str, method: str = "post") -> Iterator[Any]:
    for answer in document["paths"][path][method]["responses"].values():
        for name, example in answer.get("content", {}).get("application/problem+json", {}).get("examples", {}).items():
            if name == type:
                yield example["value"]


def shape(value: Any) -> Any:
    """Names of members, not what is in them."""
    return {name: shape(one) for name, one in value.items()} if isinstance(value, dict) else type(value)


def test_examples_of_galleries_have_the_members_that_are_answered(document: dict[str, Any], tmp_path: Path) -> None:
    fleet = galleries.fleet(tmp_path / "bundles")
    one, all_of_one = "/v1/galleries/{gallery}", "/v1/galleries/{gallery}/subjects/{subject}"
    with galleries.serving(fleet, tmp_path / "store") as client:
        galleries.gallery(client, "staff")
        key = {"idempotency-key": "ann-1"}
        url = "/v1/galleries/staff/subjects/ann/templates"
        bodies = [{"inputs": [galleries.image(index)], "aligned": True} for index in range(2)]
        assert client.post(url, json=bodies[0], headers=key).status_code == 201
        other = {"space": fleet.following.info.space.id}
        assert client.post("/v1/galleries/staff/migrations", json=other).status_code == 200
        uncertified = {"inputs": [galleries.embedded(fleet.rogue, 0)]}
        for answer, path, method in (
            (client.post(url, json=bodies[1], headers=key), f"{all_of_one}/templates", "post"),
            (client.post(url, json=uncertified), f"{all_of_one}/templates", "post"),
            (client.get("/v1/galleries/nowhere"), one, "get"),
            (client.get("/v1/galleries/staff/subjects/nobody"), all_of_one, "get"),
            (client.put("/v1/galleries/staff", json=other), one, "put"),
            (client.put("/v1/galleries/staff", json={"space": "unknown"}), one, "put"),
            (client.post("/v1/galleries/staff/migrations/finish"), f"{one}/migrations/finish", "post"),
        ):
            body = answer.json()
            assert answer.status_code >= 400, (path, body)
            (example,) = examples_of(document, body["type"], path, method)
            assert shape(example) == shape(body), (path, body)


def test_the_documented_problems_exist_with_their_status(document: dict[str, Any]) -> None:
    seen = set()
    for node in walk(document["paths"]):
        for status, answer in node.get("responses", {}).items() if isinstance(node, dict) else ():
            examples = answer.get("content", {}).get("application/problem+json", {}).get("examples", {})
            for name, example in examples.items():
                assert int(status) == example["value"]["status"] == TYPES[name].status
                seen.add(name)
    assert seen == set(TYPES) - {"internal", "method-not-allowed"}


def test_the_examples_of_bodies_are_valid(document: dict[str, Any]) -> None:
    models = {model.__name__: model for model in BODIES}
    checked = set()
    for name, operation in operations(document):
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            if "json" in kind:
                model = (content.get("itemSchema") or content["schema"])["$ref"].rpartition("/")[2]
                TypeAdapter(models[model]).validate_python(content["example"])
                checked.add(name)
    assert len(checked) == 10


def test_what_the_router_refuses(tmp_path: Path) -> None:
    family = made.family(tmp_path)
    with made.running(Service(Encoders.open(family.folders), Settings(threads=1))) as client:
        assert client.get("/openapi.json").status_code == 200
        for answer, status, type in (
            (client.get("/nope"), 404, "not-found"),
            (client.get("/embed"), 405, "method-not-allowed"),
            (client.post("/gälleries", content=base64.b64encode(b"x")), 404, "not-found"),
        ):
            assert (answer.status_code, answer.json()["type"]) == (status, type)


def test_serving_reaches_neither_torch_nor_onnx() -> None:
    """What the import contract says of the source must hold of a running process, too."""
    code = (
        "import sys, pkd.serving.api.app, pkd.serving.cli.serve, pkd.serving.server.server;"
        "import pkd.toolkit.encoders.detector;"
        "print([m for m in ('torch', 'onnx', 'pkd.toolkit.distill', 'pkd.export') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_generated_client_does_not_state_an_option_twice(document: dict[str, Any]) -> None:
    """openapi-python-client sends every default of a query parameter, also beside a JSON body that states it."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if "requestBody" in operation:
                for parameter in operation.get("parameters", ()):
                    schema = parameter.get("schema") or parameter["content"]["application/json"]["schema"]
                    assert "default" not in schema, (path, parameter["name"])


def test_streams_have_a_schema_that_generators_read(document: dict[str, Any]) -> None:
    found = [node for node in walk(document) if isinstance(node, dict) and "itemSchema" in node]
    assert len(found) >= 5
    assert all(node["schema"]["type"] == "string" for node in found)


@pytest.mark.parametrize(
    ("model", "good", "bad"),
    [
        ("Policy", [{"target_fmr": 1e-3}, {"threshold": 0.5}, {"threshold": 0.5, "target_fmr": None}], "both, none"),
        ("IdentifyBody", [{"target_fpir": 0.1}, {"threshold": 0.5}, {}], "both"),
    ],
)
def test_what_excludes_one_another_is_in_the_document(
    document: dict[str, Any], model: Any, good: Any, bad: Any
) -> None:
    schema = document["components"]["schemas"][model]
    rules = {name: schema[name] for name in ("oneOf", "not") if name in schema}
    both = {"target_fmr": 1e-3, "target_fpir": 0.1, "threshold": 0.5}
    for body in good:
        jsonschema.validate(body, rules)
    for body in [both, *([{}] if "none" in bad else [])]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(body, rules)
