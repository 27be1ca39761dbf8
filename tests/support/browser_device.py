"""The device's module in a real browser tab, without the page: pictures go in from Python, results come back."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from pkd.toolkit.images.codec import Rgb
from tests.support import heif_files
from tests.support.browser import Page

OPEN = """(async () => {
  const ort = await import("/web/vendor/ort.wasm.min.mjs");
  const pkd = await import("/web/device/pkd-device.js");
  const { base64 } = await import("/web/device/encode.js");
  const begun = performance.now();
  const device = await pkd.Device.open({ ort, encoder: ENCODER });
  const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const hash = async (data) => {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    return Array.from(digest, (one) => one.toString(16).padStart(2, "0")).join("");
  };
  const embed = async (text, wants) => {
    try {
      const { image, face, crop, embedding, ms } = await test.device.embed(new Blob([bytes(text)]));
      return {
        size: [image.width, image.height],
        rgb: wants.pixels ? base64(image.data) : null,
        hash: await hash(image.data),
        landmarks: face.landmarks,
        score: face.score,
        crop: wants.crop ? base64(crop.data) : null,
        embedding: base64(new Uint8Array(embedding.buffer)),
        ms,
      };
    } catch (error) {
      return { error: error.name, message: error.message };
    }
  };
  globalThis.test = { pkd, device, bytes, base64, hash, embed };
  return { goldenError: device.goldenError, encoder: device.encoder, ms: performance.now() - begun };
})()"""
KIT = """(async (kit, files) => {
  const { pkd, device, bytes, base64, hash } = test, cases = {};
  const unzip = async (data) => {
    const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  for (const one of kit.cases) {
    const photograph = new Blob([bytes(files[one.photograph])]), decoded = await pkd.decode(photograph);
    const image = { width: one.width, height: one.height, data: await unzip(bytes(files[one.rgb])) };
    const given = new Float32Array(bytes(files[one.embedding]).buffer), made = await device.embed(photograph);
    cases[one.name] = {
      rgb_sha256: await hash(decoded.data),
      rgb_base64: base64(decoded.data),
      landmarks: made.face.landmarks,
      matrix: pkd.similarity(one.landmarks, device.size),
      crop_base64: base64(pkd.cropBy(image, one.matrix, device.size).data),
      embedding: Array.from(await device.run(bytes(files[one.crop]))),
      encodings: Object.fromEntries(["b64_f32", "b64_f16", "b64_i8"].map((form) => [form, pkd.encode(given, form)])),
      request: device.request(given, "GALLERY", "SUBJECT"),
      whole: Array.from(made.embedding),
    };
  }
  return { device: "pkd-device.js in Chromium", encoder: device.encoder, cases };
})"""


def open_device(page: Page, url: str, encoder: str) -> dict[str, Any]:
    """Load the module in a tab of the server that shows nothing, and the device in it."""
    page.open(f"{url}/web/style.css")
    page.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")
    return dict(page.run(OPEN.replace("ENCODER", json.dumps(encoder))))


def embed(page: Page, data: bytes, *, pixels: bool = False, crop: bool = True) -> dict[str, Any]:
    """Embed a picture file in the tab → what Device.embed gives, arrays as numpy; or ``error`` and ``message``."""
    wants = json.dumps({"pixels": pixels, "crop": crop})
    made = dict(page.run(f'test.embed("{base64.b64encode(data).decode()}", {wants})'))
    if "error" in made:
        return made
    width, height = made["size"]
    made["landmarks"] = np.array(made["landmarks"])
    made["embedding"] = np.frombuffer(base64.b64decode(made["embedding"]), "<f4")
    if pixels:
        made["rgb"] = np.frombuffer(base64.b64decode(made["rgb"]), np.uint8).reshape(height, width, 3)
    if crop:
        made["crop"] = np.frombuffer(base64.b64decode(made["crop"]), np.uint8).reshape(112, 112, 3)
    return made


def report_kit(page: Page, kit: Path) -> str:
    """Compute the conformance kit in the tab, decoding and all → the device's report as JSON."""
    stated = json.loads((kit / "kit.json").read_text(encoding="utf-8"))
    names = {one[field] for one in stated["cases"] for field in ("photograph", "rgb", "crop", "embedding")}
    files = {name: base64.b64encode((kit / name).read_bytes()).decode() for name in sorted(names)}
    return json.dumps(page.run(f"{KIT}({json.dumps(stated)}, {json.dumps(files)})"))


def awkward(picture: Rgb, large: bool = True) -> dict[str, bytes]:
    """Write one picture in every form that browsers and decoders are known to disagree about."""
    files: dict[str, bytes] = {}
    image = Image.fromarray(picture)

    def save(name: str, one: Image.Image, form: str, **options: Any) -> None:
        buffer = io.BytesIO()
        one.save(buffer, form, **options)
        files[name] = buffer.getvalue()

    for form in ("JPEG", "PNG", "WEBP"):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            save(f"EXIF {orientation} in {form}", stored(image, orientation), form, exif=exif, quality=95)
    for name, primaries in PRIMARIES.items():
        save(f"{name} profile in JPEG", image, "JPEG", quality=95, icc_profile=profile(primaries))
        save(f"{name} profile in PNG", image, "PNG", icc_profile=profile(primaries))
    alpha = image.copy()
    veil = np.linspace(0, 255, image.width).round().astype(np.uint8)
    alpha.putalpha(Image.fromarray(np.tile(veil, (image.height, 1))))
    save("alpha in PNG", alpha, "PNG")
    save("alpha in WebP, lossless", alpha, "WEBP", lossless=True, exact=True)
    save("alpha in WebP", alpha, "WEBP", quality=95, exact=True)
    save("palette PNG", image.quantize(256), "PNG")
    save("palette PNG with transparency", image.quantize(256), "PNG", transparency=0)
    save("grey JPEG", image.convert("L"), "JPEG", quality=95)
    save("grey and alpha in PNG", alpha.convert("LA"), "PNG")
    save("progressive JPEG", image, "JPEG", quality=95, progressive=True)
    save("CMYK JPEG", image.convert("CMYK"), "JPEG", quality=95)
    save("BMP", image, "BMP")
    files["16-bit PNG"] = png16(picture)
    for turn in range(1, 9) if large else (1, 6):
        files[f"turn {turn} in AVIF"] = heif_files.turned(stored(image, turn), "AVIF", turn)
    save("alpha in AVIF", alpha, "AVIF")
    save("Display P3 profile in AVIF", image, "AVIF", icc_profile=profile(PRIMARIES["Display P3"]))
    if large:
        save("12 MP JPEG", image.resize((4000, 3000), Image.Resampling.BICUBIC), "JPEG", quality=90)
    return files


PRIMARIES = {
    "Display P3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)),
    "Adobe RGB": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)),
}
"""Red, green and blue of wide colour spaces as XYZ under D50, from their ICC profiles."""


def profile(primaries: tuple[tuple[float, float, float], ...]) -> bytes:
    """Write the sRGB profile with other primaries."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack(">I", data[128:132])
    places = {}
    for number in range(count):
        name, at, _ = struct.unpack(">4sII", data[132 + 12 * number : 144 + 12 * number])
        places[name] = at
    for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True):
        data[places[name] + 8 : places[name] + 20] = struct.pack(">3i", *(round(65536 * value) for value in xyz))
    return bytes(data)


def stored(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an upright picture as a camera stores it under an EXIF orientation."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    return image if orientation == 1 else image.transpose(turns[orientation])


def png16(picture: Rgb) -> bytes:
    """Write a PNG of 16 bits a channel, the lower byte other than the upper."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = picture.shape[:2]
    wide = (picture.astype(">u2") << 8) | 0x55
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def motion_jpeg(path: Path, picture: Rgb, frames: int = 3) -> Path:
    """Write a film of one picture, for the browser's fake camera."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=2)
    path.write_bytes(buffer.getvalue() * frames)
    return path
