"""Serve /v1/audit: who changed which gallery, and whether the log is as it was written."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated

from fastapi import APIRouter, Query, Request

from pkd.serving.api import openapi
from pkd.serving.api.api_keys import require
from pkd.serving.api.routes.parameters import Limit
from pkd.serving.core.errors import InvalidRequest
from pkd.serving.core.gallery_schemas import AuditAnswer, AuditRecord, ChainAnswer
from pkd.serving.galleries.audit import Head, Record
from pkd.serving.matching.service import Service
from pkd.toolkit.core.errors import NotTrusted

Before = Annotated[int | None, Query(ge=1, description="The `next` of the page before")]
NotedSequence = Annotated[int | None, Query(ge=1, description="Sequence of a head that was noted outside")]
NotedHash = Annotated[str | None, Query(pattern="^[0-9a-f]{64}$", description="Hash of that head")]


def routes(service: Service) -> APIRouter:
    """Make both routes."""
    router = APIRouter(tags=["audit"])

    @router.get("/v1/audit", responses=openapi.responses(openapi.NO_STORE, openapi.READ))
    async def list_audit(request: Request, before: Before = None, limit: Limit = 100) -> AuditAnswer:
        """List a page of the audit log, newest first. With Milvus it is the log of the machine that answers."""
        require(request, "admin")
        found = await service.stored(service.store.audit_records, before, limit + 1)
        shown = found[:limit]
        return AuditAnswer(
            records=[_describe(one) for one in shown], next=shown[-1].sequence if len(found) > limit else None
        )

    @router.get("/v1/audit/check", responses=openapi.responses(openapi.NO_STORE, openapi.READ))
    async def check_audit(
        request: Request, noted_sequence: NotedSequence = None, noted_hash: NotedHash = None
    ) -> ChainAnswer:
        """Walk the chain of hashes. With a head that was noted outside, a log whose end was cut off shows, too."""
        require(request, "admin")
        if (noted_sequence is None) != (noted_hash is None):
            raise InvalidRequest("give both noted_sequence and noted_hash, or neither.")
        noted = Head(noted_sequence, noted_hash) if noted_sequence is not None and noted_hash is not None else None
        try:
            head = await service.stored(service.store.verify_audit, noted)
        except NotTrusted as error:
            return ChainAnswer(whole=False, sequence=None, hash=None, fault=str(error))
        return ChainAnswer(whole=True, sequence=head.sequence, hash=head.hash, fault=None)

    return router


def _describe(one: Record) -> AuditRecord:
    return AuditRecord.model_validate(
        {
            **vars(one),
            "time": datetime.fromtimestamp(one.time / 1e6, timezone.utc),
            "subject": one.subject.hex() if one.subject else None,
            "hash": one.hash.hex(),
        }
    )
