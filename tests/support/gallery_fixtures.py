"""A server with galleries for tests: a teacher, two generations of its students, and the teacher that comes next."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from pkd.serving.api.api_keys import ApiKeys
from pkd.serving.core.embedding_codec import encode
from pkd.serving.core.options import Settings
from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.inference.registry import Encoders
from pkd.serving.matching.service import Service
from pkd.toolkit.certificates.certificate import Certificate
from tests.support import serving_bundles as made

MASTER = MasterKey(bytes(range(32)))
CROPS = made.crops(6, seed=7)
ALIGNED = {"aligned": "true"}
PNG = {"content-type": "image/png"}
ANYTHING = {"enrol_sharpness": 0.0}
"""Test patterns are smooth: they would be refused as blurred."""
NDJSON = {"content-type": "application/x-ndjson"}


@dataclass(frozen=True)
class Fleet:
    """``first`` may query the teacher and itself, ``second`` the teacher and both students; of ``second`` against
    ``first`` every threshold is 0.1 higher. ``following`` has a space of its own, ``rogue`` lies in the teacher's space
    and is in no certificate.
    """

    teacher: made.Made
    first: made.Made
    second: made.Made
    rogue: made.Made
    following: made.Made
    folders: list[Path]


def fleet(folder: Path) -> Fleet:
    """Write the bundles."""
    teacher = made.encoder("teacher", made.weights(1))
    space = teacher.info.space
    first = made.encoder("first", made.weights(1, noise=0.2), space)
    second = made.encoder("second", made.weights(1, noise=0.1), space)
    rogue = made.encoder("rogue", made.weights(1, noise=0.3), space)
    following = made.encoder("following", made.weights(5))
    one = made.certificate
    bundles = {
        teacher: [one(teacher.info, teacher.info)],
        first: [one(first.info, teacher.info), one(first.info, first.info)],
        second: [
            one(second.info, teacher.info),
            shifted(one(second.info, first.info), 0.1),
            one(second.info, second.info),
        ],
        rogue: [],
        following: [one(following.info, following.info)],
    }
    folders = [folder / encoder.info.name for encoder in bundles]
    for path, (encoder, certificates) in zip(folders, bundles.items(), strict=True):
        encoder.write(path, certificates)
    return Fleet(teacher, first, second, rogue, following, folders)


def shifted(certificate: Certificate, by: float) -> Certificate:
    """Return the same rates at scores that are ``by`` higher."""
    scores = tuple(score if score < 0 else round(score + by, 6) for score in certificate.calibration.score)

    def moved(part: Any) -> Any:
        return part and part.model_copy(update={"threshold": round(part.threshold + by, 6)})

    points = tuple(
        moved(point).model_copy(update={"as_point": moved(point.as_point), "as_bound": moved(point.as_bound)})
        for point in certificate.points
    )
    calibration = certificate.calibration.model_copy(update={"score": scores})
    changes = {"points": points, "calibration": calibration, "resolved_scores": (scores[0], scores[-1])}
    return certificate.model_copy(update=changes)


def at(cosine: float, axis: int) -> np.ndarray:
    """Make a unit vector at this cosine from the first axis, leaning towards another one."""
    vector = np.zeros(made.DIM)
    vector[0], vector[axis] = cosine, np.sqrt(1 - cosine**2)
    return vector


@contextmanager
def serving(
    fleet: Fleet,
    folder: Path,
    keys: ApiKeys | None = None,
    detector: Any = None,
    policies: Any = None,
    liveness: Any = None,
    attack_detector: Any = None,
    **settings: Any,
) -> Iterator[httpx.Client]:
    """Run the real server on a real store, as a client."""
    store = SqliteStore(folder, MASTER)
    limits = Settings(threads=2, **{**ANYTHING, **settings})
    encoders = Encoders.open(fleet.folders)
    service = Service(encoders, limits, detector, store, policies, liveness, attack_detector=attack_detector)
    try:
        with made.running(service, keys) as client:
            yield client
    finally:
        store.close()


def file(crop: Any) -> dict[str, Any]:
    """Put any crop inside JSON, as aligned."""
    return {"image_b64": base64.b64encode(made.png(crop)).decode(), "aligned": True}


def image(index: int) -> dict[str, str]:
    """Put a crop inside JSON."""
    return {"image_b64": base64.b64encode(made.png(CROPS[index])).decode()}


def embedded(encoder: made.Made, index: int, **more: Any) -> dict[str, Any]:
    """Make a crop as a device sends it."""
    vector = encoder.embed(CROPS[index : index + 1])[0]
    return {"embedding": encode(vector, "b64_f16"), "encoding": "b64_f16", "encoder": encoder.info.id, **more}


def sent(encoder: made.Made, vector: np.ndarray, **more: Any) -> dict[str, Any]:
    """Any vector under an encoder's name."""
    data = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    return {"embedding": data, "encoding": "b64_f32", "encoder": encoder.info.id, **more}


def gallery(client: httpx.Client, name: str, **body: Any) -> str:
    """Create one; its name."""
    answer = client.put(f"/v1/galleries/{name}", json=body)
    assert answer.status_code == 201, answer.text
    return name


def enrol(client: httpx.Client, name: str, subject: str, *inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Enrol; the answer."""
    body = {"inputs": list(inputs), "aligned": True, **more}
    answer = client.post(f"/v1/galleries/{name}/subjects/{subject}/templates", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def problem(answer: httpx.Response, status: int, type: str) -> dict[str, Any]:
    """Check a refusal and return its body. Every 409 says what was expected, what it got and what works."""
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["type"], body["status"]) == (status, type, status), body
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["title"] and body["detail"] and "Traceback" not in answer.text
    if status == 409:
        assert {"expected", "got", "works"} <= set(body), body
    return body


BAD_VECTORS = {
    "NaN": np.full(made.DIM, np.nan),
    "infinity": np.full(made.DIM, np.inf),
    "zero": np.zeros(made.DIM),
    "31 numbers": np.eye(made.DIM)[0, 1:],
    "33 numbers": np.eye(made.DIM + 1)[0],
    "length": np.full(made.DIM, 1e30),
    "0 numbers": np.empty(0),
}
"""What its refusal says → the vector."""
