"""Serve the page at / and the files that it loads, each with the headers that keep a browser's tab to itself.

A worker is not covered by the policy of the page that starts it, so every file carries all headers. Addresses are
exact: a file that was not there at the start cannot be asked for.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from pkd.serving.api.problems import RouteNotFound
from pkd.serving.web import FOLDER

PREFIX = "/web/"
"""Path under which the files of ``serving/web`` lie."""
PAGES = {"/": "index.html", "/console": "console/index.html"}
"""Path of each page → its file. A page names its own files by ``web/…``, so it may lie behind a proxy's prefix."""
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
"""Ending of a name → its media type; other files of the folder are not served. Browsers refuse modules of another."""
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self' 'wasm-unsafe-eval'",
        "worker-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "style-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
"""Content security policy: scripts and connections of this server only, WebAssembly, and nothing inline."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}
"""Headers of every page and file. With the second and third a page may use threads (``crossOriginIsolated``)."""


@dataclass(frozen=True)
class _File:
    data: bytes
    etag: str
    media_type: str
    zipped: bool
    """Kept compressed by gzip, and sent so to whoever takes it."""


def is_page(path: str) -> bool:
    """Tell whether a path is that of a page or of one of its files: answered without a key, for they hold no secret."""
    return path in PAGES or path.startswith(PREFIX)


def routes(folder: Path = FOLDER) -> APIRouter:
    """Make the routes of the pages and files that lie in ``folder`` now; they are kept in memory."""
    files = dict(_read(folder))
    router = APIRouter(include_in_schema=False)

    def show(name: str) -> None:
        async def page(request: Request) -> Response:
            return await _answer(request, files[name])

        router.add_api_route(next(path for path, one in PAGES.items() if one == name), page, name=name)

    for name in PAGES.values():
        if name in files:
            show(name)

    @router.get(PREFIX + "{name:path}")
    async def web_file(request: Request, name: str) -> Response:
        if name not in files:
            raise RouteNotFound(f"GET {PREFIX}{name[:200]}: Not Found.")
        return await _answer(request, files[name])

    return router


def _read(folder: Path) -> list[tuple[str, _File]]:
    found = []
    for path in sorted(folder.rglob("*")):
        zipped = path.suffix == ".gz"
        name = path.relative_to(folder).as_posix().removesuffix(".gz")
        if path.is_file() and (kind := TYPES.get(Path(name).suffix)):
            data = path.read_bytes()
            found.append((name, _File(data, f'"{hashlib.sha256(data).hexdigest()[:32]}"', kind, zipped)))
    return found


async def _answer(request: Request, file: _File) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    sent = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    if file.etag in sent or "*" in sent:
        return Response(status_code=304, headers=headers)
    data = file.data
    if file.zipped and _takes_gzip(request.headers.get("accept-encoding", "")):
        headers["Content-Encoding"] = "gzip"
    elif file.zipped:
        data = await run_in_threadpool(gzip.decompress, data)
    return Response(data, headers=headers, media_type=file.media_type)


def _takes_gzip(accepted: str) -> bool:
    """Read an Accept-Encoding header: whether gzip is in it, and not with a weight of nothing."""
    for one in accepted.lower().split(","):
        coding, *parameters = [part.strip().replace(" ", "") for part in one.split(";")]
        if coding in ("gzip", "x-gzip", "*"):
            return not any(part in ("q=0", "q=0.0", "q=0.00", "q=0.000") for part in parameters)
    return False
