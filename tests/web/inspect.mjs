// Say what decoding reads from files, or turn their unturned pixels (NAME.rgb, 28 × 20).
// Run as: node inspect.mjs WEB FOLDER [--turn] NAME…

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [web, folder, ...rest] = process.argv.slice(2);
const { inspect, turn } = await import(pathToFileURL(`${web}/device/decode.js`));
const turns = rest[0] === "--turn", said = {};
for (const name of turns ? rest.slice(1) : rest) {
  try {
    const file = inspect(new Uint8Array(readFileSync(`${folder}/${name}`)));
    said[name] = { ...file, bytes: Array.from(file.bytes) };
    if (!turns) continue;
    const image = { width: 28, height: 20, data: new Uint8Array(readFileSync(`${folder}/${name}.rgb`)) };
    const { width, height, data } = turn(image, file.orientation);
    said[name] = { size: [width, height], rgb: Array.from(data) };
  } catch (error) {
    said[name] = { error: `${error.name}: ${error.message}` };
  }
}
console.log(JSON.stringify(said));
