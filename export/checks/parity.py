"""Check parity: whether an exported graph computes the network that it came from, whatever the batch.

The crops are drawings of people who do not exist; bundles carry the first of them as golden crops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from pkd.export.quantization.quantize import similarity_rms
from pkd.toolkit.core.errors import BadVector, GateFailed, InputError
from pkd.toolkit.core.models import Record
from pkd.toolkit.encoders.base import Embeddings, make_session, ort_reason
from pkd.toolkit.images.codec import Rgb
from pkd.toolkit.synthetic.faces import SIZE, face

BATCHES = (1, 2, 7, 32)
GOLDEN_COUNT = 8
"""Golden crops in a bundle: enough to notice a wrong channel order or scale, few enough for a phone."""
GOLDEN_TOLERANCE = 1e-5
"""Allowed 1 − cosine of golden embeddings in fp32. Runtimes differ by 1e-7; bf16, another scale or channel order by
1e-4 in trained networks."""


def synthetic_crops(count: int, size: int) -> Rgb:
    """Draw uint8 count×size×size×3 RGB crops, the same on every call."""
    crops = [face(seed=20151, person=i, image=0) for i in range(count)]
    if size != SIZE:
        crops = [cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA).astype(np.uint8) for crop in crops]
    return np.stack(crops)


class Limits(Record):
    """Say how far a graph may be from its source.

    Only fp32 is judged by them. In other precisions they find graphs that compute something else; whether those are
    accurate enough, the gate decides.
    """

    max_abs: float
    """Largest difference of one coordinate of unit embeddings, to the source and to the same crop embedded alone."""
    worst_cosine: float
    norm_error: float


LIMITS: dict[str, Limits] = {
    "fp32": Limits(max_abs=5e-5, worst_cosine=1 - 1e-6, norm_error=1e-5),  # rounding: 1e-6 to 1e-5 in deep networks
    "fp16": Limits(max_abs=2e-2, worst_cosine=0.999, norm_error=1e-5),  # 2^-11 a rounding; the length is in float32
    "bf16": Limits(max_abs=0.1, worst_cosine=0.98, norm_error=2e-2),  # 2^-8, also of the length
    "w8a16": Limits(max_abs=0.3, worst_cosine=0.8, norm_error=1e-5),  # weights alone are coarse
    "int8": Limits(max_abs=0.5, worst_cosine=0.5, norm_error=1e-5),
}


class ParityRow(Record):
    """Compare one graph at one batch size with its source."""

    graph: str
    precision: str = "fp32"
    built: bool = True
    """False where the graph alone was checked, in onnxruntime, because the target could not be built here."""
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
        """Whether every figure is within its limit."""
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
    *,
    built: bool = True,
) -> list[ParityRow]:
    """Compare raw outputs of ``embed`` with ``expected`` (N×D unit rows of the source) at every batch size.

    ``crops``: uint8 N×S×S×3, N at least the largest batch. Raises BadVector if the graph gives no finite N×D.
    """
    alone = np.concatenate([embed(crops[i : i + 1]) for i in range(max(BATCHES))])
    rows = []
    for batch in BATCHES:
        made = embed(crops[:batch])
        reference = expected[:batch].astype(np.float64)
        if made.shape != reference.shape or not np.isfinite(made).all() or not np.isfinite(alone).all():
            raise BadVector(f"{graph}: batch {batch} gives {made.shape} or not a number, expected {reference.shape}.")
        norms = np.linalg.norm(made.astype(np.float64), axis=1)
        if not norms.all():
            raise BadVector(f"{graph}: batch {batch} gives embeddings of length 0. Do not use this network.")
        unit = (made / norms[:, None]).astype(np.float32)
        cosines = np.sum(made * reference, axis=1) / (norms * np.linalg.norm(reference, axis=1))
        rows.append(
            ParityRow(
                graph=graph,
                precision=precision,
                built=built,
                batch=batch,
                max_abs=float(np.abs(made - reference).max()),
                worst_cosine=float(cosines.min()),
                norm_error=float(np.abs(norms - 1).max()),
                invariance=float(np.abs(made - alone[:batch]).max()),
                similarity_rms=similarity_rms(unit, expected[:batch]) if batch > 1 else None,
            )
        )
    return rows


def onnx_runner(
    model: bytes, feed: Callable[[Rgb], NDArray[np.generic]], source: str
) -> Callable[[Rgb], NDArray[np.float32]]:
    """Open ``model`` in onnxruntime; the returned function runs it on crops prepared by ``feed`` and gives raw rows.

    Both raise InputError where the model cannot run. ``source`` is named in errors.
    """
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
    """Scale uint8 N×S×S×3 RGB to float32 N×3×S×S, (value − 127.5) / 127.5, as the float graph takes it."""
    return np.ascontiguousarray(((crops.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2))


def parity_table(rows: Sequence[ParityRow]) -> Table:
    """Lay out one line per graph for the console, the worst over its batches, and the limits of each precision."""
    batches = ", ".join(str(batch) for batch in BATCHES)
    table = Table(title=f"parity with the source, worst of batch {batches}", title_justify="left", pad_edge=False)
    for heading in ("graph", "max abs", "1 − cosine", "pairs RMS", "norm error", "batch vs alone", ""):
        table.add_column(heading, no_wrap=heading in ("graph", ""))
    for precision in dict.fromkeys(row.precision for row in rows):
        same = [row for row in rows if row.precision == precision]
        for graph in dict.fromkeys(row.graph for row in same):
            own = [row for row in same if row.graph == graph]
            figures = (
                max(row.max_abs for row in own),
                1 - min(row.worst_cosine for row in own),
                max(row.similarity_rms or 0 for row in own),
                max(row.norm_error for row in own),
                max(row.invariance for row in own),
            )
            verdict = "FAILED" if not all(row.passed for row in own) else "ok" if own[0].built else "not built"
            table.add_row(graph, *(f"{value:.1e}" for value in figures), verdict)
        limit = LIMITS[precision]
        allowed = (f"{limit.max_abs:.0e}", f"{1 - limit.worst_cosine:.0e}", "–", f"{limit.norm_error:.0e}")
        table.add_row(f"limits of {precision}", *allowed, f"{limit.max_abs:.0e}", "", style="dim", end_section=True)
    return table


def require_parity(rows: Sequence[ParityRow]) -> None:
    """Raise GateFailed naming the worst row, its figures and their limits, unless all passed."""
    failed = [row for row in rows if not row.passed]
    if failed:
        worst = max(failed, key=lambda row: row.max_abs / LIMITS[row.precision].max_abs)
        limits = LIMITS[worst.precision]
        remedy = (
            ""
            if worst.precision == "fp32"
            else (
                f" This network does not survive {worst.precision} there: choose another --precision for it"
                + (
                    ", or leave its costliest layers in float32 with --keep-float N."
                    if worst.precision == "int8"
                    else "."
                )
            )
        )
        raise GateFailed(
            f"parity: {worst.graph} at batch {worst.batch} is {worst.max_abs:.1e} away from its source (allowed "
            f"{limits.max_abs:.0e}), worst cosine {worst.worst_cosine:.6f} (allowed {limits.worst_cosine:g}), norm "
            f"error {worst.norm_error:.1e} (allowed {limits.norm_error:.0e}), batch invariance {worst.invariance:.1e} "
            f"(allowed {limits.max_abs:.0e}); {len(failed)} of {len(rows)} checks failed. Nothing was written.{remedy}"
        )
