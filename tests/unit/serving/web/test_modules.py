"""The browser's modules in Node: the conformance kit, step by step, and orientations as pkd's decoder applies them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pkd.serving.web import FOLDER
from pkd.toolkit.device.grading import grade
from pkd.toolkit.device.kit import STEPS, encodings, read_kit, read_report, write_kit
from pkd.toolkit.encoders.base import open_bundle
from pkd.toolkit.encoders.detector import open_detector
from tests.support import bundle_factory
from tests.support.heif_files import saved
from tests.support.spot_detector import write_spot_detector

SCRIPTS = Path(__file__).resolve().parents[3] / "web"


def node(script: str, *arguments: object) -> str:
    """Run a script of tests/web; what it printed."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("no node here")
    done = subprocess.run(
        [found, str(SCRIPTS / script), str(FOLDER), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_kit(tmp_path: Path, detector: Path) -> dict[str, list[str]]:
    """Let Node compute the kit of a small encoder → step → results of all its photographs."""
    bundle = bundle_factory.bundle(tmp_path / "made")
    write_kit(open_bundle(bundle), tmp_path / "kit", open_detector(str(detector)))
    report = tmp_path / "report.json"
    node("conformance.mjs", bundle.path, detector, tmp_path / "kit", report)
    grades = grade(read_kit(tmp_path / "kit"), read_report(report), open_bundle(bundle))
    return {step: [one.result for one in grades if one.step == step] for step in STEPS}


@pytest.mark.shared
def test_node_passes_the_conformance_kit(tmp_path: Path, shared: Path) -> None:
    results = run_kit(tmp_path, shared / "models" / "yunet_n_dynamic.onnx")
    assert set(results.pop("decode")) == {"not reported"}, "Node has no decoder; the browser's test reports it"
    assert {step: set(found) for step, found in results.items()} == {step: {"ok"} for step in results}
    assert len(results["whole"]) == 18


def spots(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Grey pictures with white squares, which the spot detector takes for faces; some overlap, some are at the rim."""
    image = rng.integers(0, 140, (height, width, 3)).astype(np.uint8)
    for x, y in rng.integers(0, [(width - 8) // 8, (height - 8) // 8], (6, 2)) * 8:
        image[y : y + 8, x : x + 8] = 255
    return image


def test_detection_and_alignment_are_those_of_python(tmp_path: Path) -> None:
    from pkd.toolkit.encoders.detector import choose
    from pkd.toolkit.images.alignment import warp

    rng = np.random.default_rng(0)
    file = write_spot_detector(tmp_path / "spots.onnx", "yunet")
    detector = open_detector(str(file))
    images = [spots(rng, *size) for size in ((320, 256), (200, 331), (640, 480), (64, 64), (1300, 700), (700, 2000))]
    images.append(np.full((64, 64, 3), 9, np.uint8))
    for number, image in enumerate(images):
        (tmp_path / f"{number}.rgb").write_bytes(image.tobytes())
    sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in images]
    said = json.loads(node("detect.mjs", file, tmp_path, *sizes))
    found = 0
    for image, made in zip(images, said, strict=True):
        faces = detector.detect(image)
        found += len(faces)
        assert len(made["faces"]) == len(faces)
        seen = sorted(made["faces"], key=lambda face: (face["box"][1], face["box"][0]))
        for one, face in zip(seen, sorted(faces, key=lambda face: (face.box[1], face.box[0])), strict=True):
            np.testing.assert_allclose(one["box"], face.box, atol=2e-3)
            np.testing.assert_allclose(one["landmarks"], face.landmarks, atol=1e-3)
            assert abs(one["score"] - face.score) < 1e-5
        if not faces:
            assert made["chosen"] is None
            continue
        chosen = choose(faces, image)
        np.testing.assert_allclose(made["chosen"]["box"], chosen.box, atol=2e-3)
        crop = np.array(made["crop"], np.uint8).reshape(112, 112, 3)
        assert np.abs(crop.astype(int) - warp(image, np.array(made["chosen"]["landmarks"]))).max() <= 1
    assert found > 12


@pytest.mark.parametrize("size", [(640, 480, 320, 240), (333, 251, 166, 125), (1000, 700, 90, 63), (97, 40, 96, 39)])
def test_averaging_is_opencvs(tmp_path: Path, size: tuple[int, int, int, int]) -> None:
    width, height, across, down = size
    image = np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8)
    (tmp_path / "image.rgb").write_bytes(image.tobytes())
    made = np.array(json.loads(node("area.mjs", tmp_path / "image.rgb", *size)), np.uint8).reshape(down, across, 3)
    wanted = cv2.resize(image, (across, down), interpolation=cv2.INTER_AREA)
    off = np.abs(made.astype(int) - wanted)
    assert off.max() <= 1 and (off > 0).mean() < 0.01, (off.max(), (off > 0).mean())


def test_files_are_read_and_turned_as_pkd_does(tmp_path: Path) -> None:
    """Every orientation in every format; the pixels come from OpenCV, unturned, as a browser decodes the copy."""
    import io

    from PIL import Image

    from pkd.toolkit.images.codec import decode_rgb

    rng = np.random.default_rng(1)
    pixels = np.kron(rng.integers(0, 256, (5, 7, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    files: dict[str, bytes] = {}
    for form in ("JPEG", "PNG", "WEBP"):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            exif[0x010E] = "made for a test"
            buffer = io.BytesIO()
            lossless = {"lossless": True} if form == "WEBP" else {}
            Image.fromarray(pixels).save(buffer, form, exif=exif, **lossless)
            files[f"{form}{orientation}"] = buffer.getvalue()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    said: dict[str, Any] = json.loads(node("inspect.mjs", tmp_path, *files))
    for name in files:
        one = said[name]
        assert (one["orientation"], one["alpha"]) == (int(name[-1]), False), name
        unturned = decode_rgb(bytes(one["bytes"]))
        assert unturned.shape == pixels.shape, f"{name}: a decoder would still turn the copy"
        (tmp_path / f"{name}.rgb").write_bytes(unturned.tobytes())
    turned = json.loads(node("inspect.mjs", tmp_path, "--turn", *files))
    for name, data in files.items():
        wanted = decode_rgb(data)
        assert turned[name]["size"] == [wanted.shape[1], wanted.shape[0]], name
        assert bytes(turned[name]["rgb"]) == wanted.tobytes(), name


def test_alpha_is_noticed_and_other_files_are_refused_in_words(tmp_path: Path) -> None:
    import io

    from PIL import Image

    files: dict[str, bytes] = {
        brand: b"\0\0\0\x18ftyp" + brand.encode() + bytes(40) for brand in ("heic", "avif", "avis", "isom")
    }
    files |= {"empty": b"", "png": b"\x89PNG\r\n\x1a\n", "mif1": b"\0\0\0\x18ftypmif1\0\0\0\0miafavif"}
    clear = Image.new("RGBA", (8, 8), (9, 8, 7, 0))
    for form in ("PNG", "WEBP"):
        for lossless in (True, False):
            buffer = io.BytesIO()
            clear.save(buffer, form, lossless=lossless)
            files[f"{form}-{lossless}"] = buffer.getvalue()
    buffer = io.BytesIO()
    clear.convert("P").save(buffer, "PNG", transparency=0)
    files |= {"palette": buffer.getvalue(), "AVIF": saved(clear, "AVIF")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    said = json.loads(node("inspect.mjs", tmp_path, *files))
    for name in ("PNG-True", "PNG-False", "WEBP-True", "WEBP-False", "palette"):
        assert said[name]["alpha"] is True, name
    assert said["heic"]["error"].startswith("DecodeError: this is a HEIC picture") and "JPEG" in said["heic"]["error"]
    assert said["avis"]["error"].startswith("DecodeError: this AVIF holds a film")
    assert said["isom"]["error"].startswith("DecodeError: this is a film or another file")
    assert said["empty"]["error"].startswith("DecodeError: this is no JPEG, PNG, WebP, BMP or AVIF picture")
    assert (said["avif"]["alpha"], said["mif1"]["alpha"], said["AVIF"]["alpha"]) == (False, False, True)
    assert said["png"]["orientation"] == 1, "a cut file is left to the decoder"


def test_numbers_are_rounded_as_numpy_does(tmp_path: Path) -> None:
    """Every kind of float16: normal, subnormal, halves to even, too large, too small, and unit vectors."""
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32)
    edges = np.arange(0x33000000, 0x33000000 + 40_000_000, 9973, dtype=np.uint32)  # from the smallest half upwards
    ties = (np.arange(1, 3000, dtype=np.uint32) << 13) + np.uint32(0x38000000 + 0x1000)
    vectors = rng.standard_normal((16, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    numbers = np.concatenate([vectors.ravel(), *(one.view(np.float32) for one in (bits, edges, ties))])
    numbers = numbers[~np.isnan(numbers)]
    (tmp_path / "numbers.f32").write_bytes(numbers.astype("<f4").tobytes())
    said = json.loads(node("encode.mjs", tmp_path / "numbers.f32", 64))
    with np.errstate(over="ignore"):
        wanted = numbers.astype("<f2").view(np.uint16)
    np.testing.assert_array_equal(np.array(said["halves"], np.uint16), wanted)
    for vector, texts in zip(vectors, said["texts"], strict=False):
        assert dict(zip(("b64_f32", "b64_f16", "b64_i8"), texts, strict=True)) == encodings(vector)


def test_the_camera_gives_one_hint_at_a_time(tmp_path: Path) -> None:
    from pkd.toolkit.synthetic.faces import Conditions, draw, random_identity

    face = draw(random_identity(0, 1), Conditions(scene=1))
    dark = (face * 0.15).astype(np.uint8)
    blurred = cv2.GaussianBlur(face, (0, 0), 6)
    for name, crop in (("face", face), ("dark", dark), ("blurred", blurred)):
        (tmp_path / name).write_bytes(np.ascontiguousarray(crop).tobytes())
    said = json.loads(node("advise.mjs", *(tmp_path / name for name in ("face", "dark", "blurred"))))
    assert [hint.partition(".")[0] for hint, _ in said["crops"]] == ["", "It is dark", "The picture is blurred"]
    sharpness = cv2.Laplacian(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), cv2.CV_64F)[1:-1, 1:-1].var()
    assert abs(said["crops"][0][1]["sharpness"] / sharpness - 1) < 0.05
    assert said["none"].startswith("No face") and said["several"].startswith("Several people")
    assert said["bystander"] == "" and said["small"].startswith("The face is small")
