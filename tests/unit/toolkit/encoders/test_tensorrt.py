"""Engines: refused where they cannot run, and on a GPU the same numbers as onnxruntime."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pkd.export.checks.parity import synthetic_crops
from pkd.export.formats.tensorrt import build_engine
from pkd.export.options import BuildOptions
from pkd.toolkit.bundle.bundle import Bundle, self_test, write_bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.errors import InputError, TargetUnavailable
from pkd.toolkit.core.gpu import Gpu, find_gpu
from pkd.toolkit.encoders import tensorrt
from pkd.toolkit.encoders.base import open_bundle
from pkd.toolkit.encoders.registry import open_target
from pkd.toolkit.encoders.tensorrt import mismatch, split
from tests.support.bundle_factory import DIM, content, replace_file

PACKAGES = ("tensorrt_rtx", "tensorrt")
HERE = find_gpu()


def with_engine(folder: Path, package: str, **changes: str) -> Bundle:
    """Write a bundle with a real engine for batches of 2 to 5; ``changes``: of its settings."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    files, manifest = content()
    engine = build_engine(
        package, files["encoder.onnx"], BuildOptions(batches=(2, 4, 5), workspace=256), lambda phase: None
    )
    target = Target(
        runtime=package,
        precision="fp32",
        encoder=manifest.encoder,
        graph="encoder.onnx",
        file=f"targets/{package}-fp32/encoder.engine",
        golden_tolerance=1e-5,
        checked_with="x",
        made_with=f"{package} {engine.version}",
        settings={**engine.settings, **changes},
    )
    files = {**files, str(target.file): engine.data}
    return write_bundle(folder / "b", files, manifest.model_copy(update={"targets": (target,)}))


@pytest.mark.skipif(HERE is not None, reason="this machine has a GPU")
def test_without_a_gpu_an_engine_is_unavailable_and_says_so(tmp_path: Path) -> None:
    bundle = with_engine(tmp_path, "tensorrt_rtx")
    with pytest.raises(TargetUnavailable, match=r"b: tensorrt_rtx-fp32: no NVIDIA GPU .* was found\. Use another"):
        open_target(bundle, "tensorrt_rtx-fp32")


@pytest.mark.parametrize(
    ("capability", "changes", "said"),
    [
        ("7.5", {}, "compute capability 8.0 and later, this GPU has 7.5"),
        ("8.9", {"tensorrt": "1.0.0.1"}, r"TensorRT 1\.0\.0\.1, here is {version}"),
        ("8.9", {"compute_capability": "9.0"}, "compute capability 9.0, this GPU has 8.9"),
    ],
)
def test_an_engine_of_elsewhere_is_refused_by_both_names_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, changes: dict[str, str], said: str
) -> None:
    bundle = with_engine(tmp_path, "tensorrt_rtx", **changes)
    import tensorrt_rtx

    monkeypatch.setattr(tensorrt, "find_gpu", lambda: Gpu("a GPU that is not here", capability))
    remedy = f"--from-bundle {bundle.path} --format trt-rtx --precision fp32"
    with pytest.raises(TargetUnavailable, match=said.format(version=tensorrt_rtx.__version__)) as refused:
        open_target(bundle, "tensorrt_rtx-fp32")
    assert remedy in str(refused.value)


def test_what_is_no_engine_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = with_engine(tmp_path, "tensorrt_rtx")
    file = "targets/tensorrt_rtx-fp32/encoder.engine"
    replace_file(bundle.path, file, b"x" + bundle.read(file)[1:])
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: HERE or Gpu("a GPU that is not here", "8.9"))
    with pytest.raises(TargetUnavailable, match="TensorRT says MALFORMED_ENGINE"):
        open_target(Bundle.open(bundle.path), "tensorrt_rtx-fp32")


@pytest.mark.parametrize(
    ("built_for", "capability", "fits"),
    [
        ("8.9", "8.9", True),
        ("8.9", "8.6", False),
        ("8.9", "9.0", False),
        ("8.0 and later", "8.0", True),
        ("8.0 and later", "12.0", True),
        ("8.0 and later", "7.5", False),
        ("10.0 and later", "9.0", False),
        ("later and later", "9.0", False),
        (None, "9.0", False),
    ],
)
def test_which_device_an_engine_fits(built_for: str | None, capability: str, fits: bool) -> None:
    settings = {"tensorrt": "11.0.1"} | ({} if built_for is None else {"compute_capability": built_for})
    refusal = mismatch(settings, capability, "11.0.1")
    assert (refusal is None) == fits
    if refusal:
        assert refusal == f"the engine is for compute capability {built_for}, this GPU has {capability}"
    assert mismatch(settings, capability, "11.0.2") == "the engine is of TensorRT 11.0.1, here is 11.0.2"
    assert mismatch({}, capability, "11.0.2") == "the engine is of TensorRT None, here is 11.0.2"


@pytest.mark.parametrize("count", [1, 3, 4, 8, 9, 10, 17])
@pytest.mark.parametrize(("smallest", "largest"), [(1, 8), (3, 8), (4, 4)])
def test_batches_stay_within_the_profile_and_lose_no_crop(count: int, smallest: int, largest: int) -> None:
    crops = np.arange(1, count * 12 + 1, dtype=np.uint8).reshape(count, 2, 2, 3)
    parts = list(split(crops, smallest, largest))
    assert all(smallest <= len(part) <= largest for part, _ in parts)
    assert len(parts) == -(-count // largest)
    np.testing.assert_array_equal(np.concatenate([part[:kept] for part, kept in parts]), crops)
    assert not any(part[kept:].any() for part, kept in parts)


@pytest.mark.gpu
@pytest.mark.parametrize("package", PACKAGES)
def test_an_engine_computes_the_encoder_in_any_batch_and_from_any_thread(tmp_path: Path, package: str) -> None:
    if HERE is None:
        pytest.skip("engines run on an NVIDIA GPU only, and none was found")
    bundle = with_engine(tmp_path, package)
    opened = open_target(bundle, f"{package}-fp32")
    crops = synthetic_crops(13, 112)
    expected = open_bundle(bundle).embed(crops)
    for count in (13, 1, 5, 6, 2):
        np.testing.assert_allclose(opened.embed(crops[:count]), expected[:count], atol=5e-5)
    assert opened.embed(crops[:0]).shape == (0, DIM)
    with pytest.raises(InputError, match="uint8"):
        opened.embed(crops.astype(np.float32))  # type: ignore[arg-type]
    assert self_test(bundle, opened.embed, bundle.manifest.target(f"{package}-fp32")) < 1e-5
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(opened.embed, [crops] * 32):
            np.testing.assert_allclose(rows, expected, atol=5e-5)
