"""Train a student: the optimiser step and everything that it needs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from pkd.toolkit.core.errors import TrainingDiverged
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.config import DistillConfig
from pkd.toolkit.distill.heads.ema import EmaHead
from pkd.toolkit.distill.heads.frozen_softmax import FrozenHead
from pkd.toolkit.distill.heads.margin import Margin
from pkd.toolkit.distill.losses.feature import ADAPTED, adapters
from pkd.toolkit.distill.losses.feature_hooks import FeatureHooks
from pkd.toolkit.distill.losses.inputs import Bank, LossInputs, StagePair
from pkd.toolkit.distill.losses.registry import WeightedSum
from pkd.toolkit.distill.models.backbones import build
from pkd.toolkit.distill.models.initial_weights import start_from
from pkd.toolkit.distill.models.layers import Adoptable, Backbone
from pkd.toolkit.distill.training.distributed import SINGLE_PROCESS, DistributedContext, ShardedHead
from pkd.toolkit.distill.training.loader import CropBatch, Loader
from pkd.toolkit.distill.training.setup import Prepared


class Trainer:
    """Hold one training: student, centres and optimiser. Equal config and data give equal weights at each step.

    Over several ranks each sees its share of every batch; the losses see the whole batch on every rank, the frozen head
    is split, and EMA or trained centres are kept whole and stay equal, since all ranks make the same update.
    """

    def __init__(
        self,
        config: DistillConfig,
        prepared: Prepared,
        dim: int,
        size: int,
        context: DistributedContext = SINGLE_PROCESS,
        student: Backbone | None = None,
    ) -> None:
        """Build the student, its classifier and its optimiser. ``student``: trained instead of a new one."""
        self.config = config
        self.context = context
        self.prepared = prepared
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.method = WeightedSum.parse(config.method)
        self.margin = Margin.parse(config.margin, config.gradient)
        torch.manual_seed(config.seed)
        if student is None and prepared.start is not None:
            student = copy.deepcopy(prepared.start.network)
        student = student or build(config.student, dim, size)
        self.started_from = start_from(config.init, student, config.student, dim, size) if config.init else None
        self.student = student.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head: FrozenHead | None = None
        self.ema_head: EmaHead | None = None
        self.own: nn.Parameter | None = None
        if self.method.head == "trained":
            self.own = nn.Parameter(torch.randn(len(prepared.identities), dim, device=self.device) * 0.05)
        elif self.method.head in {"frozen", "ema"}:
            assert prepared.head is not None
            centres = torch.as_tensor(prepared.head.centres)
            if self.method.head == "frozen":
                self.head = ShardedHead.split(centres, context, self.device)
            else:
                self.ema_head = EmaHead(centres.to(self.device))
        self.bank = self._make_bank()
        self.plan = prepared.stages
        self.hooks = FeatureHooks(self.student, student.stages) if self.plan else None
        self.adapters = nn.ModuleDict()
        if self.plan:
            needed = [name for name in self.method.names if name in ADAPTED]
            self.adapters.update({name: adapters(name, self.plan.channels) for name in needed})
        self.adapters.to(self.device)
        self.network: nn.Module = self.student if context.world == 1 else DistributedDataParallel(self.student)
        self.optimiser = make_optimiser(config, self._groups())
        self.average = WeightAverage(self.student, config.ema) if config.ema else None
        memory = self.device if config.views_in_memory else None
        self.loader = Loader(
            prepared.faces, config.batch, size, augment=config.augment, seed=config.seed, mirror=config.mirror,
            mix=config.mix, teaching=prepared.teaching, memory=memory, frozen=prepared.frozen,
            share=context.batch_share(config.batch),
        )  # fmt: skip
        self.preprocess = prepared.start.preprocess if prepared.start else Preprocess(size=size)
        scaling = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.preprocess.mean, self.preprocess.std))
        self.mean, self.std = scaling  # one number, or one per channel
        self.bf16 = config.precision == "bf16"

    def step(self, batch: CropBatch, lr: float) -> tuple[float, float]:
        """Take one optimiser step. Returns the loss and the mean teacher–student cosine (NaN without a teacher)."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["rate"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self._embed(batch)
        step = self._step(batch, embeddings.float())
        loss = self.method.loss(step)
        cosine = math.nan
        if step.teacher is not None:
            cosine = float((normalize(step.embeddings.detach()) * step.teacher).sum(dim=1).mean())
        value = self.context.mean(float(loss.detach()))  # stages are seen by their own rank alone
        if not math.isfinite(value):
            wrong = " and ".join(self.method.not_finite(step)) or "another process's part"
            raise TrainingDiverged(f"the loss is {value} ({wrong})")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.context.average_gradients(self.adapters)
        if self.config.clip_norm is not None:
            trained = [p for group in self.optimiser.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        self.optimiser.step()
        if self.average is not None:
            self.average.update(self.student)
        return value, cosine

    def _embed(self, batch: CropBatch) -> Tensor:
        values = batch.crops.to(self.device)
        if batch.features:
            values = values.float().contiguous(memory_format=torch.channels_last)
        else:
            pixels = values.permute(0, 3, 1, 2)  # channels last, no copy
            if self.preprocess.channels == "bgr":
                pixels = pixels.flip(1)
            values = pixels.float().sub_(self.mean).div_(self.std)
        embeddings: Tensor = self.network(values, True) if batch.features else self.network(values)
        return embeddings

    def _step(self, batch: CropBatch, embeddings: Tensor) -> LossInputs:
        """Gather the batch of all processes; stage features stay with the process that made them."""
        drawn = torch.from_numpy(np.stack([batch.indices, batch.mixed], axis=1)).to(self.device)
        indices, mixed = self.context.gather(drawn).cpu().numpy().T
        labels = np.where(mixed, -1, self.prepared.labels[indices])
        people = np.where(mixed, -1, self.prepared.people[indices])
        teacher = None if batch.teacher is None else batch.teacher.to(self.device)
        exclude = self.prepared.exclude
        return LossInputs(
            embeddings=self.context.gather(embeddings),
            labels=torch.from_numpy(labels).to(self.device),
            margin=self.margin,
            scale=self.config.scale,
            teacher=None if teacher is None else self.context.gather(teacher),
            head=self.head,
            ema_head=self.ema_head,
            trained=None if self.own is None else normalize(self.own),
            exclude=None if exclude is None else torch.from_numpy(exclude[labels]).to(self.device),
            temperature=self.config.temperature,
            images=torch.from_numpy(indices).to(self.device),
            people=torch.from_numpy(people).to(self.device),
            bank=self.bank,
            stages=self._stages(batch),
            adapters=self.adapters,
        )

    def _make_bank(self) -> Bank | None:
        """Sample the teacher embeddings that the method compares with, the same in every process and resumed run."""
        if not self.method.bank or self.prepared.targets is None:
            return None
        plain, count = self.prepared.targets[0], len(self.prepared.faces)
        random = np.random.default_rng((self.config.seed, count))
        chosen = np.sort(random.choice(count, min(count, self.method.bank), replace=False))
        rows, people = torch.from_numpy(plain[chosen]), torch.from_numpy(self.prepared.people[chosen])
        return Bank(rows.to(self.device), torch.from_numpy(chosen).to(self.device), people.to(self.device))

    def _stages(self, batch: CropBatch) -> tuple[StagePair, ...]:
        if self.plan is None or self.hooks is None:
            return ()
        student, teacher = self.hooks.pop(), self.plan.teacher(batch.crops.cpu().numpy())
        return tuple(StagePair(student[i], teacher[j].to(self.device)) for i, j in self.plan.pairs)

    def finite(self) -> bool:
        """Tell whether every weight, running statistic and centre is finite."""
        kept = [*self.student.state_dict().values(), *self.adapters.state_dict().values()]
        kept += [] if self.own is None else [self.own]
        kept += [] if self.ema_head is None else [self.ema_head.units]
        return all(bool(torch.isfinite(t).all()) for t in kept if t.is_floating_point())

    def trained_student(self) -> nn.Module:
        """Copy the student to the CPU as it is to be kept: with averaged weights where the run averages them."""
        student = copy.deepcopy(self.student)
        if self.average is not None:
            student.load_state_dict(self.average.weights)
        made: nn.Module = student.cpu().to(memory_format=torch.contiguous_format)
        return made

    def state(self) -> dict[str, Any]:
        """Return what a bit-for-bit continuation needs; order and augmentation follow from the step number."""
        state: dict[str, Any] = {"student": self.student.state_dict(), "optimiser": self.optimiser.state_dict()}
        state["adapters"] = self.adapters.state_dict()
        if self.own is not None:
            state["centres"] = self.own.detach()
        if self.ema_head is not None:
            state["ema_head"] = self.ema_head.state()
        if self.average is not None:
            state["average"] = self.average.state()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Load what ``state`` returned."""
        self.student.load_state_dict(state["student"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.adapters.load_state_dict(state["adapters"])
        if self.own is not None:
            with torch.no_grad():
                self.own.copy_(state["centres"])
        if self.ema_head is not None:
            self.ema_head.restore(state["ema_head"])
        if self.average is not None:
            self.average.restore(state["average"])

    def _groups(self) -> list[dict[str, Any]]:
        trunk = {id(p) for p in self.student.trunk.parameters()} if isinstance(self.student, Adoptable) else set()
        trained = [*self.student.parameters(), *self.adapters.parameters(), *([] if self.own is None else [self.own])]
        groups = []
        for rate, inside in ((self.config.trunk_lr, True), (1.0, False)):
            parts = [p for p in trained if p.requires_grad and (id(p) in trunk) == inside]
            for weight_decay, chosen in (
                (self.config.weight_decay, [p for p in parts if p.ndim > 1]),
                (0.0, [p for p in parts if p.ndim <= 1]),
            ):
                if chosen or not inside:
                    groups.append({"params": chosen, "weight_decay": weight_decay, "rate": rate})
        return groups


class WeightAverage:
    """Keep an exponential moving average of a network's weights and running statistics.

    The decay rises to ``decay`` over the first steps, min(decay, (1 + n)/(10 + n)), so that the initial weights fade.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the weights after a step; integers, such as counts of batches, are copied."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, value in network.state_dict().items():
            kept = self.weights[name]
            if kept.is_floating_point():
                kept.lerp_(value, 1 - decay)
            else:
                kept.copy_(value)

    def state(self) -> dict[str, Any]:
        """Return the average for a checkpoint."""
        return {"weights": self.weights, "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Load what ``state`` returned."""
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)
        self._steps = state["steps"]


def make_optimiser(config: DistillConfig, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimiser of a run over its parameter groups."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999))
