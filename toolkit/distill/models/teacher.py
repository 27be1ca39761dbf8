"""Teachers that need torch: arcface_torch IResNet checkpoints. ONNX teachers are opened by toolkit/encoders/base.py."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pkd.toolkit.core.encoder_info import describe, name_of
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.distill.models.arcface_torch import ArcFaceTorch
from pkd.toolkit.distill.models.backbones import build
from pkd.toolkit.distill.models.layers import reduced
from pkd.toolkit.distill.models.student import TorchEncoder


def open_checkpoint(path: str | Path, preprocess: Preprocess, *, name: str | None = None) -> TorchEncoder:
    """Open an arcface_torch backbone (``backbone.pth``) as a teacher. Depth and dimension follow from its tensors.

    Raises InputError if the tensors are not those of an IResNet, naming the first that is missing or foreign, or if it
    was trained on crops of another size.
    """
    path = Path(path)
    found = ArcFaceTorch.read(path)
    side = reduced(preprocess.size)
    if side != found.side:
        raise InputError(
            f"{path}: its last features are {found.side}×{found.side}, but a crop of {preprocess.size} pixels gives "
            f"{side}×{side}. State size={16 * found.side} with its preprocessing."
        )
    module = build(found.backbone, found.dim, preprocess.size)
    found.load_into(module)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    info = describe(name or name_of(path), "teacher", digest, preprocess, found.dim)
    return TorchEncoder(info, module, {"source": path.name, "backbone": found.backbone})
