"""Parity: does the exported graph compute the network it came from, whatever the batch?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from pkd.export.quantization.quantize import similarity_rms
from pkd.toolkit.core.errors import BadVector, GateFailed, InputError
from pkd.toolkit.core.models import Record
from pkd.toolkit.encoders.base import Embeddings, make_session, ort_reason
from pkd.toolkit.images.codec import Rgb

BATCHES = (1, 2, 7, 32)


class Limits(Record):
    """What a graph may differ from its source by. Only fp32 is judged by them; in other precisions they find graphs
    that compute something else, and accuracy is a matter of the gate."""

    max_abs: float
    """Of one coordinate of unit embeddings, to the source and to the same crop embedded alone."""
    worst_cosine: float
    norm_error: float


LIMITS: dict[str, Limits] = {
    "fp32": Limits(max_abs=5e-5, worst_cosine=1 - 1e-6, norm_error=1e-5),  # rounding: 1e-6 to 1e-5 in deep networks
    "fp16": Limits(max_abs=2e-2, worst_cosine=0.999, norm_error=1e-5),  # 2^-11 a rounding; the length is in float32
    "bf16": Limits(max_abs=0.1, worst_cosine=0.98, norm_error=2e-2),  # 2^-8, also of the length
    "int8": Limits(max_abs=0.5, worst_cosine=0.5, norm_error=1e-5),
}


class ParityRow(Record):
    """One graph at one batch size against its source."""

    graph: str
    precision: str = "fp32"
    batch: int
    max_abs: float
    """Largest difference of one coordinate to the source's unit embedding."""
    worst_cosine: float
    norm_error: float
    """Largest |1 − length| of a row as the graph gives it."""
    invariance: float
    """Largest difference of one coordinate to the same crop embedded alone."""
    similarity_rms: float | None = None
    """Root mean square difference of the cosines of all pairs in the batch to the source's; None for a batch of one."""

    @property
    def passed(self) -> bool:
        """True within every limit."""
        limits = LIMITS[self.precision]
        return (
            self.max_abs <= limits.max_abs
            and self.worst_cosine >= limits.worst_cosine
            and self.norm_error <= limits.norm_error
            and self.invariance <= limits.max_abs
        )


def measure(
    graph: str,
    expected: Embeddings,
    crops: Rgb,
    embed: Callable[[Rgb], NDArray[np.float32]],
    precision: str = "fp32",
) -> list[ParityRow]:
    """Compare raw outputs of ``embed`` with ``expected`` (N×D unit rows of the source) at every batch size.

    ``crops``: uint8 N×S×S×3, N at least the largest batch. Raises BadVector if the graph gives no finite N×D.
    """
    alone = np.concatenate([embed(crops[i : i + 1]) for i in range(max(BATCHES))])
    rows = []
    for batch in BATCHES:
        made = embed(crops[:batch])
        reference = expected[:batch].astype(np.float64)
        if made.shape != reference.shape or not np.isfinite(made).all():
            raise BadVector(f"{graph}: batch {batch} gives {made.shape} or not a number, expected {reference.shape}.")
        norms = np.linalg.norm(made.astype(np.float64), axis=1)
        cosines = np.sum(made * reference, axis=1) / (norms * np.linalg.norm(reference, axis=1))
        rows.append(
            ParityRow(
                graph=graph,
                precision=precision,
                batch=batch,
                max_abs=float(np.abs(made - reference).max()),
                worst_cosine=float(cosines.min()),
                norm_error=float(np.abs(norms - 1).max()),
                invariance=float(np.abs(made - alone[:batch]).max()),
                similarity_rms=_rms(made / norms[:, None], expected[:batch]),
            )
        )
    return rows


def _rms(rows: NDArray[np.float64], expected: Embeddings) -> float | None:
    return similarity_rms(rows.astype(np.float32), expected) if len(rows) > 1 else None


def onnx_runner(
    model: bytes, feed: Callable[[Rgb], NDArray[np.generic]], source: str
) -> Callable[[Rgb], NDArray[np.float32]]:
    """Run ``model`` in onnxruntime on crops prepared by ``feed``: raw outputs. Raises InputError if it cannot run."""
    try:
        session = make_session(model, 1)
    except Exception as error:  # onnxruntime's errors share no public base class
        raise InputError(f"{source}: the exported graph does not load: {ort_reason(error)}") from None
    name = session.get_inputs()[0].name

    def embed(crops: Rgb) -> NDArray[np.float32]:
        try:
            (rows,) = session.run(None, {name: feed(crops)})
            reason = f"gives {len(rows)} rows."
        except Exception as error:
            rows, reason = (), ort_reason(error)
        if len(rows) != len(crops):
            raise InputError(
                f"{source}: its graph does not run on a batch of {len(crops)}: {reason} "
                "Export the network to ONNX again with a dynamic batch dimension."
            )
        return np.asarray(rows, np.float32)

    return embed


def insightface_blob(crops: Rgb) -> NDArray[np.float32]:
    """uint8 N×S×S×3 RGB → float32 N×3×S×S, (value − 127.5) / 127.5: what the float graph takes."""
    return np.ascontiguousarray(((crops.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2))


def parity_table(rows: Sequence[ParityRow]) -> Table:
    """For people: one line per graph, with the worst over its batches."""
    batches = ", ".join(str(batch) for batch in BATCHES)
    table = Table(title=f"parity with the source, worst of batch {batches}", title_justify="left", pad_edge=False)
    for heading in ("graph", "max abs", "1 − cosine", "pairs RMS", "norm error", "batch vs alone", ""):
        table.add_column(heading, no_wrap=heading == "graph")
    for graph in dict.fromkeys(row.graph for row in rows):
        own = [row for row in rows if row.graph == graph]
        figures = (
            max(row.max_abs for row in own),
            1 - min(row.worst_cosine for row in own),
            max(row.similarity_rms or 0 for row in own),
            max(row.norm_error for row in own),
            max(row.invariance for row in own),
        )
        verdict = "ok" if all(row.passed for row in own) else "FAILED"
        table.add_row(graph, *(f"{value:.1e}" for value in figures), verdict)
    return table


def require(rows: Sequence[ParityRow]) -> None:
    """Raise GateFailed naming the worst row unless all passed."""
    failed = [row for row in rows if not row.passed]
    if failed:
        worst = max(failed, key=lambda row: row.max_abs / LIMITS[row.precision].max_abs)
        raise GateFailed(
            f"parity: {worst.graph} at batch {worst.batch} is {worst.max_abs:.1e} away from its source (allowed "
            f"{LIMITS[worst.precision].max_abs:.0e}; worst cosine {worst.worst_cosine:.6f}, norm error "
            f"{worst.norm_error:.1e}, batch invariance "
            f"{worst.invariance:.1e}; {len(failed)} of {len(rows)} checks failed). Nothing was written."
        )
