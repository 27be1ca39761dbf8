// Encoding: an embedding → the texts and request bodies that a pkd server takes (docs/device.md, steps 6 and 7).

/** Write an embedding as base64 of little-endian numbers: `b64_f32`, `b64_f16` or `b64_i8`. Throws RangeError. */
export function encode(vector, encoding = "b64_f16") {
  const width = { b64_f32: 4, b64_f16: 2, b64_i8: 1 }[encoding];
  if (!width) throw new RangeError(`encoding ${encoding}: give b64_f32, b64_f16 or b64_i8.`);
  const bytes = new Uint8Array(vector.length * width), view = new DataView(bytes.buffer);
  const largest = vector.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  if (!(largest > 0 && Number.isFinite(largest))) throw new RangeError("the embedding has no length. Embed again.");
  const scale = Math.fround(127 / largest);
  vector.forEach((value, n) => {
    if (width === 4) view.setFloat32(4 * n, value, true);
    else if (width === 2) view.setUint16(2 * n, toHalf(value), true);
    else view.setInt8(n, roundHalfEven(Math.fround(value * scale)));
  });
  return base64(bytes);
}

/** Name an embedding to the server: what it is, how it is written, and which encoder made it. */
export const side = (vector, encoder, encoding = "b64_f16") => ({
  embedding: encode(vector, encoding), encoding, encoder,
});

/** Make the body of POST /v1/verify: is this face that of an enrolled subject. */
export const request = (vector, encoder, gallery, subject) => ({ a: side(vector, encoder), b: { gallery, subject } });

/** Round a float32 to the bits of a float16, halves to even. */
export function toHalf(value) {
  const bits = new DataView(new ArrayBuffer(4));
  bits.setFloat32(0, value);
  const word = bits.getUint32(0), sign = (word >>> 16) & 0x8000, power = (word >>> 23) & 0xff;
  let fraction = word & 0x7fffff;
  if (power === 0xff) return sign | 0x7c00 | (fraction ? 0x200 : 0);
  const exponent = power - 112;
  if (exponent >= 31) return sign | 0x7c00;
  if (exponent < -10) return sign;
  let shift = 13, base = exponent << 10;
  if (exponent <= 0) {
    fraction |= 0x800000; // below the smallest normal half the leading one is written out
    shift = 14 - exponent;
    base = 0;
  }
  const kept = fraction >>> shift, rest = fraction & ((1 << shift) - 1), half = 1 << (shift - 1);
  return sign | (base + kept + (rest > half || (rest === half && kept & 1) ? 1 : 0));
}

function roundHalfEven(value) {
  const near = Math.round(value);
  return Math.abs(value % 1) === 0.5 && near % 2 ? near - 1 : near;
}

/** Write bytes as base64 with padding (RFC 4648). */
export function base64(bytes) {
  let text = "";
  for (let n = 0; n < bytes.length; n += 8192) text += String.fromCharCode(...bytes.subarray(n, n + 8192));
  return btoa(text);
}
