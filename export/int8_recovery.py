"""Change INT8 targets until they pass their gate: first the costliest layers in float32, then weights trained on.

1, 2, 4, 8 … layers are left in float32, up to a quarter of them: with more, the device runs little of the network in
INT8. And only while the file is at most half of the fp32 one: from there on fp16 is as small and loses nothing.

The gate sees the same people every time, so that one of several tries may pass by luck. The first is judged by the
95 % interval, as always; the others, at most K, share another 5 % (Bonferroni): each is judged by its 1 − 0.05/K
interval. A target that truly loses more than was allowed then passes with a chance of at most 5 %, however many tries
there are: 2.5 % and 2.5 %, since only upper ends decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pkd.export.checks.gate import Gate, GateResult
from pkd.export.checks.parity import ParityRow
from pkd.export.formats.registry import BuildResults, TargetBuilder, TargetRequest
from pkd.export.graph.build import torch_network, uint8_graph
from pkd.export.graph.precision_variants import GraphForm, Int8Weights, PrecisionVariants
from pkd.export.quantization.quantize import INT8_TYPES
from pkd.export.quantization.ranges import BATCH, Activations, Calibration, Ranges, choose_ranges
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.progress import Progress
from pkd.toolkit.encoders.base import batches

if TYPE_CHECKING:
    from pkd.toolkit.distill.config import DistillConfig
    from pkd.toolkit.distill.quantization.fake_quant import Int8Student
    from pkd.toolkit.distill.training.setup import Prepared

MOST_LAYERS = 4
"""One of this many layers may stay in float32."""
MOST_BYTES = 2
"""One of this many bytes of the fp32 file may be left."""


def recover_int8(
    requests: Sequence[TargetRequest], built: BuildResults, gate: Gate, builder: TargetBuilder, qat: Retrainer | None
) -> tuple[BuildResults, list[GateResult]]:
    """Judge what was ``built`` for ``requests``, and build the INT8 targets that fail again, otherwise.

    Returns the targets as they are in the end, and the gate's result of every try. ``qat`` trains on where layers in
    float32 were not enough; None: nothing does.
    """
    judged = gate.judge(built.encoders)
    variants = builder.variants
    if variants.calibration is None:  # INT8 graphs of an older bundle, if any: nothing to make others of
        return built, judged
    for form in dict.fromkeys(request.format.form for request in requests if request.precision == "int8"):
        own = [request for request in requests if request.precision == "int8" and request.format.form == form]
        if _passed(own, judged, built.parity):
            continue
        level = 1 - 0.05 / max(1, _most_tries(variants, form, qat))
        for change in _changes(variants, form, qat):
            again = builder.build(own)
            built = built.replaced(again)
            latest = gate.judge(again.encoders, change, level)
            judged += latest
            if _passed(own, latest, again.parity):
                break
    return built, judged


def _passed(requests: Sequence[TargetRequest], judged: Sequence[GateResult], parity: Sequence[ParityRow]) -> bool:
    """Whether every target passes gate and parity: what parity refuses may be rescued, too."""
    names = {request.name for request in requests}
    ok = all(result.row.passed for result in judged if result.row.target in names)
    return ok and all(row.passed for row in parity if row.graph in names)


def _changes(variants: PrecisionVariants, form: GraphForm, qat: Retrainer | None) -> Iterator[str]:
    """Change ``variants`` step by step, as long as that makes sense, and say what was changed."""
    yield from _more_in_float(variants, form, "")
    if qat:
        variants.use_weights(form, qat.retrain(form))
        trained = f"trained on for {qat.steps} steps"
        yield trained
        yield from _more_in_float(variants, form, f"{trained}, ")


def _more_in_float(variants: PrecisionVariants, form: GraphForm, before: str) -> Iterator[str]:
    for count in _layer_counts(variants, form):
        if not _small(variants, form):  # before layers are measured, and more of them can only make it larger
            return
        variants.keep_in_float(form, count)
        if not _small(variants, form):
            return
        yield f"{before}{count} layer{'s' if count > 1 else ''} in float32"


def _small(variants: PrecisionVariants, form: GraphForm) -> bool:
    return len(variants.get("int8", form).data) * MOST_BYTES <= len(variants.get("fp32", form).data)


def _layer_counts(variants: PrecisionVariants, form: GraphForm) -> list[int]:
    """List the numbers of layers to leave in float32; none where --keep-float states one."""
    if variants.keep_float:
        return []
    most = max(1, variants.layer_count(form) // MOST_LAYERS)
    return [1 << power for power in range(most.bit_length())]


def _most_tries(variants: PrecisionVariants, form: GraphForm, qat: Retrainer | None) -> int:
    """Count the tries after the first that there can be, before any is made."""
    mixed = len(_layer_counts(variants, form))
    return mixed + (1 + mixed if qat else 0)


@dataclass
class Retrainer:
    """Train the student of a run on for an INT8 form. Data and teacher are opened once, when first needed."""

    run: Path
    encoder: EncoderInfo
    """The run's encoder."""
    faces: Path | None
    """Face set instead of the one that the run was trained on."""
    steps: int
    calibration: Calibration
    progress: Progress
    config: DistillConfig = field(init=False)

    def __post_init__(self) -> None:
        from pkd.toolkit.distill.quantization.qat import read_config

        self.config = read_config(self.run, self.faces, self.steps)

    @cached_property
    def prepared(self) -> Prepared:
        """Read the run's images, the teacher's embeddings of them, and the head."""
        from pkd.toolkit.distill.quantization.qat import prepare_again

        with self.progress("qat: teacher embeddings and head"):
            return prepare_again(self.config, self.encoder)

    def retrain(self, form: GraphForm) -> Int8Weights:
        """Train new weights for ``form``. Raises TrainingDiverged, InputError, KeyboardInterrupt."""
        from pkd.toolkit.distill.models.student import load_student
        from pkd.toolkit.distill.quantization.fake_quant import SIGNED, UNSIGNED, Int8Student, folded
        from pkd.toolkit.distill.quantization.qat import train_int8

        symmetric = INT8_TYPES[form.int8][1].get("ActivationSymmetric", False)
        plain = folded(load_student(self.run).module)
        student = Int8Student(plain, SIGNED if symmetric else UNSIGNED)
        prepared = self.prepared
        student.ranges = _ranges(student, self.calibration, self.encoder, self.progress)
        with self.progress(f"qat int8-{form.int8}", self.steps) as advance:
            module, made = train_int8(self.config, prepared, student, self.encoder, advance)
        preprocess = self.encoder.preprocess
        return Int8Weights(
            uint8_graph(torch_network(module, preprocess.size), preprocess, self.encoder.space.dim),
            made,
            {
                "qat_steps": self.steps,
                "qat_images": len(prepared.faces),
                "qat_data": prepared.data_digest,
                "qat_seed": self.config.seed,
                "qat_from": self.encoder.id,
                "qat_encoder": made.id,
            },
        )


def _ranges(student: Int8Student, calibration: Calibration, encoder: EncoderInfo, progress: Progress) -> Ranges:
    """Choose the ranges of the student's activations as calibration does of a graph's."""
    import torch

    crops = calibration.crops
    with progress("qat: ranges", calibration.passes * len(crops)) as advance:

        def activations() -> Iterator[Activations]:
            for chunk in batches(len(crops), BATCH):
                pixels = torch.from_numpy(encoder.preprocess(crops[chunk.start : chunk.stop]))
                yield {name: values.numpy() for name, values in student.activations(pixels).items()}
                advance(len(chunk))

        return choose_ranges(activations, calibration.method)
