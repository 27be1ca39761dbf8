"""The peer of benchmarks/serving_cost.py: LitServe around the same decoder and encoder.

Run as: python benchmarks/peers/litserve_server.py PORT BUNDLE WORKERS
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import cv2
import litserve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving_cost import embedder


class Embed(litserve.LitAPI):  # type: ignore[misc]
    """At module level, because LitServe pickles it for its workers."""

    def setup(self, device: str) -> None:
        """Once in every worker."""
        cv2.setNumThreads(1)
        self.embed = embedder(Path(sys.argv[2]))

    def decode_request(self, request: dict[str, str]) -> bytes:
        """JSON → the file's bytes."""
        return base64.b64decode(request["image"])

    def predict(self, image: bytes) -> bytes:
        """Decode, encode, write as ``b64_f16``."""
        return self.embed(image)

    def encode_response(self, vector: bytes) -> dict[str, str]:
        """JSON."""
        return {"embedding": vector.decode()}


if __name__ == "__main__":
    server = litserve.LitServer(Embed(), accelerator="cpu", workers_per_device=int(sys.argv[3]), fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="error", generate_client_file=False)
