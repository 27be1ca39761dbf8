"""Use a torch network as an Encoder, and the student file that a run leaves behind."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.distill.models.backbones import build
from pkd.toolkit.distill.models.layers import Adoptable
from pkd.toolkit.encoders.base import Embeddings, unit_rows
from pkd.toolkit.images.codec import Rgb

Provenance = Mapping[str, str | int | float | bool | None]
FILE = "student.pt"
SCHEMA = 1


class TorchEncoder:
    """An encoder in torch, frozen: stays in eval mode and gives no gradients, whatever its surroundings do."""

    def __init__(self, info: EncoderInfo, module: nn.Module, training: Provenance) -> None:
        self.info = info
        self.module = module.eval().requires_grad_(False)
        self.training = training

    def embed(self, crops: Rgb) -> Embeddings:
        """Embed uint8 N×H×W×3 RGB → float32 N×D with unit rows."""
        if self.module.training:
            self.module.eval()
        pixels = torch.from_numpy(self.info.preprocess(crops))
        with torch.inference_mode():
            raw = self.module(pixels).float().numpy() if len(crops) else np.empty((0, self.info.space.dim), np.float32)
        return unit_rows(raw, self.info.name)


def save_student(run: Path, module: nn.Module, backbone: str, info: EncoderInfo, training: Provenance) -> Path:
    """Write ``run/student.pt`` atomically."""
    content = {
        "schema": SCHEMA,
        "backbone": backbone,
        "info": info.model_dump_json(),
        "training": dict(training),
        "state": module.state_dict(),
    }
    if isinstance(module, Adoptable):
        content["adopted"] = module.architecture()
    return save_atomically(content, run / FILE)


def load_student(run: str | Path) -> TorchEncoder:
    """Open the student (or the teacher trained by ``--method none``) of a run folder, or the ``student.pt`` itself."""
    path = Path(run) / FILE if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise InputError(f"{run}: holds no {FILE}. Give the --out folder of a finished pkd-distill run.")
    content = load_weights(path)
    try:
        if content["schema"] != SCHEMA:
            raise InputError(f"{path}: schema {content['schema']}; this pkd reads {SCHEMA}. Upgrade pkd.")
        info = EncoderInfo.model_validate_json(content["info"])
        module = _build(content, info)
        module.load_state_dict(content["state"])
    except (KeyError, TypeError, RuntimeError, ValidationError) as error:
        raise InputError(f"{path}: not a student of pkd-distill: {str(error).splitlines()[0]}.") from None
    return TorchEncoder(info, module, content["training"])


def _build(content: Mapping[str, Any], info: EncoderInfo) -> nn.Module:
    if "adopted" not in content:
        return build(content["backbone"], info.space.dim, info.preprocess.size)
    from pkd.toolkit.distill.models.adopted import build_adopted

    return build_adopted(content["adopted"])


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 (hex) over names, dtypes, shapes and bytes of all tensors, in name order."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def load_weights(path: str | Path) -> dict[str, Any]:
    """Load tensors and plain values only; nothing in the file is executed. Raises InputError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except Exception as error:  # torch raises many kinds for files that are no checkpoint
        raise InputError(f"{path}: {unreadable(error)}") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors. Save its state_dict "
            "alone, with torch.save."
        )
    return content


def unreadable(error: Exception) -> str:
    """Say why torch does not load a file as plain tensors, and what to do, in words of our own: torch's are a page."""
    found = re.search(r"GLOBAL (?P<name>[\w.]+)|[Cc]an only build .*?`?(?P<other>[\w.]+)`?", str(error))
    if found and (name := found["name"] or found["other"]):
        return (
            f"holds an object besides tensors ({name}), which only its own code could read. If you trust the file, "
            "save its state_dict alone: torch.save(torch.load(FILE, weights_only=False)[KEY], 'weights.pth'), of "
            "a whole model its .state_dict()."
        )
    return "is no checkpoint that torch reads. Give the file that torch.save wrote, whole, or export the model to ONNX."


def save_atomically(content: Mapping[str, Any], path: Path) -> Path:
    """Save by ``torch.save`` beside ``path``, then rename: a killed run leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    torch.save(dict(content), part)
    return part.replace(path)
