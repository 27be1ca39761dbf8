// Round float32 numbers to float16, and encode vectors. Run as: node encode.mjs WEB NUMBERS.f32 DIM

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [web, file, dim] = process.argv.slice(2);
const { encode, toHalf } = await import(pathToFileURL(`${web}/device/encode.js`));
const data = readFileSync(file);
const numbers = new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.length));
const forms = ["b64_f32", "b64_f16", "b64_i8"], texts = [];
for (let n = 0; n + Number(dim) <= numbers.length; n += Number(dim)) {
  const vector = numbers.subarray(n, n + Number(dim));
  if (vector.every(Number.isFinite) && vector.some((one) => one)) texts.push(forms.map((form) => encode(vector, form)));
  else texts.push(null);
}
console.log(JSON.stringify({ halves: Array.from(numbers, toHalf), texts }));
