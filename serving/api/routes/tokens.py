"""Serve /v1/tokens: short-lived tokens that a page or a device is given in place of a key."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter, Request
from pydantic import Field

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import IN_SCOPE, ApiKey, ApiKeys, require
from pkd.serving.api.problems import Forbidden
from pkd.serving.api.request_body import require_json
from pkd.serving.api.tokens import TokenBody, TokenScope
from pkd.serving.core.errors import InvalidRequest, NoGalleries
from pkd.serving.core.schemas import Answer
from pkd.serving.core.validation import parse
from pkd.serving.galleries.description import utc
from pkd.serving.matching.service import Service


class TokenAnswer(Answer):
    """Answer POST /v1/tokens."""

    token: str = Field(description="Sent as `Authorization: Bearer TOKEN`; kept nowhere on the server")
    fragment: str = Field(description="Text to append to the address of the page, which takes it out at once")
    id: str = Field(description="A line `revoked ID` in the file of keys ends the token before its time")
    scopes: list[TokenScope]
    gallery: str
    expires: datetime
    rate: float = Field(description="Most requests a second")


def routes(service: Service, keys: ApiKeys | None) -> APIRouter:
    """Make the route; ``keys``: those of the server."""
    router = APIRouter(tags=["tokens"])

    @router.post(
        "/v1/tokens",
        status_code=201,
        responses=openapi.responses(openapi.NAMED, openapi.LINES, openapi.TAKEN, description="Made", status=201),
        openapi_extra=openapi.json_body(TokenBody, openapi.TOKEN_EXAMPLE),
    )
    async def make_token(request: Request) -> TokenAnswer:
        """Make a token for a page or a device: embeddings only, one gallery, a rate, and an end.

        With the scope `verify` it compares embeddings, searches its gallery and reads the catalogue; with `embed` it
        also has reference pictures embedded. It never does more than the key that makes it, which needs the scope
        `mint` and each scope that it hands on.
        """
        require(request, "mint")
        require_json(request)
        body = parse(TokenBody, await request.body())
        if keys is None:
            raise InvalidRequest("this server asks for no key, so nobody needs a token. Start it with --api-keys.")
        await service.stored(service.store.get, body.gallery)
        if keys.tokens is None:
            raise NoGalleries("this server has no secret to make tokens with. Start it with --master-key.")
        key: ApiKey = request.scope[IN_SCOPE]
        if missing := sorted(set(body.scopes) - key.scopes):
            raise Forbidden(
                f"the key {key.name!r} lacks the scope {missing[0]}, so it cannot hand it on.",
                details={"scope": missing[0], "scopes": sorted(key.scopes)},
            )
        text, token = keys.tokens.mint(key.digest, body)
        shown = {**token.model_dump(exclude={"key"}), "expires": utc(token.expires)}
        return TokenAnswer(token=text, fragment=f"#token={text}", **shown)

    return router
