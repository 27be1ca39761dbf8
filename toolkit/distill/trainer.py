"""Trainer: a student, its optimiser and everything that one step needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pkd.toolkit.distill.backbones import build
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.data import CropBatch, Loader
from pkd.toolkit.distill.margin import Margin
from pkd.toolkit.distill.methods import Step, WeightedSum
from pkd.toolkit.distill.prepare import Prepared
from pkd.toolkit.distill.student import load_student
from pkd.toolkit.errors import InputError, TrainingDiverged
from pkd.toolkit.preprocess import Preprocess


class Trainer:
    """One training in memory. The same config and data give the same weights, step by step."""

    def __init__(self, config: DistillConfig, prepared: Prepared, dim: int, size: int) -> None:
        self.config = config
        self.prepared = prepared
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.method = WeightedSum.parse(config.method)
        self.margin = Margin.parse(config.margin)
        torch.manual_seed(config.seed)
        student = build(config.student, dim, size)
        if config.init is not None:
            _start_from(student, config)
        self.student = student.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.centres: Tensor | None = None
        if self.method.head == "trained":
            self.centres = nn.Parameter(torch.randn(len(prepared.identities), dim, device=self.device) * 0.05)
        elif prepared.head is not None:
            self.centres = torch.from_numpy(prepared.head.centres).to(self.device)
        self.optimiser = torch.optim.AdamW(self._groups(), lr=config.lr, betas=(0.9, 0.999))
        self.loader = Loader(prepared.faces, config.batch, size, augment=config.augment, seed=config.seed)
        self.preprocess = Preprocess(size=size)
        self.bf16 = config.precision == "bf16"

    def step(self, batch: CropBatch, lr: float) -> tuple[float, float]:
        """One optimiser step. Returns the loss and the mean teacher–student cosine (NaN without a teacher)."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        pixels = torch.from_numpy(batch.crops).to(self.device).permute(0, 3, 1, 2)  # channels last, no copy
        inputs = (pixels.float() - self.preprocess.mean) / self.preprocess.std
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.student(inputs)
        embeddings = embeddings.float()
        teacher = self._targets(batch)
        centres = self.centres
        if centres is not None and centres.requires_grad:
            centres = normalize(centres)
        labels = torch.from_numpy(self.prepared.labels[batch.indices]).to(self.device)
        loss = self.method.loss(Step(embeddings, labels, teacher, centres, self.margin, self.config.scale))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDiverged(f"the loss is {value}")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        if teacher is None:
            return value, math.nan
        return value, float((normalize(embeddings.detach()) * teacher).sum(dim=1).mean())

    def finite(self) -> bool:
        """Whether every weight, running statistic and centre is finite."""
        tensors = [*self.student.state_dict().values(), *([self.centres] if self.centres is not None else [])]
        return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())

    def state(self) -> dict[str, Any]:
        """All that a bit-for-bit continuation needs; order and augmentation follow from the step alone."""
        state = {"student": self.student.state_dict(), "optimiser": self.optimiser.state_dict()}
        if self.method.head == "trained":
            assert self.centres is not None
            state["centres"] = self.centres.detach()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        self.student.load_state_dict(state["student"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.method.head == "trained":
            assert self.centres is not None
            with torch.no_grad():
                self.centres.copy_(state["centres"])

    def _targets(self, batch: CropBatch) -> Tensor | None:
        if self.prepared.targets is None:
            return None
        plain, mirrored = self.prepared.targets
        rows = np.where(batch.mirrored[:, None], mirrored[batch.indices], plain[batch.indices])
        return torch.from_numpy(rows).to(self.device)

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [p for p in self.student.parameters() if p.ndim > 1]
        vectors = [p for p in self.student.parameters() if p.ndim <= 1]
        if self.centres is not None and self.centres.requires_grad:
            matrices.append(self.centres)
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]


def _start_from(student: nn.Module, config: DistillConfig) -> None:
    assert config.init is not None
    try:
        student.load_state_dict(load_student(config.init).module.state_dict())
    except RuntimeError:
        raise InputError(
            f"--init {config.init}: its weights do not fit {config.student} in the teacher's space. Give a run of the "
            "same backbone, crop size and dimension."
        ) from None
