"""Teachers that need torch: arcface_torch IResNet checkpoints. ONNX teachers are opened by toolkit/runtime.py."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch

from pkd.toolkit.distill.backbones import build
from pkd.toolkit.distill.student import TorchEncoder, load_weights
from pkd.toolkit.errors import InputError
from pkd.toolkit.preprocess import Preprocess
from pkd.toolkit.space import describe, name_of

_DEPTH_OF_LAYER3 = {2: "iresnet18", 6: "iresnet34", 14: "iresnet50", 30: "iresnet100"}


def open_checkpoint(path: str | Path, preprocess: Preprocess, *, name: str | None = None) -> TorchEncoder:
    """Open an arcface_torch backbone (``backbone.pth``) as a teacher. Depth and dimension follow from its names.

    Raises InputError if the tensors are not those of an IResNet, naming the first that is missing or foreign.
    """
    path = Path(path)
    content = load_weights(path)
    nested = content.get("state_dict", content.get("state_dict_backbone", content))
    tensors = {key.removeprefix("module."): value for key, value in nested.items() if torch.is_tensor(value)}
    blocks = {int(found[1]) for key in tensors if (found := re.match(r"layer3\.(\d+)\.", key))}
    backbone = _DEPTH_OF_LAYER3.get(len(blocks))
    if backbone is None or "fc.weight" not in tensors:
        raise InputError(
            f"{path}: not an arcface_torch IResNet: layer3 has {len(blocks)} blocks, "
            f"{'fc.weight is there' if 'fc.weight' in tensors else 'no fc.weight'}. Export the teacher to ONNX instead."
        )
    dim = int(tensors["fc.weight"].shape[0])
    module = build(backbone, dim, preprocess.size)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{path}: not {backbone}: {' '.join(str(error).split())[:300]}") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    info = describe(name or name_of(path), "teacher", digest, preprocess, dim)
    return TorchEncoder(info, module, {"source": path.name, "backbone": backbone})
