// Detect in raw RGB pictures 0.rgb, 1.rgb, … of the given sizes, and cut the chosen face out of each.
// Run as: node detect.mjs WEB DETECTOR.onnx FOLDER 320x256 …

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { gunzipSync } from "node:zlib";

const [web, detector, folder, ...sizes] = process.argv.slice(2);
const at = (path) => pathToFileURL(`${web}/${path}`);
const ort = await import(at("vendor/ort.wasm.min.mjs"));
const { choose, crop, YuNet } = await import(at("device/pkd-device.js"));
ort.env.wasm.wasmBinary = gunzipSync(readFileSync(`${web}/vendor/ort-wasm-simd-threaded.wasm.gz`));
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal";
const yunet = new YuNet(ort, await ort.InferenceSession.create(readFileSync(detector)));
const said = [];
for (const [number, size] of sizes.entries()) {
  const [width, height] = size.split("x").map(Number);
  const image = { width, height, data: new Uint8Array(readFileSync(`${folder}/${number}.rgb`)) };
  const faces = await yunet.detect(image), chosen = choose(faces, image);
  said.push({ faces, chosen, crop: chosen && Array.from(crop(image, chosen.landmarks, 112).data) });
}
process.stdout.write(JSON.stringify(said), () => process.exit(0)); // WebAssembly threads would keep it alive
