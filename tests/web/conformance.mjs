// Compute the conformance kit in Node with the browser's own modules; decoding alone needs a browser.
//
// Run as: node conformance.mjs WEB BUNDLE DETECTOR.onnx KIT REPORT.json     WEB is the folder serving/web

import { readFileSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { gunzipSync } from "node:zlib";

const [web, bundle, detector, kit, out] = process.argv.slice(2);
const at = (path) => pathToFileURL(`${web}/${path}`);
const ort = await import(at("vendor/ort.wasm.min.mjs"));
const { base64 } = await import(at("device/encode.js"));
const { choose, cropBy, Device, encode, similarity } = await import(at("device/pkd-device.js"));

const bytes = (path) => {
  const data = readFileSync(path);
  return data.buffer.slice(data.byteOffset, data.byteOffset + data.length);
};
ort.env.wasm.wasmBinary = gunzipSync(readFileSync(`${web}/vendor/ort-wasm-simd-threaded.wasm.gz`));
ort.env.logLevel = "error";
const device = await Device.load({
  ort,
  manifest: JSON.parse(readFileSync(`${bundle}/manifest.json`, "utf8")),
  student: bytes(`${bundle}/encoder.onnx`),
  golden: bytes(`${bundle}/golden.npz`),
  detector: bytes(detector),
  threads: 1,
});

const stated = JSON.parse(readFileSync(`${kit}/kit.json`, "utf8")), cases = {};
for (const one of stated.cases) {
  const image = { width: one.width, height: one.height, data: gunzipSync(readFileSync(`${kit}/${one.rgb}`)) };
  const given = new Float32Array(bytes(`${kit}/${one.embedding}`));
  const made = await device.embed(image);
  cases[one.name] = {
    landmarks: choose(await device.detector.detect(image), image).landmarks,
    matrix: similarity(one.landmarks, device.size),
    crop_base64: base64(cropBy(image, one.matrix, device.size).data),
    embedding: Array.from(await device.run(new Uint8Array(readFileSync(`${kit}/${one.crop}`)))),
    encodings: Object.fromEntries(["b64_f32", "b64_f16", "b64_i8"].map((form) => [form, encode(given, form)])),
    request: device.request(given, "GALLERY", "SUBJECT"),
    whole: Array.from(made.embedding),
  };
}
writeFileSync(out, JSON.stringify({ device: "pkd-device.js in Node", encoder: device.encoder, cases }));
process.exit(0); // WebAssembly threads would keep it alive
