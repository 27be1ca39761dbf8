"""Count what /metrics gives Prometheus. Labels come from fixed sets: no path, key, gallery or subject in them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from pkd.toolkit.core.encoder_info import short

if TYPE_CHECKING:
    from pkd.serving.galleries.store import Gallery
    from pkd.serving.observability.drift import Kind, Sums

SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Variable that names the folder of shared numbers; prometheus_client reads it when it is imported."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
DECISIONS = frozenset({"match", "no_match", "ambiguous"})
NO_ROUTE = "none"
"""Route of a request that was refused before or by the router."""
OTHER = "other"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
MICRO = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024)
SIZES = (1, 2, 4, 8, 16, 32)
MAX_PENDING = 1000
"""Most numbers that are yet to be counted."""
PAIR = ("query", "gallery", "kind", "fmr")
"""Labels of what is counted for a certificate."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Count for one Service.

    With ``PROMETHEUS_MULTIPROC_DIR`` set, ``page`` shows the sum over all worker processes.
    """

    def __init__(self, encoders: Sequence[str] = ()) -> None:
        """Begin at zero. ``encoders``: short ids of the loaded ones; every other one is counted as ``other``."""
        self.in_progress = 0
        """Requests that have come in and are not answered yet; the middleware counts them."""
        self.waiting = 0
        """Images that wait for a worker thread; the thread pool counts them."""
        self._encoders = frozenset(encoders)
        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        self._pending: deque[tuple[Callable[[float], None], float]] = deque()
        self._folding = Lock()
        self._refusal_types: set[str] = set()
        self._registry = registry = CollectorRegistry()

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"pkd_{name}", says, labels, registry=registry)

        def histogram(name: str, says: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"pkd_{name}", says, labels, buckets=buckets, registry=registry)

        def gauge(name: str, says: str, mode: str, *labels: str) -> Gauge:
            return Gauge(f"pkd_{name}", says, labels, registry=registry, multiprocess_mode=mode)  # type: ignore[arg-type]

        self._requests = counter("requests", "Requests answered", "method", "route", "status")
        self._latency = histogram("request_seconds", "From the first byte of a request to the end", SECONDS, "route")
        self._refusals = counter("refusals", "Refusals by problem type", "type")
        self._decisions = counter("decisions", "Outcomes of verify and identify", "kind", "outcome")
        self._abandoned = counter("abandoned", "Requests whose client left before the answer")
        self._inside = gauge("requests_in_progress", "Requests being received, waiting or worked on", "livesum")
        self._waiting = gauge("queue_depth", "Images that wait for a worker thread", "livesum")
        self._waited = histogram("queue_seconds", "Time an image waits for a worker thread", SECONDS)
        self._inference = histogram("inference_seconds", "Time in the encoder, per batch", MICRO, "encoder")
        self._batch = histogram("batch_size", "Crops given to the encoder at once", SIZES, "encoder")
        self._galleries = gauge("galleries", "Galleries", "livemostrecent")
        self._subjects = gauge("gallery_subjects", "Subjects in all galleries", "livemostrecent")
        self._templates = gauge("gallery_templates", "Templates in all galleries", "livemostrecent", "encoder")
        recent, pair = "livemostrecent", PAIR[:2]
        self._drift_observed = gauge("drift_observations", "Decisions held against a certificate", recent, *PAIR)
        self._drift_reached = gauge("drift_reached", "Of these, those that reached the operating point", recent, *PAIR)
        self._drift_at_most = gauge("drift_at_most", "Most that should have, by the certificate", recent, *PAIR)
        self._drift_evidence = gauge("drift_evidence", "Evidence against a certificate; 1 at first", recent, *pair)
        self._drift_alarm = gauge("drift_alarm", "1 where a certificate is taken for broken", recent, *pair)
        self.store_up = gauge("store_up", "1 where the galleries can be read and written", "livemostrecent")
        self._expired = counter("templates_expired", "Templates deleted because their time was over")
        self.ready = gauge("ready_workers", "Worker processes that answer", "livesum")

    def request(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count an answered request. ``route``: its template, ``/v1/galleries/{gallery}``, never its path."""
        route = route or NO_ROUTE
        self._record_later(
            self._child(self._requests, method if method in METHODS else OTHER, route, str(status)).inc, 1
        )
        self._record_later(self._child(self._latency, route).observe, seconds)

    def expect_refusals(self, types: Iterable[str]) -> None:
        """Show a count of zero for these problem types, so that a rate over the first refusal is right."""
        self._refusal_types |= set(types)
        for type in self._refusal_types:
            self._refusals.labels(type)

    def refusal(self, type: str) -> None:
        """Count a problem that was sent; inside a bulk answer, too. One that was not expected counts as ``other``."""
        self._refusals.labels(type if type in self._refusal_types else OTHER).inc()

    def abandoned(self) -> None:
        """Count a client that went away before it had its answer."""
        self._abandoned.inc()

    def decision(self, kind: str, outcome: str) -> None:
        """Count a decision. ``kind``: verify or identify. ``outcome``: match, no_match or ambiguous."""
        if kind not in ("verify", "identify") or outcome not in DECISIONS:
            raise ValueError(f"no decision {kind} {outcome}")
        self._decisions.labels(kind, outcome).inc()

    def inference(self, encoder: str, crops: int, seconds: float) -> None:
        """Count one call of an encoder, by its short id."""
        label = self._label(encoder)
        self._record_later(self._child(self._inference, label).observe, seconds)
        self._record_later(self._child(self._batch, label).observe, crops)

    def waited(self, seconds: float) -> None:
        """Count how long an image has waited for a worker thread."""
        self._record_later(self._waited.observe, seconds)

    def galleries(self, galleries: Sequence[Gallery], expired: int = 0) -> None:
        """Show what the store holds now, and count the templates it has just deleted because their time was over."""
        self._galleries.set(len(galleries))
        self._subjects.set(sum(gallery.subjects for gallery in galleries))
        for label, count in self._by_encoder([gallery.templates for gallery in galleries]).items():
            self._templates.labels(label).set(count)
        self._expired.inc(expired)

    def drift(
        self, query: str, gallery: str, sums: Mapping[tuple[Kind, float], Sums], evidence: float, alarm: bool
    ) -> None:
        """Show how a certificate, named by the short ids of its pair, compares with what was seen."""
        for (kind, fmr), one in sums.items():
            labels = query, gallery, kind, f"{fmr:g}"
            self._drift_observed.labels(*labels).set(one.observed)
            self._drift_reached.labels(*labels).set(one.exceeded)
            self._drift_at_most.labels(*labels).set(one.promised)
        self._drift_evidence.labels(query, gallery).set(evidence)
        self._drift_alarm.labels(query, gallery).set(alarm)

    def fold(self) -> None:
        """Bring the numbers up to date, for pages that other processes of this server answer."""
        with self._folding:
            while self._pending:
                record, amount = self._pending.popleft()
                record(amount)
            self._inside.set(self.in_progress)
            self._waiting.set(self.waiting)

    def page(self) -> bytes:
        """Write all of it in Prometheus' text format."""
        self.fold()
        registry = self._registry
        if os.environ.get(SHARED):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _record_later(self, record: Callable[[float], None], amount: float) -> None:
        """Count later, with many others.

        Five numbers a request, counted between two inferences that sweep the caches, cost several times what they cost
        one after another.
        """
        self._pending.append((record, amount))
        if len(self._pending) >= MAX_PENDING:
            self.fold()

    def _child(self, metric: Any, *labels: str) -> Any:
        """Return ``metric.labels(*labels)``, remembered: that takes a lock and writes every label as text again."""
        if (found := self._children.get((metric, labels))) is None:
            found = self._children[metric, labels] = metric.labels(*labels)
        return found

    def _by_encoder(self, templates: Sequence[Mapping[str, int]]) -> Mapping[str, int]:
        counts = dict.fromkeys([*sorted(self._encoders), OTHER], 0)
        for each in templates:
            for id, count in each.items():
                counts[self._label(short(id))] += count
        return counts

    def _label(self, encoder: str) -> str:
        return encoder if encoder in self._encoders else OTHER
