"""Choose what a student's weights start from: ``--init``, a run or an arcface_torch backbone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from pkd.toolkit.core.encoder_info import name_of
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.arcface_torch import ArcFaceTorch
from pkd.toolkit.distill.models.backbones import parse
from pkd.toolkit.distill.models.layers import reduced
from pkd.toolkit.distill.models.student import FILE, load_student


def start_from(init: str, network: nn.Module, student: str, dim: int, size: int) -> str:
    """Load the weights of ``init`` into ``network``, a ``student`` with ``dim`` outputs for ``size``-pixel crops.

    Returns ``name@sha256:…`` of what it started from. Raises InputError where the weights do not fit.
    """
    path = Path(init)
    if path.is_dir() or path.name == FILE or not path.exists():
        run = load_student(init)
        try:
            network.load_state_dict(run.module.state_dict())
        except RuntimeError:
            raise InputError(
                f"--init {init}: its weights do not fit {student} in the teacher's space. Give a run of the same "
                "backbone, crop size and dimension."
            ) from None
        return run.info.id
    found = ArcFaceTorch.read(path)
    has, wants = (found.backbone, found.dim, found.side), (parse(student)[0], dim, reduced(size))
    if has != wants:
        raise InputError(
            f"--init {init}: holds {_shown(*has)}, the student is {_shown(*wants)}. Choose --student {found.backbone} "
            "and a teacher of that dimension and crop size, or leave --init out."
        )
    found.load_into(network)
    return f"{name_of(path)}@sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _shown(backbone: str, dim: int, side: int) -> str:
    return f"{backbone} with {dim} outputs and {side}×{side} last features"
