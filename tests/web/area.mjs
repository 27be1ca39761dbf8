// Shrink a raw RGB picture. Run as: node area.mjs WEB IMAGE.rgb WIDTH HEIGHT NEW_WIDTH NEW_HEIGHT

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [web, file, ...numbers] = process.argv.slice(2);
const { resizeArea } = await import(pathToFileURL(`${web}/device/align.js`));
const [width, height, across, down] = numbers.map(Number);
console.log(JSON.stringify(Array.from(resizeArea({ width, height, data: readFileSync(file) }, across, down).data)));
