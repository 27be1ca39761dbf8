"""A device's half of pkd without pkd: photograph → embedding → request, with onnxruntime, numpy and opencv only.

Run as: python pkd_device.py BUNDLE DETECTOR.onnx PHOTO                   prints the body of POST /v1/verify
        python pkd_device.py BUNDLE DETECTOR.onnx --kit KIT REPORT.json   computes the conformance kit

BUNDLE is a bundle's folder, DETECTOR.onnx a YuNet. docs/device.md specifies every step; this file follows it and is
meant to be copied and translated. ``pkd-verify --device-kit KIT --device-report REPORT.json`` grades the result.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Eyes, nose and mouth corners of an aligned crop of 112 pixels."""


class Device:
    """Turn photographs into embeddings of one bundle's encoder. One thread at a time."""

    def __init__(
        self, bundle: Path, detector: Path | None, *, model: str = "encoder.onnx", encoder: str | None = None
    ) -> None:
        """Load ``model`` of the bundle, the encoder of that id; without a detector, landmarks must be given."""
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        self.encoder: str = encoder or manifest["encoder"]["id"]
        self.size: int = manifest["encoder"]["preprocess"]["size"]
        self._session = onnxruntime.InferenceSession(bundle / model, providers=["CPUExecutionProvider"])
        if detector:
            self._detector = cv2.FaceDetectorYN.create(str(detector), "", (320, 320), 0.5, 0.3, 5000)
        targets = {target["file"]: target["golden_tolerance"] for target in manifest["targets"]}
        self.self_test(bundle, targets.get(model, manifest["golden_tolerance"]))

    def self_test(self, bundle: Path, tolerance: float) -> None:
        """Stop unless the bundle's golden crops give its golden embeddings here, within ``tolerance``."""
        with np.load(bundle / "golden.npz") as golden:
            made = np.stack([self.embed(crop) for crop in golden["crops"]])
            # 1 − cosine of vectors of length 1; it sees another length, too
            worst = float((np.square(made - golden["embeddings"]).sum(1) / 2).max())
        if not worst <= tolerance:
            raise SystemExit(f"the student computes something else here: {worst:.1e} from its golden embeddings.")

    def decode(self, data: bytes) -> np.ndarray:
        """Decode a picture file, turned upright by its EXIF → uint8 H×W×3 RGB."""
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            raise SystemExit("the picture cannot be decoded: give a JPEG, PNG, WebP or BMP file.")
        return picture[:, :, ::-1]

    def detect(self, rgb: np.ndarray) -> np.ndarray | None:
        """Find the face that a photograph is of → float64 5×2 pixels, or None."""
        extent = np.array(rgb.shape[1::-1])
        faces: list[np.ndarray] = []
        for side in (640, 1920):
            scale = min(1.0, side / extent.max())
            faces = self.search(rgb, scale) if extent.min() >= 16 else []
            if faces or scale == 1:
                break
        if not faces:
            return None

        def weight(face: np.ndarray) -> float:
            off = (face[:2] + face[2:4] / 2 - extent / 2) / (extent / 2)  # 0 in the middle, ±1 on the rim
            return float(face[2] * face[3] / (1 + 4 * (off @ off)))

        if scale < 1:
            faces = [self.refined(rgb, one) if one[2:4].max() * scale < 100 else one for one in faces]
        return max(faces, key=weight)[4:14].reshape(5, 2)

    def refined(self, rgb: np.ndarray, face: np.ndarray) -> np.ndarray:
        """Search the surroundings of a small face in a finer copy."""
        centre, side = face[:2] + face[2:4] / 2, face[2:4].max()
        left, top = np.maximum(0, np.floor(centre - 1.5 * side)).astype(int)
        right, bottom = np.ceil(centre + 1.5 * side).astype(int)
        around = rgb[top:bottom, left:right]
        if min(around.shape[:2]) < 16:
            return face
        found = self.search(around, min(1.0, 300 / max(around.shape[:2])))
        for one in found:
            one[:2] += (left, top)
            one[4:14] += np.tile((left, top), 5)
        same = [one for one in found if np.linalg.norm(one[:2] + one[2:4] / 2 - centre) < side / 2]
        return max(same, key=lambda one: one[14], default=face)

    def search(self, rgb: np.ndarray, scale: float) -> list[np.ndarray]:
        """Run YuNet on a smaller copy → x, y, width, height, ten coordinates and the score of each face, in ``rgb``."""
        height, width = (max(16, round(extent * scale)) for extent in rgb.shape[:2])
        small = rgb if scale == 1 else cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
        self._detector.setInputSize((width, height))
        _, rows = self._detector.detect(np.ascontiguousarray(small[:, :, ::-1]))
        stretch = np.array([rgb.shape[1] / width, rgb.shape[0] / height])
        faces = []
        for row in [] if rows is None else rows.astype(np.float64):
            points = (row[4:14].reshape(5, 2) + 0.5) * stretch - 0.5  # a pixel's centre lies at its coordinate
            faces.append(np.concatenate([row[:2] * stretch, row[2:4] * stretch, points.ravel(), row[14:]]))
        return faces

    def matrix(self, landmarks: np.ndarray) -> np.ndarray:
        """Fit the similarity that takes five points to the template → float64 2×3."""
        wanted = TEMPLATE * (self.size / 112)
        source, target = landmarks - landmarks.mean(0), wanted - wanted.mean(0)
        cos = (source * target).sum()
        sin = (source[:, 0] * target[:, 1] - source[:, 1] * target[:, 0]).sum()
        linear = np.array([[cos, -sin], [sin, cos]]) / (source * source).sum()
        return np.column_stack([linear, wanted.mean(0) - linear @ landmarks.mean(0)])

    def crop(self, rgb: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Cut the aligned face out → uint8 size×size×3 RGB; faces of over twice its size are averaged first."""
        scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
        if scale < 0.5:
            height, width = (max(1, round(extent * 2 * scale)) for extent in rgb.shape[:2])
            stretch = np.array([rgb.shape[1] / width, rgb.shape[0] / height])
            rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
            # pixel p of the small picture has its centre at (p + ½)·stretch − ½ of the large one
            landmarks = (TEMPLATE * (self.size / 112) - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T
            matrix = self.matrix((landmarks + 0.5) / stretch - 0.5)
        side = (self.size, self.size)
        return cv2.warpAffine(np.ascontiguousarray(rgb), matrix, side, flags=cv2.INTER_LINEAR)

    def embed(self, crop: np.ndarray) -> np.ndarray:
        """Run the student on one crop → float32 unit vector D."""
        return self._session.run(None, {"crops": np.ascontiguousarray(crop[None])})[0][0]

    def encodings(self, vector: np.ndarray) -> dict[str, str]:
        """Write a vector in the three base64 forms that the server takes."""
        whole = np.rint(vector * (127.0 / np.abs(vector).max()))
        forms = {"b64_f32": vector.astype("<f4"), "b64_f16": vector.astype("<f2"), "b64_i8": whole.astype("i1")}
        return {name: base64.b64encode(values.tobytes()).decode() for name, values in forms.items()}

    def request(self, vector: np.ndarray, gallery: str, subject: str) -> dict[str, object]:
        """Make the body of POST /v1/verify: is this face that of an enrolled subject (docs/api.md)."""
        text = self.encodings(vector)["b64_f16"]
        query = {"embedding": text, "encoding": "b64_f16", "encoder": self.encoder}
        return {"a": query, "b": {"gallery": gallery, "subject": subject}}

    def whole(self, data: bytes) -> np.ndarray | None:
        """Run all steps on a picture file → its embedding, or None where no face is found."""
        rgb = self.decode(data)
        landmarks = self.detect(rgb)
        return None if landmarks is None else self.embed(self.crop(rgb, self.matrix(landmarks)))


def report(device: Device, kit: Path, name: str) -> dict[str, object]:
    """Compute every case of a conformance kit, each step from the kit's own output of the step before."""
    stated = json.loads((kit / "kit.json").read_text(encoding="utf-8"))
    cases = {}
    for case in stated["cases"]:
        data = (kit / case["photograph"]).read_bytes()
        decoded = device.decode(data)
        given = np.frombuffer(gzip.decompress((kit / case["rgb"]).read_bytes()), np.uint8)
        given = given.reshape(case["height"], case["width"], 3)
        crop = np.frombuffer((kit / case["crop"]).read_bytes(), np.uint8).reshape(device.size, device.size, 3)
        vector = np.frombuffer((kit / case["embedding"]).read_bytes(), "<f4")
        landmarks, whole = device.detect(decoded), device.whole(data)
        cases[case["name"]] = {
            "rgb_sha256": hashlib.sha256(decoded.tobytes()).hexdigest(),
            "rgb_base64": base64.b64encode(decoded.tobytes()).decode(),
            "landmarks": None if landmarks is None else landmarks.tolist(),
            "matrix": device.matrix(np.array(case["landmarks"])).tolist(),
            "crop_base64": base64.b64encode(device.crop(given, np.array(case["matrix"])).tobytes()).decode(),
            "embedding": device.embed(crop).tolist(),
            "encodings": device.encodings(vector),
            "request": device.request(vector, "GALLERY", "SUBJECT"),
            "whole": None if whole is None else whole.tolist(),
        }
    return {"device": name, "encoder": device.encoder, "cases": cases}


def main() -> None:
    """Read the command line and do what it asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("detector", type=Path)
    parser.add_argument("photo", type=Path, nargs="?")
    parser.add_argument("--kit", type=Path, nargs=2, metavar=("KIT", "REPORT.json"))
    parser.add_argument("--gallery", default="staff")
    parser.add_argument("--subject", default="ann")
    args = parser.parse_args()
    device = Device(args.bundle, args.detector)
    if args.kit:
        kit, out = args.kit
        out.write_text(json.dumps(report(device, kit, "examples/python")), encoding="utf-8")
        return
    if args.photo is None:
        parser.error("give a photograph, or --kit KIT REPORT.json")
    vector = device.whole(args.photo.read_bytes())
    if vector is None:
        sys.exit("no face was found in the photograph.")
    print(json.dumps(device.request(vector, args.gallery, args.subject)))


if __name__ == "__main__":
    main()
