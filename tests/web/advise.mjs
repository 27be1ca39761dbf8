// Say what the camera advises about crops. Run as: node advise.mjs WEB CROP.rgb…    each 112 × 112

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [web, ...files] = process.argv.slice(2);
const { advise, measure } = await import(pathToFileURL(`${web}/camera.js`));
const { template } = await import(pathToFileURL(`${web}/device/align.js`));
const face = (size, x = 0) => ({ box: [x, 0, x + size, size], landmarks: template(112) });
const crops = files.map((file) => ({ width: 112, height: 112, data: readFileSync(file) }));
const [good] = crops, seen = (faces) => advise(good, faces, faces[0] ?? null, 112);
console.log(
  JSON.stringify({
    crops: crops.map((crop) => [advise(crop, [face(112)], face(112), 112), measure(crop)]),
    none: seen([]),
    several: seen([face(112), face(90)]),
    bystander: seen([face(112), face(40)]),
    small: seen([face(50)]),
  }),
);
