"""Watch over every certificate that decisions rest on: whether what passes by looks as it promises."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pkd.serving.core.errors import UnknownFile
from pkd.serving.core.gallery_schemas import IdentifyAnswer
from pkd.serving.core.schemas import DriftAnswer, DriftPoint, VerifyAnswer
from pkd.serving.galleries.description import utc
from pkd.serving.galleries.store import Gallery, SearchResult
from pkd.serving.inference.registry import Encoders
from pkd.serving.observability.drift import DriftLedger, Watched
from pkd.serving.observability.metrics import Metrics
from pkd.toolkit.certificates import drift
from pkd.toolkit.certificates.certificate import CertificateFile
from pkd.toolkit.core.encoder_info import short

REPEAT_SECONDS = 3600.0
"""Time in which the same subject counts once: whoever stands before a camera is not drawn again at every frame."""
MOST_REMEMBERED = 100_000
ASSUMPTIONS = (
    "Visits are independent draws from the people of the gallery.",
    "The same subject counts once an hour in each process.",
    "Nobody is enrolled under two names.",
    "A verification against no gallery is taken for one of as many people as were certified.",
)


@dataclass(frozen=True)
class Drift:
    """Hold the state of one certificate."""

    file: CertificateFile
    watched: Watched
    evidence: float

    @property
    def alarm(self) -> bool:
        """Tell whether the promise is taken for broken."""
        return max(self.evidence, self.watched.peak) >= drift.alarm_at()


class DriftMonitor:
    """Observe decisions of one process. Its methods run on the event loop and only count; ``flush`` may wait."""

    def __init__(
        self,
        encoders: Encoders,
        metrics: Metrics,
        ledger: DriftLedger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin. ``ledger``: shared by all processes; without one it is this process's own."""
        self._encoders, self._metrics, self._clock = encoders, metrics, clock
        self._ledger = ledger or DriftLedger()
        self._keys = {pair: hashlib.sha256(file.data).hexdigest() for pair, file in encoders.files.items()}
        self._recent: OrderedDict[int, float] = OrderedDict()
        self.due = False
        """True once there is enough to ``flush``."""

    def identified(
        self, gallery: Gallery, query: str, found: Mapping[str, SearchResult], answer: IdentifyAnswer
    ) -> None:
        """Observe a search: the best subject who is not its answer."""
        matching = [one.subject for one in answer.candidates if one.match]
        right = matching[0] if answer.decision == "match" else None
        first = answer.candidates[0].subject if answer.candidates else None
        if first is None or self._again(gallery.name, first):
            return
        for encoder, result in found.items():
            others = [hit.score for hit in result.hits if hit.subject != right]
            rank = 0 if right is not None else 1
            if len(others) > rank:
                certificate = self._encoders.files[query, encoder].certificate
                seen = drift.searched(certificate, others[rank], result.searched, gallery.subjects)
                self.due |= self._ledger.observe(self._keys[query, encoder], "identify", seen)

    def verified(self, decision: VerifyAnswer, gallery: Gallery | None, subject: str | None) -> None:
        """Observe a verification, against a subject of a gallery or without one."""
        pair = decision.certificate.query, decision.certificate.gallery
        if gallery and subject and self._again(gallery.name, subject):
            return
        certificate = self._encoders.files[pair].certificate
        people = gallery.subjects if gallery else certificate.identities
        seen = drift.verified(certificate, decision.score, decision.threshold, decision.comparisons, people)
        self.due |= self._ledger.observe(self._keys[pair], "verify", seen)

    def flush(self) -> None:
        """Add what was seen to the ledger, and show it as metrics."""
        self.due = False
        concerned = self._ledger.flush()
        for pair, key in self._keys.items():
            if key in concerned:
                self._look(pair)

    def find(self, id: str) -> Drift:
        """Return the state of the certificate with this id, ``QUERY__GALLERY`` by short ids. Raises UnknownFile."""
        for query, gallery in self._keys:
            if f"{short(query)}__{short(gallery)}" == id:
                return self._look((query, gallery))
        raise UnknownFile(
            f"no certificate is called {id!r}. Give QUERY__GALLERY, each as name@ and ten digits of its id.",
            details={"certificates": [f"{short(query)}__{short(gallery)}" for query, gallery in self._keys]},
        )

    def close(self) -> None:
        """Keep what is pending."""
        self._ledger.close()

    def _look(self, pair: tuple[str, str]) -> Drift:
        file, key = self._encoders.files[pair], self._keys[pair]
        watched = self._ledger.watched(key)
        reached = drift.evidence(file.certificate, [sums.logs for sums in watched.sums.values()])
        self._ledger.raise_peak(key, reached)
        found = Drift(file, watched, reached)
        self._metrics.drift(short(pair[0]), short(pair[1]), watched.sums, reached, found.alarm)
        return found

    def _again(self, gallery: str, subject: str) -> bool:
        """Tell whether this subject was seen within the hour. What is remembered is a hash, and no score."""
        now, key = self._clock(), hash((gallery, subject))
        while self._recent and (
            len(self._recent) > MOST_REMEMBERED or now - next(iter(self._recent.values())) > REPEAT_SECONDS
        ):
            self._recent.popitem(last=False)
        if key in self._recent:
            return True
        self._recent[key] = now
        return False


def describe(found: Drift) -> DriftAnswer:
    """Describe the state of a certificate."""
    c, watched = found.file.certificate, found.watched
    thresholds = {point.fmr: point.threshold for point in c.points}
    return DriftAnswer(
        query=c.query,
        gallery=c.gallery,
        since=utc(watched.since),
        alarm=found.alarm,
        evidence=min(found.evidence, 1e300),
        alarm_at=drift.alarm_at(),
        false_alarm_rate=drift.ALPHA,
        observed=[
            DriftPoint(
                kind=kind,
                fmr=fmr,
                threshold=thresholds[fmr],
                observations=round(sums.observed),
                reached=round(sums.exceeded),
                expected=sums.expected,
                at_most=sums.promised,
            )
            for (kind, fmr), sums in sorted(watched.sums.items(), key=lambda one: (one[0][0], -one[0][1]))
        ],
        assumptions=list(ASSUMPTIONS),
    )
