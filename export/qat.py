"""QAT: where INT8 still fails its gate, the run's weights are trained on for it, against the run's own teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pkd.export.graph.build import torch_network, uint8_graph
from pkd.export.graph.precision_variants import Form, Progress, Retrained
from pkd.export.quantization.calibration import Calibration
from pkd.export.quantization.quantize import FORMS
from pkd.export.quantization.ranges import BATCH, Activations, Ranges, choose_ranges
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.encoders.base import batches

if TYPE_CHECKING:
    from pkd.toolkit.distill.config import DistillConfig
    from pkd.toolkit.distill.quantization.fake_quant import Int8Student
    from pkd.toolkit.distill.training.setup import Prepared

SETTINGS = ("qat_steps", "qat_images", "qat_data", "qat_seed", "qat_from", "qat_encoder")
"""What a target says of how its weights were trained on."""


@dataclass(frozen=True)
class QatOrder:
    """What --qat was asked for. The only defaults."""

    faces: Path | None = None
    """Instead of those that the run was trained on."""
    steps: int = 300

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"--qat-steps {self.steps}: must be above 0.")


@dataclass
class Qat:
    """Retrains the student of a run for a form of INT8. Data and teacher are opened once, when first needed."""

    order: QatOrder
    run: Path
    info: EncoderInfo
    """The run's encoder."""
    calibration: Calibration
    progress: Progress
    config: DistillConfig = field(init=False)

    def __post_init__(self) -> None:
        from pkd.toolkit.distill.quantization.qat import read_config

        self.config = read_config(self.run, self.order.faces, self.order.steps)

    @cached_property
    def prepared(self) -> Prepared:
        """The run's images, the teacher's embeddings of them, the head."""
        from pkd.toolkit.distill.quantization.qat import prepare_again

        self.progress("qat: teacher embeddings and head", 0)
        return prepare_again(self.config, self.info)

    def retrain(self, form: Form) -> Retrained:
        """New weights for ``form``. Raises TrainingDiverged, InputError, KeyboardInterrupt."""
        from pkd.toolkit.distill.models.student import load_student
        from pkd.toolkit.distill.quantization.fake_quant import SIGNED, UNSIGNED, Int8Student, folded
        from pkd.toolkit.distill.quantization.qat import train_int8

        symmetric = FORMS[form.int8][1].get("ActivationSymmetric", False)
        plain = folded(load_student(self.run).module)
        student = Int8Student(plain, SIGNED if symmetric else UNSIGNED)
        prepared = self.prepared
        student.ranges = ranges_of(student, self.calibration, self.info, self.progress)
        advance = self.progress(f"qat int8-{form.int8}", self.order.steps)
        module, made = train_int8(self.config, prepared, student, self.info, advance)
        network = torch_network(module, self.info.preprocess.size)
        return Retrained(
            uint8_graph(network, self.info.preprocess, self.info.space.dim),
            made,
            {
                "qat_steps": self.order.steps,
                "qat_images": len(prepared.faces),
                "qat_data": prepared.data_digest,
                "qat_seed": self.config.seed,
                "qat_from": self.info.id,
                "qat_encoder": made.id,
            },
        )


def ranges_of(student: Int8Student, calibration: Calibration, info: EncoderInfo, progress: Progress) -> Ranges:
    """Ranges of the activations of ``student``, as calibration gives them to a graph."""
    import torch

    crops, method = calibration.crops, calibration.method
    advance = progress("qat: ranges", len(crops) * (1 if method == "minmax" else 2))

    def activations() -> Iterator[Activations]:
        for chunk in batches(len(crops), BATCH):
            pixels = torch.from_numpy(info.preprocess(crops[chunk.start : chunk.stop]))
            yield {name: values.numpy() for name, values in student.activations(pixels).items()}
            advance(len(chunk))

    return choose_ranges(activations, method)
