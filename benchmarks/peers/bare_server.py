"""The least that HTTP can cost, for benchmarks/serving_cost.py: uvicorn and a thread pool, no framework, no checks.

Run as: python benchmarks/peers/bare_server.py PORT BUNDLE YUNET WORKERS
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving_cost import embedder, whole


def main() -> None:
    """Serve until killed; a path with ``aligned`` in its query takes crops, others photographs."""
    port, bundle, workers = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4])
    cv2.setNumThreads(1)
    crops, photographs, pool = embedder(bundle), whole(bundle), ThreadPoolExecutor(workers)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        more = scope["method"] == "POST"
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        embed = crops if b"aligned" in scope["query_string"] else photographs
        vector = await asyncio.get_running_loop().run_in_executor(pool, embed, body) if body else b""
        answer = b'{"embedding":"' + vector + b'"}'
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    uvicorn.run(app, host="127.0.0.1", port=port, lifespan="off", access_log=False, log_level="error")


if __name__ == "__main__":
    main()
