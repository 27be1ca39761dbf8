// Decoding: a picture file → upright RGB pixels, as pkd's own decoder gives them (docs/device.md, step 1).
//
// Browsers differ in what they do to a picture on the way: most turn it by its EXIF orientation, but not in WebP; they
// convert embedded colour profiles; and a 2D canvas blends what is transparent with black. So the orientation is read
// here, taken out of the copy that the browser decodes, and applied here; profiles are ignored; and a file with
// alpha is read through WebGL2, which keeps the colours below it. AVIF states its turn as a part of the picture, which
// browsers and pkd apply alike; EXIF in it is ignored by both.

/** Say why a file gives no picture. `name` is "DecodeError". */
export class DecodeError extends Error {
  name = "DecodeError";
}

const ORIENTATION = 0x0112;
const MAX_PIXELS = 40_000_000;
const text = (bytes, at, length) => String.fromCharCode(...bytes.subarray(at, at + length));
const view = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/** Decode a Blob of a JPEG, PNG, WebP, BMP or AVIF → {width, height, data}: upright RGB. Throws DecodeError. */
export async function decode(blob) {
  const file = inspect(new Uint8Array(await blob.arrayBuffer()));
  const options = { colorSpaceConversion: "none", premultiplyAlpha: file.alpha ? "none" : "default" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([file.bytes], { type: file.type }), options);
  } catch {
    const or = file.type === "image/avif" ? ", or this browser reads no AVIF" : "";
    throw new DecodeError(`this ${file.type.slice(6)} file is truncated or corrupt${or}. Choose another photograph.`);
  }
  try {
    if (bitmap.width * bitmap.height > MAX_PIXELS) {
      throw new DecodeError(`${bitmap.width} × ${bitmap.height} pixels are over 40 million. Choose a smaller picture.`);
    }
    return turn(file.alpha ? readUnblended(bitmap) : readOpaque(bitmap), file.orientation);
  } finally {
    bitmap.close();
  }
}

/** Read a video frame, a canvas or an image element as it is shown → RGB. */
export function grab(source, width, height) {
  return readOpaque(source, width, height);
}

/**
 * Read what decoding depends on from a file's bytes → {type, orientation, alpha, bytes}: `bytes` are the same file
 * without its orientation. Throws DecodeError for what is no JPEG, PNG, WebP, BMP or AVIF.
 */
export function inspect(bytes) {
  if (bytes[0] === 0xff && bytes[1] === 0xd8 && bytes[2] === 0xff) return jpeg(bytes);
  if (text(bytes, 0, 8) === "\x89PNG\r\n\x1a\n") return png(bytes);
  if (text(bytes, 0, 4) === "RIFF" && text(bytes, 8, 4) === "WEBP") return webp(bytes);
  if (text(bytes, 0, 2) === "BM") return { type: "image/bmp", orientation: 1, alpha: false, bytes };
  if (text(bytes, 4, 4) === "ftyp") return heif(bytes);
  throw new DecodeError("this is no JPEG, PNG, WebP, BMP or AVIF picture. Phones can save HEIC photographs as JPEG.");
}

/** Tell AVIF, which browsers decode to pkd's pixels, from HEIC and films, which they do not. */
function heif(bytes) {
  const end = Math.min(bytes.length, view(bytes).getUint32(0)), kind = text(bytes, 8, 4), brands = [kind];
  for (let at = 16; at + 4 <= end && at < 256; at += 4) brands.push(text(bytes, at, 4));
  if (kind === "avis") throw new DecodeError("this AVIF holds a film. Choose a single picture.");
  if (brands.includes("avif")) {
    const alpha = /auxiliary:alpha|auxid:1/.test(new TextDecoder("latin1").decode(bytes)); // URNs of a picture of alpha
    return { type: "image/avif", orientation: 1, alpha, bytes };
  }
  if (!brands.some((one) => /^(hei[cxms]|hev[cx]|mif1|msf1)$/.test(one))) {
    throw new DecodeError("this is a film or another file, not a picture. Choose a JPEG, PNG, WebP, BMP or AVIF.");
  }
  throw new DecodeError(
    "this is a HEIC picture, which most browsers do not read. Save it as JPEG (iPhone: Settings, Camera, Formats, Most " +
      "Compatible), or let the server decode it.",
  );
}

function jpeg(bytes) {
  let orientation = 1, made = bytes;
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff; ) {
    const marker = bytes[at + 1];
    if (marker === 0xff) {
      at += 1; // filling
      continue;
    }
    if (marker === 0xda || marker === 0xd9) break;
    const length = (bytes[at + 2] << 8) | bytes[at + 3];
    if (marker === 0xe1 && text(bytes, at + 4, 6) === "Exif\0\0") {
      const found = exif(bytes, at + 10, at + 2 + length);
      if (found) [orientation, made] = [found.value, without(bytes, found)];
      break;
    }
    at += 2 + length;
  }
  return { type: "image/jpeg", orientation, alpha: false, bytes: made };
}

function png(bytes) {
  const numbers = view(bytes);
  let orientation = 1, alpha = (bytes[25] & 4) !== 0, made = bytes;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = numbers.getUint32(at), kind = text(bytes, at + 4, 4), end = at + 12 + length;
    if (kind === "tRNS") alpha = true;
    if (kind === "eXIf" && end <= bytes.length && orientation === 1) {
      const found = exif(bytes, at + 8, at + 8 + length);
      if (found) {
        orientation = found.value;
        made = new Uint8Array(bytes.length - 12 - length); // the chunk has a checksum: leave out all of it
        made.set(bytes.subarray(0, at));
        made.set(bytes.subarray(end), at);
      }
    }
    at = end;
  }
  return { type: "image/png", orientation, alpha, bytes: made };
}

function webp(bytes) {
  const numbers = view(bytes);
  let orientation = 1, alpha = false, made = bytes;
  for (let at = 12; at + 8 <= bytes.length; ) {
    const kind = text(bytes, at, 4), length = numbers.getUint32(at + 4, true), from = at + 8;
    if (kind === "VP8X") alpha ||= (bytes[from] & 0x10) !== 0;
    if (kind === "VP8L") alpha ||= (bytes[from + 4] & 0x10) !== 0;
    if (kind === "EXIF") {
      const prefixed = text(bytes, from, 6) === "Exif\0\0";
      const found = exif(bytes, from + (prefixed ? 6 : 0), Math.min(bytes.length, from + length));
      if (found) [orientation, made] = [found.value, without(bytes, found)];
    }
    at = from + length + (length % 2);
  }
  return { type: "image/webp", orientation, alpha, bytes: made };
}

/** Find the orientation in a TIFF block, bytes[start:end] → {value, at, little}, or null. */
function exif(bytes, start, end) {
  const order = text(bytes, start, 2), little = order === "II", numbers = view(bytes);
  if (end > bytes.length || end - start < 14 || (!little && order !== "MM")) return null;
  if (numbers.getUint16(start + 2, little) !== 42) return null;
  const folder = start + numbers.getUint32(start + 4, little);
  if (folder + 2 > end) return null;
  const count = numbers.getUint16(folder, little);
  for (let n = 0, at = folder + 2; n < count && at + 12 <= end; n++, at += 12) {
    if (numbers.getUint16(at, little) !== ORIENTATION) continue;
    const value = numbers.getUint16(at + 8, little);
    return value >= 1 && value <= 8 ? { value, at: at + 8, little } : null;
  }
  return null;
}

function without(bytes, { at, little }) {
  const made = bytes.slice();
  view(made).setUint16(at, 1, little);
  return made;
}

/** Turn a picture as it is stored upright, by its EXIF orientation 1–8. */
export function turn(image, orientation) {
  if (orientation === 1) return image;
  const { width: w, height: h, data } = image, swaps = orientation > 4;
  const width = swaps ? h : w, height = swaps ? w : h, made = new Uint8Array(data.length);
  // Where the stored pixel of upright column 0 and row 0 lies, and how far a column and a row move from it.
  const [start, across, down] = {
    2: [w - 1, -1, w],
    3: [w * h - 1, -1, -w],
    4: [w * (h - 1), 1, -w],
    5: [0, w, 1],
    6: [w * (h - 1), -w, 1],
    7: [w * h - 1, -w, -1],
    8: [w - 1, w, -1],
  }[orientation];
  for (let y = 0, to = 0; y < height; y++) {
    for (let x = 0, from = (start + y * down) * 3; x < width; x++, to += 3, from += across * 3) {
      made[to] = data[from];
      made[to + 1] = data[from + 1];
      made[to + 2] = data[from + 2];
    }
  }
  return { width, height, data: made };
}

/** Drop the fourth byte of each pixel. */
export function rgb(width, height, rgba) {
  const data = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; to < data.length; from += 4, to += 3) {
    data[to] = rgba[from];
    data[to + 1] = rgba[from + 1];
    data[to + 2] = rgba[from + 2];
  }
  return { width, height, data };
}

function canvas(width, height) {
  if (typeof OffscreenCanvas !== "undefined") return new OffscreenCanvas(width, height);
  return Object.assign(document.createElement("canvas"), { width, height });
}

function readOpaque(source, width = source.width, height = source.height) {
  const context = canvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(source, 0, 0);
  return rgb(width, height, context.getImageData(0, 0, width, height).data);
}

function readUnblended(bitmap) {
  const { width, height } = bitmap, surface = canvas(1, 1), gl = surface.getContext("webgl2");
  if (!gl || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) {
    throw new DecodeError("a picture with transparent parts cannot be read exactly here. Save it as a JPEG.");
  }
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  const texture = gl.getParameter(gl.TEXTURE_BINDING_2D);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const rgba = new Uint8Array(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
  gl.getExtension("WEBGL_lose_context")?.loseContext(); // browsers keep few contexts
  return rgb(width, height, rgba);
}
