"""The conformance kit: the plain client passes it, and each fault of a device is named by its step."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from pkd.toolkit.bundle.bundle import Bundle
from pkd.toolkit.cli.verify import main
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.device.grading import grade
from pkd.toolkit.device.kit import DeviceCase, DeviceReport, read_kit, read_report, write_kit
from pkd.toolkit.encoders.base import open_bundle
from pkd.toolkit.images.codec import decode_rgb
from tests.support import bundle_factory

EXAMPLE = Path(__file__).resolve().parents[4] / "examples" / "python" / "pkd_device.py"


def example() -> ModuleType:
    """Load the reference client as a stranger's file, not as a part of pkd."""
    spec = importlib.util.spec_from_file_location("pkd_device", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_factory.bundle(tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="module")
def kit(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "kit"
    write_kit(open_bundle(bundle), folder)
    return folder


@pytest.fixture
def device(bundle: Bundle) -> Any:
    """Make the reference client with a detector that finds the middle of every picture: only its steps are tried."""
    module = example()

    class Steady(module.Device):  # type: ignore[name-defined, misc]
        def __init__(self, folder: Path) -> None:
            manifest = json.loads((folder / "manifest.json").read_text())
            self.encoder, self.size = manifest["encoder"]["id"], manifest["encoder"]["preprocess"]["size"]
            self._session = module.onnxruntime.InferenceSession(folder / "encoder.onnx")

        def detect(self, rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            side = min(rgb.shape[:2])
            middle = np.array([rgb.shape[1], rgb.shape[0]]) / 2 - 56 * side / 150
            turn = np.array([[1, 0.02], [-0.02, 1]])  # upright, pixels might lie on the edge between two grey levels
            return np.asarray(module.TEMPLATE @ turn * side / 150 + middle)

    return Steady(Path(bundle.path))


def graded(kit: Path, bundle: Bundle, device: Any) -> dict[str, str]:
    """Case → the first step that deviates."""
    report = DeviceReport.model_validate(example().report(device, kit, "test"))
    first: dict[str, str] = {}
    for one in grade(read_kit(kit), report, open_bundle(bundle)):
        if one.result == "deviates":
            first.setdefault(one.case, one.step)
    return first


def test_the_reference_client_passes_every_case(kit: Path, bundle: Bundle, device: Any) -> None:
    assert graded(kit, bundle, device) == {}


def test_every_step_of_every_case_was_checked(kit: Path, bundle: Bundle, device: Any) -> None:
    report = DeviceReport.model_validate(example().report(device, kit, "test"))
    grades = grade(read_kit(kit), report, open_bundle(bundle))
    assert {one.result for one in grades if one.step != "landmarks"} == {"ok"}
    assert len(grades) == 8 * len(read_kit(kit).kit.cases)


def stretched(device: Any) -> Callable[..., Any]:
    """Normalise the crop, as if the graph did not do it itself."""
    embed = device.embed
    return lambda crop: embed(((crop / 127.5 - 1) * 127).clip(0, 255).astype(np.uint8))


def swapped(points: Any) -> Any:
    return np.asarray(points)[[1, 0, 2, 4, 3]]


def nearest(rgb: Any, matrix: Any) -> Any:
    return cv2.warpAffine(np.ascontiguousarray(rgb), matrix, (112, 112), flags=cv2.INTER_NEAREST)


def corners(rgb: Any, matrix: Any) -> Any:
    """Take a pixel's corner for its centre."""
    moved = matrix.copy()
    moved[:, 2] += 0.5 * (matrix[:, 0] + matrix[:, 1]) - 0.5
    return cv2.warpAffine(np.ascontiguousarray(rgb), moved, (112, 112), flags=cv2.INTER_LINEAR)


FAULTS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "BGR": ("decode", lambda d: {"decode": lambda data: np.ascontiguousarray(decode_rgb(data)[:, :, ::-1])}),
    "no EXIF": (
        "decode",
        lambda d: {
            "decode": lambda data: cv2.imdecode(  # type: ignore[index]
                np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
            )[:, :, ::-1]
        },
    ),
    "another template": ("matrix", lambda d: {"matrix": lambda points, real=d.matrix: real(points) * 0.96}),
    "eyes swapped": ("matrix", lambda d: {"matrix": lambda points, real=d.matrix: real(swapped(points))}),
    "pixel corners": ("crop", lambda d: {"crop": corners}),
    "nearest neighbour": ("crop", lambda d: {"crop": nearest}),
    "normalised twice": ("embedding", lambda d: {"embed": stretched(d)}),
    "length forgotten": ("embedding", lambda d: {"embed": lambda crop, real=d.embed: real(crop) * 7}),
    "int8 overflow": (
        "encoding",
        lambda d: {
            "encodings": lambda vector, real=d.encodings: {
                **real(vector),
                "b64_i8": example().base64.b64encode((vector * 300).astype(np.int64).astype("i1").tobytes()).decode(),
            }
        },
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_its_step(fault: str, kit: Path, bundle: Bundle, device: Any) -> None:
    step, change = FAULTS[fault]
    for name, wrong in change(device).items():
        setattr(device, name, wrong)
    first = graded(kit, bundle, device)
    assert set(first.values()) == {step}, first
    if fault == "no EXIF":
        assert sorted(first) == ["exif3.jpg", "exif6.jpg", "exif6.webp", "exif7.jpg", "exif8.png"]


def test_a_stale_student_is_refused(kit: Path, bundle: Bundle, device: Any) -> None:
    device.encoder = "student@sha256:old"
    with pytest.raises(InputError, match="Update the student"):
        graded(kit, bundle, device)


def test_the_client_stops_where_its_golden_embeddings_have_another_length(bundle: Bundle) -> None:
    """A cosine alone would not see it."""
    module = example()
    embed = module.Device.embed
    module.Device.embed = lambda self, crop: 7 * embed(self, crop)
    with pytest.raises(SystemExit, match="computes something else here"):
        module.Device(Path(bundle.path), None)


def test_a_converted_profile_is_named(kit: Path, bundle: Bundle, device: Any) -> None:
    """A device that converts Display P3 to sRGB has other pixels than the file."""

    def converted(data: bytes) -> Any:
        with Image.open(io.BytesIO(data)) as picture:
            if "icc_profile" not in picture.info:
                return decode_rgb(data)
            profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
            return np.asarray(ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB")))

    device.decode = converted
    assert graded(kit, bundle, device) == {"p3.jpg": "decode"}


def test_a_case_that_is_not_in_the_kit_is_refused(kit: Path, bundle: Bundle) -> None:
    stated = read_kit(kit)
    report = DeviceReport(device="x", encoder=stated.kit.encoder, cases={"other.png": DeviceCase()})
    with pytest.raises(InputError, match=r"other\.png"):
        grade(stated, report, open_bundle(bundle))


def test_the_kit_is_readable_without_python(kit: Path) -> None:
    """Raw bytes have the size that the JSON states."""
    stated = json.loads((kit / "kit.json").read_text())
    for case in stated["cases"]:
        assert len(gzip.decompress((kit / case["rgb"]).read_bytes())) == case["width"] * case["height"] * 3
        assert (kit / case["crop"]).stat().st_size == stated["size"] ** 2 * 3
        assert (kit / case["embedding"]).stat().st_size == stated["dim"] * 4


def test_commands(bundle: Bundle, device: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kit, report = tmp_path / "kit", tmp_path / "report.json"
    assert main([str(bundle.path), "--device-kit", str(kit)]) == 0
    assert main([str(bundle.path), "--device-kit", str(kit)]) == 2
    assert "is not empty" in capsys.readouterr().err
    made = example().report(device, kit, "a phone")
    report.write_text(json.dumps(made))
    assert main([str(bundle.path), "--device-kit", str(kit), "--device-report", str(report)]) == 0
    made["cases"]["plain.png"]["embedding"] = [0.0] * len(made["cases"]["plain.png"]["embedding"])
    report.write_text(json.dumps(made))
    capsys.readouterr()
    assert main([str(bundle.path), "--device-kit", str(kit), "--device-report", str(report), "--json"]) == 4
    told = capsys.readouterr()
    assert json.loads(told.out)["first_deviation"] == {"plain.png": "embedding"}
    assert "embedding: 1, allowed 0.001. its length is 0, not 1" in told.err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"device": "x", "encoder": "y", "cases": {"a": {"matrix": [[1]]}}}',
        '{"device": "x", "encoder": "y", "cases": {"a": {"embedding": [NaN]}}}',
    ],
)
def test_a_broken_report_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is no device report"):
        read_report(path)


@pytest.mark.shared
def test_the_client_passes_with_its_own_detector(bundle: Bundle, shared: Path, tmp_path: Path) -> None:
    """YuNet on the device finds what YuNet in pkd finds."""
    from pkd.toolkit.encoders.detector import open_detector

    yunet = shared / "models" / "yunet_n_dynamic.onnx"
    folder = tmp_path / "kit"
    write_kit(open_bundle(bundle), folder, open_detector(str(yunet)))
    device = example().Device(Path(bundle.path), yunet)
    assert graded(folder, bundle, device) == {}
