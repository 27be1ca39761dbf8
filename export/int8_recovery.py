"""Tries: what is changed about INT8 until it passes its gate. First the costliest layers in float32, then the weights.

1, 2, 4, 8 … layers, up to a quarter of them: with more in float32 the device runs little of the network in INT8. And
only while the file is at most half of the fp32 one: from there on fp16 is as small and loses nothing.

The gate sees the same people every time, so that one of several tries may pass by luck. The first is judged by the
95 % interval, as always; the others, at most K, share another 5 % (Bonferroni): each is judged by its 1 − 0.05/K
interval. What truly loses more than was allowed then passes with a chance of at most 5 %, however many tries there are:
2.5 % and 2.5 %, since only upper ends decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pkd.export.checks.gate import Gate, Judged
from pkd.export.checks.parity import ParityRow
from pkd.export.formats.registry import TARGETS, Made
from pkd.export.graph.precision_variants import Form, TypedGraphs
from pkd.export.qat import Qat

MOST_LAYERS = 4
"""One of this many layers may stay in float32."""
MOST_BYTES = 2
"""One of this many bytes of the fp32 file may be left."""
Pairs = Sequence[tuple[str, str]]
"""Format and precision."""


@dataclass
class Tries:
    """Judges what was made, and makes the INT8 targets that fail again, otherwise."""

    gate: Gate
    graphs: TypedGraphs
    build: Callable[[Pairs], Made]
    qat: Qat | None
    """Retrains, after layers in float32 were not enough; None: nothing does."""

    def run(self, made: Made, pairs: Pairs) -> tuple[Made, list[Judged]]:
        """What is left in the end, and every row on the way. ``made``: all of ``pairs``, as they were ordered."""
        judged = self.gate.judge(made.encoders)
        if self.graphs.calibration is None:  # INT8 graphs of an older bundle, if any: nothing to make others of
            return made, judged
        forms = dict.fromkeys(TARGETS[format].form for format, precision in pairs if precision == "int8")
        for form in forms:
            own = [(format, p) for format, p in pairs if p == "int8" and TARGETS[format].form == form]
            if _passed(judged, made.rows, own):
                continue
            level = 1 - 0.05 / max(1, self._planned(form))
            for tried in self._changes(form):
                again = self.build(own)
                made = made.replaced(again)
                latest = self.gate.judge(again.encoders, tried, level)
                judged += latest
                if _passed(latest, again.rows, own):
                    break
        return made, judged

    def _changes(self, form: Form) -> Iterator[str]:
        """Change ``graphs`` and say what was changed, as long as anything makes sense."""
        yield from self._mixed(form, "")
        if self.qat:
            self.graphs.retrain(form, self.qat.retrain(form))
            trained = f"trained on for {self.qat.order.steps} steps"
            yield trained
            yield from self._mixed(form, f"{trained}, ")

    def _mixed(self, form: Form, before: str) -> Iterator[str]:
        for count in self._counts(form):
            if not self._small(form):  # before layers are measured, and more of them can only make it larger
                return
            self.graphs.leave(form, count)
            if not self._small(form):
                return
            yield f"{before}{count} layer{'s' if count > 1 else ''} in float32"

    def _small(self, form: Form) -> bool:
        made, plain = self.graphs.get("int8", form).data, self.graphs.get("fp32", form).data
        return len(made) * MOST_BYTES <= len(plain)

    def _counts(self, form: Form) -> list[int]:
        """Numbers of layers to leave in float32; none where a number was ordered."""
        if self.graphs.keep_float:
            return []
        most = max(1, self.graphs.layers(form) // MOST_LAYERS)
        return [1 << power for power in range(most.bit_length())]

    def _planned(self, form: Form) -> int:
        """The most tries after the first, known before any."""
        mixed = len(self._counts(form))
        return mixed + (1 + mixed if self.qat else 0)


def _passed(judged: Sequence[Judged], rows: Sequence[ParityRow], pairs: Pairs) -> bool:
    """Whether every target of ``pairs`` passes gate and parity: what parity refuses may be rescued, too."""
    names = {f"{TARGETS[format].runtime}-{precision}" for format, precision in pairs}
    ok = all(each.row.passed for each in judged if each.row.target in names)
    return ok and all(row.passed for row in rows if row.graph in names)
