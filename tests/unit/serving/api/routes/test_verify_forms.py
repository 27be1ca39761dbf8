"""Two photographs by a multipart form, as curl -F a=@one.jpg -F b=@other.jpg sends them."""

from __future__ import annotations

import base64

import httpx
import pytest

from tests.support import gallery_fixtures as made

ONE, OTHER = (made.made.png(crop) for crop in made.CROPS[:2])
OPTIONS = {"aligned": "true", "threshold": "0.5"}


def test_a_form_says_what_json_says(client: httpx.Client) -> None:
    def side(image: bytes) -> dict[str, object]:
        return {"image_b64": base64.b64encode(image).decode(), "aligned": True}

    for second in (ONE, OTHER):
        body = {"a": side(ONE), "b": side(second), "policy": {"target_fmr": 1e-3}}
        form = client.post("/verify", files={"b": second, "a": ONE}, data={"aligned": "true", "target_fmr": "1e-3"})
        expected = client.post("/v1/verify", json=body).json()
        assert form.status_code == 200, form.text
        assert form.json() == expected and expected["match"] == (second is ONE)


def test_which_file_is_the_query_is_told_by_its_name(client: httpx.Client) -> None:
    answer = client.post("/verify", files={"a": ONE, "b": OTHER}, data=OPTIONS)
    assert answer.status_code == 200, answer.text
    turned = client.post("/verify", files={"b": ONE, "a": OTHER}, data=OPTIONS)
    assert answer.json()["match"] == turned.json()["match"] is False


@pytest.mark.parametrize(
    ("files", "data", "said"),
    [
        ([("a", ONE)], {}, "one file field `a`, the query, and one `b`"),
        ([("a", ONE), ("a", OTHER)], {}, "one file field `a`, the query, and one `b`"),
        ([("image", ONE), ("image", OTHER)], {}, "Name each file field `a` or `b`"),
        ([("a", ONE), ("b", ONE)], {"threshold": "true"}, "threshold"),
        ([("a", ONE), ("b", ONE)], {"threshold": "0.5", "target_fmr": "0.1"}, "not both"),
        ([("a", ONE), ("b", ONE)], {"thresold": "0.5"}, "thresold"),
    ],
)
def test_a_form_that_is_something_else_is_refused(
    client: httpx.Client, files: list[tuple[str, bytes]], data: dict[str, str], said: str
) -> None:
    answer = client.post("/verify", files=files, data=data)
    assert (answer.status_code, answer.json()["type"]) == (422, "invalid-request")
    assert said in answer.json()["detail"]
