"""A gallery that asks for proof of a living person takes nobody without: real keys, the real server."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("jwt", reason="pyjwt is not installed (extra serve)")

from pkd.serving.core.errors import NotLive
from pkd.serving.core.signed_tokens import KeySet
from pkd.serving.matching.liveness import Liveness, LivenessConfig
from pkd.serving.matching.policies import Policies
from pkd.toolkit.core.errors import InputError
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import ALIGNED, CROPS, PNG, problem
from tests.support.issuer import Issuer, private

FILES = [made.made.png(crop) for crop in CROPS[:3]]
HASHES = [hashlib.sha256(file).hexdigest() for file in FILES]
RULES = {
    "live": {"liveness": {"enrol": True, "query": True}},
    "proven": {"liveness": {"enrol": True, "max_apcer": 0.02}},
}


@pytest.fixture(scope="module")
def camera() -> Issuer:
    return Issuer("https://camera.example", "pkd")


@pytest.fixture(scope="module")
def server(fleet: Any, camera: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("liveness")
    camera.write(folder / "jwks.json")
    (folder / "policies.json").write_text(json.dumps(RULES))
    detectors = {"good": {"apcer": 0.01, "bpcer": 0.05}, "weak": {"apcer": 0.2, "bpcer": 0.01}}
    config = {"issuer": camera.name, "audience": camera.audience, "jwks": "jwks.json", "detectors": detectors}
    (folder / "liveness.json").write_text(json.dumps(config))
    more: Any = {"policies": Policies(folder / "policies.json"), "liveness": Liveness.read(folder / "liveness.json")}
    with made.serving(fleet, folder / "store", **more) as client:
        for gallery in ("live", "proven", "free"):
            made.gallery(client, gallery)
        yield client


def enrol(client: httpx.Client, token: str | None, gallery: str = "live", file: int = 0) -> httpx.Response:
    params = {**ALIGNED, **({"liveness": token} if token is not None else {})}
    return client.post(
        f"/v1/galleries/{gallery}/subjects/ann/templates", content=FILES[file], headers=PNG, params=params
    )


def refused(answer: httpx.Response) -> str:
    return str(problem(answer, 422, "not-live")["reason"])


def live(camera: Issuer, *digests: str, **more: Any) -> str:
    return camera.verdict(*digests, **{"detector": "good", **more})


def test_a_verdict_on_this_very_picture_lets_it_in_once(server: httpx.Client, camera: Issuer) -> None:
    assert refused(enrol(server, None)) == "missing"
    token = live(camera, HASHES[0])
    answer = enrol(server, token)
    assert answer.status_code == 201, answer.text
    assert refused(enrol(server, token)) == "replayed"
    assert refused(enrol(server, live(camera, HASHES[1]))) == "other-input"
    assert refused(enrol(server, live(camera, HASHES[0], verdict="attack"))) == "attack"
    assert enrol(server, None, "free").status_code == 201
    assert refused(enrol(server, "nonsense", "free")) == "invalid"  # what is claimed must hold


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"iat": -100.0}, "expired"),
        ({"exp": -10.0}, "invalid"),
        ({"iat": 100.0}, "invalid"),
        ({"aud": "another"}, "invalid"),
        ({"iss": "https://camera.example.attacker"}, "invalid"),
        ({"jti": "short"}, "invalid"),
        ({"jti": None}, "invalid"),
        ({"pad": None}, "invalid"),
        ({"pad": {"verdict": "live"}}, "invalid"),
        ({"pad": {"verdict": True, "sha256": [HASHES[0]]}}, "invalid"),
        ({"exp": None}, "invalid"),
    ],
)
def test_every_claim_is_checked(server: httpx.Client, camera: Issuer, claims: dict[str, Any], reason: str) -> None:
    now = time.time()  # numbers are seconds from now
    stated = {name: now + value if isinstance(value, float) else value for name, value in claims.items()}
    assert refused(enrol(server, live(camera, HASHES[0], **stated))) == reason


def test_nobody_else_can_sign(server: httpx.Client, camera: Issuer) -> None:
    claims: Any = {"jti": "x" * 20, "pad": {"verdict": "live", "detector": "good", "sha256": [HASHES[0]]}}
    for token, says in (
        (camera.sign(key=private("EdDSA"), **claims), "signature does not fit"),
        (camera.sign(key=private("ES256"), algorithm="ES256", **claims), "its algorithm is not one of its key"),
        (camera.sign(key="", algorithm="none", **claims), "its algorithm is not one of its key"),
        (camera.confused(**claims), "its algorithm is not one of its key"),
        (camera.sign(headers={"kid": "other"}, **claims), "names no key"),
        (camera.sign(headers={"crit": ["x"], "x": 1}, **claims), "not believed"),  # by PyJWT, or by us before 2.10
        (camera.sign(**claims).rpartition(".")[0] + ".", "signature does not fit"),
    ):
        answer = enrol(server, token)
        assert refused(answer) == "invalid" and says in answer.json()["detail"]


def test_every_way_to_enrol_and_to_query_is_behind_it(server: httpx.Client, camera: Issuer, fleet: Any) -> None:
    query = made.embedded(fleet.first, 1)
    digest = hashlib.sha256(base64.b64decode(query["embedding"])).hexdigest()
    turned = made.embedded(fleet.teacher, 1)
    subject = {"gallery": "live", "subject": "ann"}
    enrol(server, live(camera, HASHES[0]))
    image = {"image_b64": base64.b64encode(FILES[0]).decode(), "aligned": True}
    url = "/v1/galleries/live"
    line = {"subject": "bob", "inputs": [query]}
    calls: dict[str, tuple[str, dict[str, Any], str]] = {
        "embedding": (f"{url}/subjects/bob/templates", {"inputs": [query]}, digest),
        "search": (f"{url}/identify", {"query": query}, digest),
        "image": (f"{url}/identify", {"query": image, "partial": True}, HASHES[0]),
        "verify": ("/v1/verify", {"a": image, "b": subject}, HASHES[0]),
        "turned": (
            "/v1/verify",
            {"a": subject, "b": turned},
            hashlib.sha256(base64.b64decode(turned["embedding"])).hexdigest(),
        ),
    }
    for path, body, of in calls.values():
        assert refused(server.post(path, json=body)) == "missing"
        assert refused(server.post(path, json={**body, "liveness": live(camera, HASHES[2])})) == "other-input"
        answer = server.post(path, json={**body, "liveness": live(camera, of)})
        assert answer.status_code in (200, 201), answer.text
    lines = [line, {**line, "liveness": live(camera, digest)}]
    bulk = server.post(
        f"{url}/templates:bulk",
        content="\n".join(map(json.dumps, lines)),
        headers={"content-type": "application/x-ndjson"},
    )
    problems = [json.loads(one).get("problem") for one in bulk.text.splitlines()]
    assert problems[0]["type"] == "not-live" and problems[1] is None
    form = {"image": FILES[1]}, {**ALIGNED, "liveness": live(camera, HASHES[1])}
    assert server.post(f"{url}/subjects/bob/templates", files=form[0], data=form[1]).status_code == 201


def test_all_inputs_of_a_request_are_covered_and_floats_have_a_hash(
    server: httpx.Client, camera: Issuer, fleet: Any
) -> None:
    vector = fleet.first.embed(CROPS[1:2])[0]
    numbers = {"embedding": vector.tolist(), "encoder": fleet.first.info.id}
    digest = hashlib.sha256(np.asarray(vector, "<f4").tobytes()).hexdigest()
    body = {"inputs": [numbers, made.embedded(fleet.first, 2)]}
    path = "/v1/galleries/live/subjects/eve/templates"
    answer = server.post(path, json={**body, "liveness": live(camera, digest)})
    assert problem(answer, 422, "not-live")["index"] == 1
    second = hashlib.sha256(base64.b64decode(str(body["inputs"][1]["embedding"]))).hexdigest()
    assert server.post(path, json={**body, "liveness": live(camera, digest, second)}).status_code == 201


def test_a_detector_must_be_as_good_as_the_gallery_asks(server: httpx.Client, camera: Issuer) -> None:
    assert refused(enrol(server, live(camera, HASHES[0], detector="weak"), "proven")) == "evidence"
    assert refused(enrol(server, live(camera, HASHES[0], detector="other"), "proven")) == "unknown-detector"
    assert enrol(server, live(camera, HASHES[0]), "proven").status_code == 201
    assert enrol(server, live(camera, HASHES[0], detector="weak")).status_code == 201


def test_a_server_that_believes_nobody_says_so(fleet: Any, camera: Issuer, tmp_path: Path) -> None:
    (tmp_path / "policies.json").write_text(json.dumps(RULES))
    with made.serving(fleet, tmp_path / "store", policies=Policies(tmp_path / "policies.json")) as client:
        made.gallery(client, "live")
        assert refused(enrol(client, None)) == "missing"
        assert refused(enrol(client, live(camera, HASHES[0]))) == "not-configured"


def test_processes_of_one_server_remember_nonces_together(camera: Issuer, tmp_path: Path) -> None:
    config = LivenessConfig(issuer=camera.name, audience=camera.audience, jwks="-")
    keys = KeySet(str(camera.write(tmp_path / "jwks.json")))
    one, two = (Liveness(config, keys, shared=tmp_path) for _ in range(2))
    token = camera.verdict(HASHES[0])
    one.require(token, [FILES[0]], None)
    with pytest.raises(NotLive, match="used before"):
        two.require(token, [FILES[0]], None)


def test_a_verdict_ages_and_does_not_outlive_the_process_that_it_was_given_to(camera: Issuer, tmp_path: Path) -> None:
    config = LivenessConfig(
        issuer=camera.name, audience=camera.audience, jwks="-", max_age_seconds=10, leeway_seconds=1
    )
    keys, now = KeySet(str(camera.write(tmp_path / "jwks.json"))), time.time()
    one = Liveness(config, keys, lambda: now)
    token, unused = (camera.verdict(HASHES[0], iat=now) for _ in range(2))
    now += 10
    one.require(token, [FILES[0]], None)
    restarted = Liveness(config, keys, lambda: now)  # it knows nothing of what was used
    with pytest.raises(NotLive, match="from before this server began"):
        restarted.require(token, [FILES[0]], None)
    now += 3
    with pytest.raises(NotLive, match="older than 10 s"):
        one.require(unused, [FILES[0]], None)


def test_the_file_names_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "liveness.json"
    for text, says in (
        ("{", "line 1 column 2"),
        ('{"issuer": "a", "audience": "b"}', "jwks: Field required"),
        ('{"issuer": "a", "audience": "b", "jwks": "gone.json"}', "gone.json: No such file"),
        ('{"issuer": "a", "audience": "b", "jwks": "http://example.org/keys"}', "Give an https address"),
        ('{"issuer": "a", "audience": "b", "jwks": "x", "detectors": {"d": {"apcer": 2, "bpcer": 0}}}', "apcer"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=says):
            Liveness.read(path)
