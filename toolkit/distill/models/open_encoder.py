"""Open encoders by one spelling for every command: a path or ``insightface:PACK`` → Encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pkd.toolkit.bundle.bundle import Bundle, is_bundle
from pkd.toolkit.core.errors import InputError, MissingExtra
from pkd.toolkit.core.preprocess import Preprocess
from pkd.toolkit.encoders.base import Encoder, open_bundle, open_onnx
from pkd.toolkit.encoders.registry import open_target, target_of

CHECKPOINTS = frozenset({".bin", ".ckpt", ".pt", ".pth"})
"""Suffixes of what torch.save wrote: Hugging Face's and Lightning's, too."""


def open_encoder(
    spec: str, preprocess: str | None = None, *, threads: int = 1, option: str = "--teacher-preprocess"
) -> Encoder:
    """Open a bundle (a folder or its zip), BUNDLE/targets/NAME, a pkd-distill run, FILE.onnx, FILE.pt (arcface_torch)
    or ``insightface:PACK``.

    ``preprocess``: as Preprocess.parse; needed for FILE.onnx and FILE.pt unless FILE.preprocess.json lies beside them.
    ``threads``: of onnxruntime, per call. ``option``: which states the preprocessing, for errors. Raises InputError,
    BundleError or MissingExtra.
    """
    path = Path(spec)
    named = target_of(path)
    if named:
        return open_target(Bundle.open(named[0]), named[1], threads=threads)
    if spec.startswith("insightface:"):
        from pkd.toolkit.encoders.insightface import recogniser

        file, stated = recogniser(spec)
        return open_onnx(file, Preprocess.parse(preprocess) if preprocess else stated, threads=threads)
    if is_bundle(path):
        return open_bundle(Bundle.open(path), threads=threads)
    if path.is_dir() or path.name == "student.pt":
        _need_torch()
        from pkd.toolkit.distill.models.student import load_student

        return load_student(path)
    if not path.exists():
        raise InputError(f"{spec}: no such file. Give a bundle, a run folder, FILE.onnx, FILE.pt or insightface:PACK.")
    if path.suffix == ".onnx":
        return open_onnx(path, _stated(path, preprocess, option), threads=threads)
    if is_checkpoint(path):
        _need_torch()
        from pkd.toolkit.distill.models.teacher import open_checkpoint

        return open_checkpoint(path, _stated(path, preprocess, option))
    if path.suffix == ".safetensors":
        raise InputError(
            f'{spec}: write it as torch does: python -c "import torch, safetensors.torch as s; '
            f"torch.save(s.load_file('{path}'), '{path.with_suffix('.pth')}')\""
        )
    raise InputError(f"{spec}: not an encoder. Give a bundle, a run folder, FILE.onnx, FILE.pt or insightface:PACK.")


def reopener(spec: str) -> Callable[[Preprocess], Encoder] | None:
    """Return what opens FILE.onnx or FILE.pt with another preprocessing; None for what states its own."""
    path = Path(spec)
    if path.suffix == ".onnx" and path.is_file():
        return lambda preprocess: open_onnx(path, preprocess)
    if is_checkpoint(path) and path.is_file() and path.name != "student.pt":
        from pkd.toolkit.distill.models.teacher import open_checkpoint

        return lambda preprocess: open_checkpoint(path, preprocess)
    return None


def is_checkpoint(path: Path) -> bool:
    """Say whether a file's name is one that checkpoints of torch have, such as best.pth.tar."""
    return path.suffix in CHECKPOINTS or path.name.endswith((".pt.tar", ".pth.tar"))


def _stated(path: Path, preprocess: str | None, option: str) -> Preprocess:
    if preprocess:
        return Preprocess.parse(preprocess)
    beside = path.with_suffix(".preprocess.json")
    if beside.is_file():
        return Preprocess.parse(str(beside))
    raise InputError(
        f"{path}: its preprocessing is not stated, and a guess would ruin accuracy silently. Pass {option} "
        f"channels=rgb,mean=127.5,std=127.5 (or what it was trained with), or write {beside.name} beside it."
    )


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise MissingExtra("torch", "train") from None
